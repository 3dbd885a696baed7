"""Stage 2, decode: a source -> its clips at canvas size, each a row, in a process that can be killed."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

# What flows from decode to the models: a clip, or (with stage and reason, and no frames) the end of a video.
DECODED_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("source", pa.string()),
        ("num_clips", pa.int32()),  # of the whole video: it is complete when so many have arrived
        ("start", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float32()),
        ("crop", pa.list_(pa.float32())),
        ("frames", pa.large_binary()),  # uint8 RGB [num_frames, size, size, 3]
        ("stage", pa.string()),
        ("reason", pa.string()),
    ]
)
DECODER = Path(__file__).with_name("decoder.py")


class DecodeError(Exception):
    """This video cannot be decoded; the message is the reason."""


def decode_clips(
    path: str, *, size: int, fps: float | None, clip_frames: int, min_clip_frames: int, timeout: float
) -> Iterator[dict[str, Any]]:
    """Clips in order: num_clips, start, num_frames, fps, crop and frames (bytes of uint8 `[F, size, size, 3]`).

    timeout: seconds that opening the video, and then each clip, may take.

    Raises:
        DecodeError: at any clip; those before it are not to be used.
    """
    request = {
        "path": path,
        "size": size,
        "fps": fps,
        "clip_frames": clip_frames,
        "min_clip_frames": min_clip_frames,
        "timeout": timeout,
    }
    # -P: the script's folder must not become a place to import from.
    command = [sys.executable, "-P", str(DECODER), json.dumps(request)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        try:
            assert child.stdout is not None
            while line := child.stdout.readline():
                message = json.loads(line)
                if "error" in message:
                    raise DecodeError(message["error"])
                if "end" in message:
                    return
                frames = child.stdout.read(message.pop("bytes"))
                if len(frames) == message["num_frames"] * size * size * 3:
                    yield message | {"frames": frames}
        finally:
            child.kill()
    if child.returncode == -signal.SIGALRM:
        raise DecodeError(f"the decoder gave no clip within {timeout:g} s")
    raise DecodeError(f"the decoder ended with status {child.returncode}")


def decode(sources: pa.Table, **settings: Any) -> Iterator[pa.Table]:
    """The Ray Data stage: rows (video_id, source) -> rows of DECODED_SCHEMA, as they are decoded.

    A video that fails ends with one row that has stage and reason.
    """
    for row in sources.select(["video_id", "source"]).to_pylist():
        try:
            for clip in decode_clips(row["source"], **settings):
                yield pa.Table.from_pylist([row | clip], DECODED_SCHEMA)
        except DecodeError as error:
            yield pa.Table.from_pylist([row | {"stage": "decode", "reason": str(error)}], DECODED_SCHEMA)
