"""Stage 2, decode: a source -> its clips in the canvas's scale, each a row, in a process that can be killed."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import storage

# What flows from decode to the models: a clip, or, without frames, the end of a video: how many clips it has (it is
# complete when so many have arrived), or the stage and the reason of its rejection.
DECODED_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("source", pa.string()),
        ("num_clips", pa.int32()),
        ("start", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float32()),
        ("height", pa.int32()),  # of the frames, pixels
        ("width", pa.int32()),
        ("crop", pa.list_(pa.float32())),  # x0, y0, x1, y1 in source pixels: what became the frames
        ("frames", pa.large_binary()),  # uint8 RGB [num_frames, height, width, 3]
        ("stage", pa.string()),
        ("reason", pa.string()),
    ]
)
DECODER = Path(__file__).with_name("decoder.py")


DOWNLOAD_TRIES = 3  # a bucket's hiccup passes


class DecodeError(Exception):
    """This video cannot be decoded; the message is the reason."""


def decode_clips(path: str, *, timeout: float, **settings: Any) -> Iterator[dict[str, Any]]:
    """Clips in order: start, num_frames, fps, height, width, crop and frames (bytes of uint8 `[F, H, W, 3]`); then
    num_clips.

    settings: the other keyword arguments of `decoder.decode`. timeout: seconds that opening the video, and then each
    clip, may take.

    Raises:
        DecodeError: at any clip; those before it are not to be used.
    """
    request = settings | {"path": path, "timeout": timeout}
    # -P: the script's folder must not become a place to import from.
    command = [sys.executable, "-P", str(DECODER), json.dumps(request)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        try:
            assert child.stdout is not None
            while line := child.stdout.readline():
                if not line.endswith(b"\n"):  # it died in the middle of the line
                    break
                message = json.loads(line)
                if "error" in message:
                    raise DecodeError(message["error"])
                frames = child.stdout.read(message.pop("bytes"))
                if "num_clips" in message:
                    yield message
                    return
                if len(frames) == message["num_frames"] * message["height"] * message["width"] * 3:
                    yield message | {"frames": frames}
        finally:
            child.kill()
    if child.returncode == -signal.SIGALRM:
        raise DecodeError(f"the decoder gave no clip within {timeout:g} s")
    if child.returncode == -signal.SIGKILL:
        raise _Killed("the decoder was killed, twice")
    raise DecodeError(f"the decoder ended with status {child.returncode}")


def decode(sources: pa.Table, **settings: Any) -> Iterator[pa.Table]:
    """The Ray Data stage: rows (video_id, source) -> rows of DECODED_SCHEMA, as they are decoded.

    A decoder that was killed from outside (by the kernel for want of memory, say) gets a second try.
    """
    for row in sources.select(["video_id", "source"]).to_pylist():
        try:
            with _local_copy(row["source"]) as path:
                for clip in _tried_twice(path, **settings):
                    yield pa.Table.from_pylist([row | clip], DECODED_SCHEMA)
        except DecodeError as error:
            yield pa.Table.from_pylist([row | {"stage": "decode", "reason": str(error)}], DECODED_SCHEMA)


class _Killed(DecodeError):
    """Not by its time limit and not by a fault of its own."""


def _tried_twice(path: str, **settings: Any) -> Iterator[dict[str, Any]]:
    sent = 0
    try:
        for clip in decode_clips(path, **settings):
            yield clip
            sent += 1
    except _Killed:
        yield from itertools.islice(decode_clips(path, **settings), sent, None)


@contextmanager
def _local_copy(source: str) -> Iterator[str]:
    """The file itself, or a copy of a bucket's for as long as it is needed: the decoder reads files."""
    if not storage.is_remote(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="tcan-") as folder:
        copy = os.path.join(folder, "video" + os.path.splitext(source)[1])
        for tries in range(DOWNLOAD_TRIES):
            try:
                filesystem, path = storage.locate(source)
                with filesystem.open_input_stream(path) as remote, open(copy, "wb") as local:
                    shutil.copyfileobj(remote, local, 2**20)
                break
            except OSError as error:
                if tries == DOWNLOAD_TRIES - 1:
                    raise DecodeError(f"cannot be read: {storage.one_line(error)}") from None
                time.sleep(2**tries)
        yield copy
