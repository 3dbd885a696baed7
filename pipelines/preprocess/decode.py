"""Decoding operator: sources -> clips scaled to the canvas, one per row.

Videos are decoded in separate processes (`decoder_process.py`), which can be killed.
"""

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
DOWNLOAD_TRIES = 3  # transient errors of object stores are retried


def _python_path() -> str:
    """PYTHONPATH for the decoder process, so that it can import `tcan` even if the package is not installed."""
    return os.pathsep.join(filter(None, (str(DECODER.parents[2]), os.environ.get("PYTHONPATH"))))


class DecodeError(Exception):
    """A video cannot be decoded; the message is the reason."""


class _Decoder:
    """A running decoder_process.py that serves one video after another.

    Its imports take several times as long as decoding a short video, so the process is reused.
    """

    def __init__(self) -> None:
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                # -P: do not add the folder of the script to sys.path.
                [sys.executable, "-P", str(DECODER)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # The process forks, which is unsafe with numpy's threads; it does not compute with numpy.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": _python_path()},
                process_group=0,  # includes its forked children
            )

    def begin(self, request: dict[str, Any]) -> BinaryIO:
        """Request a video; return the stream of its messages. Read it to the end, then call `status`."""
        reading, writing = os.pipe()
        with suppress(ConnectionError):  # the process has died; the stream is empty
            socket.send_fds(self.requests, [json.dumps(request).encode()], [writing])
        os.close(writing)
        return open(reading, "rb")

    def status(self) -> int:
        """Return code of the process that decoded the video; -SIGKILL if the decoder process has died."""
        with suppress(ConnectionError):
            return int(self.requests.recv(16) or -signal.SIGKILL)
        return -signal.SIGKILL

    def end(self) -> None:
        """Kill the decoder process and its children."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.requests.close()


@functools.cache
def _decoder() -> _Decoder:
    """The decoder of this Python process; it ends together with it."""
    return _Decoder()


def decode_clips(path: str, *, timeout: float, **settings: Any) -> Iterator[dict[str, Any]]:
    """Yield the clips of a video in order, then a dict with num_clips and warning.

    A clip has start, num_frames, fps, height, width, crop and frames (bytes of uint8 `[F, H, W, 3]`).

    Args:
        path: local path of the video.
        timeout: time limit in seconds for opening the video, and for each clip.
        settings: other keyword arguments of `decoder_process.decode`.

    Raises:
        DecodeError: the video cannot be decoded. Clips that were yielded before must be discarded.
    """
    decoder = _decoder()
    status = error = None
    try:
        with decoder.begin(settings | {"path": path, "timeout": timeout}) as messages:
            while (line := messages.readline()).endswith(b"\n"):  # a partial line: the process died
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
        if status in (None, -signal.SIGKILL):  # the caller stopped reading, or the process was killed
            decoder.end()
            _decoder.cache_clear()
    if status == -signal.SIGKILL:
        raise _Killed("the decoder process was killed twice")
    if status == -signal.SIGALRM:
        raise DecodeError(f"the decoder produced no clip within {timeout:g} s")
    if error or status:
        raise DecodeError(error or f"the decoder process ended with status {status}")


def decode(sources: pa.Table, **settings: Any) -> Iterator[pa.Table]:
    """Ray Data operator: rows (video_id, source) -> rows of DECODED_SCHEMA, yielded while decoding.

    If the decoder process is killed from outside, for example by the out-of-memory killer, the video is retried once.
    """
    for row in sources.select(["video_id", "source"]).to_pylist():
        try:
            with _local_copy(row["source"]) as path:
                for clip in _decode_with_retry(path, **settings):
                    yield pa.Table.from_pylist([row | clip], DECODED_SCHEMA)
        except DecodeError as error:
            yield pa.Table.from_pylist([row | {"step": "decode", "reason": str(error)}], DECODED_SCHEMA)


class _Killed(DecodeError):
    """The decoder process was killed from outside, not by its time limit or by an error of its own."""


def _decode_with_retry(path: str, **settings: Any) -> Iterator[dict[str, Any]]:
    num_yielded = 0
    try:
        for clip in decode_clips(path, **settings):
            yield clip
            num_yielded += 1
    except _Killed:
        yield from itertools.islice(decode_clips(path, **settings), num_yielded, None)


@contextmanager
def _local_copy(source: str) -> Iterator[str]:
    """Yield a local path of the source. Sources in a bucket are downloaded to a temporary file for the duration of the block."""
    if not storage.is_remote(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="tcan-") as folder:
        copy = os.path.join(folder, "video" + os.path.splitext(source)[1])
        for attempt in range(DOWNLOAD_TRIES):
            try:
                filesystem, path = storage.locate(source)
                with filesystem.open_input_stream(path) as remote, open(copy, "wb") as local:
                    shutil.copyfileobj(remote, local, 2**20)
                break
            except OSError as error:
                if attempt == DOWNLOAD_TRIES - 1:
                    raise DecodeError(f"cannot be read: {storage.one_line(error)}") from None
                time.sleep(2**attempt)
        yield copy
