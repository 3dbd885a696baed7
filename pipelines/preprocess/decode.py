"""Stage 2, decode: a source -> its clips in the canvas's scale, each a row, in processes that can be killed."""

import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from pipelines import storage
from pipelines.preprocess.schemas import DECODED_SCHEMA

DECODER = Path(__file__).with_name("decoder_process.py")


DOWNLOAD_TRIES = 3  # a bucket's hiccup passes


class DecodeError(Exception):
    """This video cannot be decoded; the message is the reason."""


class _Decoder:
    """decoder_process.py, waiting for videos. Its imports take several times as long as a short video, so it has them behind it."""

    def __init__(self) -> None:
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                # -P: the script's folder must not become a place to import from.
                [sys.executable, "-P", str(DECODER)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # numpy computes nothing there, and its threads would be in the way of forks.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                process_group=0,  # with what it forks
            )

    def begin(self, request: dict[str, Any]) -> BinaryIO:
        """The messages about one video; to be read to their end, and `status` after them."""
        reading, writing = os.pipe()
        with suppress(ConnectionError):  # it has died; there are no messages then
            socket.send_fds(self.requests, [json.dumps(request).encode()], [writing])
        os.close(writing)
        return open(reading, "rb")

    def status(self) -> int:
        """That the video's process ended with, as a `returncode`; that of a killed one if this one has died."""
        with suppress(ConnectionError):
            return int(self.requests.recv(16) or -signal.SIGKILL)
        return -signal.SIGKILL

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.requests.close()


@functools.cache
def _decoder() -> _Decoder:
    """This process's; it ends with it."""
    return _Decoder()


def decode_clips(path: str, *, timeout: float, **settings: Any) -> Iterator[dict[str, Any]]:
    """Clips in order: start, num_frames, fps, height, width, crop and frames (bytes of uint8 `[F, H, W, 3]`); then
    num_clips.

    settings: the other keyword arguments of `decoder.decode`. timeout: seconds that opening the video, and then each
    clip, may take.

    Raises:
        DecodeError: at any clip; those before it are not to be used.
    """
    decoder = _decoder()
    status = error = None
    try:
        with decoder.begin(settings | {"path": path, "timeout": timeout}) as messages:
            while (line := messages.readline()).endswith(b"\n"):  # else it died in the middle of it
                message = json.loads(line)
                frames = messages.read(message.pop("bytes"))
                if "error" in message:
                    error = message["error"]
                elif "num_clips" in message:
                    yield message
                elif len(frames) == message["num_frames"] * message["height"] * message["width"] * 3:
                    yield message | {"frames": frames}
        status = decoder.status()
    finally:
        if status in (None, -signal.SIGKILL):  # read by nobody any more; killed, perhaps with its parent
            decoder.end()
            _decoder.cache_clear()
    if status == -signal.SIGKILL:
        raise _Killed("the decoder was killed, twice")
    if status == -signal.SIGALRM:
        raise DecodeError(f"the decoder gave no clip within {timeout:g} s")
    if error or status:
        raise DecodeError(error or f"the decoder ended with status {status}")


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
