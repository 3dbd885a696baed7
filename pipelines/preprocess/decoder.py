"""The child process that decodes one video with decord; `decode.py` starts it and reads what it sends.

decord can wait without end, holding the GIL, for frames that a header claims and the file lacks; it can crash, and it
keeps memory. So each video has a process of its own. Its time limit is a timer of the kernel with the signal's default
action, which ends the process whatever the interpreter is doing, and also when the parent is gone.

Sends messages on standard output: a line of JSON, then as many bytes as its "bytes" says.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator

import decord
import numpy as np
from PIL import Image

RAW_BYTES = (
    64 * 2**20
)  # of source pictures held at once: an 8K video takes little more memory than a small one
MAX_REPAIRED = 0.01  # share of frames that decord may fill with their neighbours before it gives up


class Unusable(Exception):
    """The video is not one to use; the message is the reason."""


def frame_numbers(num_frames: int, source_fps: float, fps: float | None) -> list[int]:
    """The source's frame shown at each frame time of the resampled video; a higher fps than the source's repeats."""
    if fps is None:
        return list(range(num_frames))
    count = max(1, round(num_frames / source_fps * fps))
    return [min(num_frames - 1, int(i * source_fps / fps + 0.5)) for i in range(count)]


def centre_crop(height: int, width: int) -> tuple[float, float, float, float]:
    """The largest centred square: (x0, y0, x1, y1) in pixels."""
    side = min(height, width)
    x0, y0 = (width - side) / 2, (height - side) / 2
    return x0, y0, x0 + side, y0 + side


def decode(
    path: str, size: int, fps: float | None, clip_frames: int, min_clip_frames: int, timeout: float
) -> Iterator[tuple[dict, np.ndarray]]:
    """A header and uint8 RGB frames [F, size, size, 3] for each clip, in order."""
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        reader = decord.VideoReader(path, num_threads=1, fault_tol=MAX_REPAIRED)
    except RuntimeError as error:
        raise Unusable(
            "not a video that can be read" if "Error reading" in str(error) else _reason(error)
        ) from None
    source_fps = float(reader.get_avg_fps())
    if not (np.isfinite(source_fps) and source_fps > 0):
        raise Unusable("has no frame rate")
    numbers = frame_numbers(len(reader), source_fps, fps)
    starts = [s for s in range(0, len(numbers), clip_frames) if len(numbers) - s >= min_clip_frames]
    if not starts:
        raise Unusable(f"too short: {len(numbers)} frames, fewer than {min_clip_frames}")

    height, width = reader[0].shape[:2]
    crop = centre_crop(height, width)
    header = {"num_clips": len(starts), "fps": fps or source_fps, "crop": crop}
    chunk = max(1, RAW_BYTES // (height * width * 3))
    for start in starts:
        signal.setitimer(signal.ITIMER_REAL, timeout)
        wanted = numbers[start : start + clip_frames]
        frames = np.empty((len(wanted), size, size, 3), np.uint8)
        for i in range(0, len(wanted), chunk):
            pictures = reader.get_batch(wanted[i : i + chunk]).asnumpy()
            for j, picture in enumerate(pictures, start=i):
                frames[j] = _resize(picture, crop, size)
        signal.setitimer(signal.ITIMER_REAL, 0)  # the reader may take its time
        yield header | {"start": start, "num_frames": len(wanted)}, frames


def _resize(picture: np.ndarray, crop: tuple[float, float, float, float], size: int) -> np.ndarray:
    if picture.shape == (size, size, 3):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS, box=crop))


def _reason(error: BaseException) -> str:
    """decord's message without time, place in its sources and stack: its own words only."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", lines[0]).strip()[:200]


def main() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what ffmpeg prints must not get between the messages

    def send(header: dict, payload: bytes | memoryview = b"") -> None:
        output.write(json.dumps(header | {"bytes": len(payload)}).encode() + b"\n")
        output.write(payload)
        output.flush()

    try:
        for header, frames in decode(**json.loads(sys.argv[1])):
            send(header, frames.data.cast("B"))
        send({"end": True})
    except BrokenPipeError:
        pass
    except Exception as error:  # whatever decord makes of a file is a property of the file
        signal.setitimer(signal.ITIMER_REAL, 0)
        send({"error": str(error) if isinstance(error, Unusable) else _reason(error)})
    os._exit(0)  # decord's destructors may wait too


if __name__ == "__main__":
    main()
