"""The decoder process: `decode.py` starts it, requests one video after another and reads the clips.

A decoder may block forever or crash on a damaged file, and decord leaks memory. So each video is decoded in a process forked
from this one, which has already imported the decoders (`tcan.video_stream`). The time limit is a kernel timer with the default
action of SIGALRM: it ends the process whatever the interpreter is doing, even if the parent is gone.

Protocol: a request arrives on the socket at standard input. It contains the arguments of `decode` as JSON, and a file
descriptor for the output. Each output message is a line of JSON, followed by as many bytes as its key "bytes" says. After the
output is complete, the response on the socket is the exit status of the forked process.
"""

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from tcan.crop import Size, crop_box, nearest_size
from tcan.video_stream import UnusableVideo, VideoStream

REQUEST_BYTES = 2**16  # maximum size; a path has at most 4096
GRID = 8  # pixels: frame sizes are multiples of it, as the VAE requires
MAX_ASPECT_RATIO = 3  # wider or taller full frames are cropped to it, to limit memory
CUT_SIZE = (32, 32)  # thumbnail size for cut detection


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Hue, saturation and value of a downscaled RGB image: int16 `[32, 32, 3]`."""
    small = Image.fromarray(image).resize(CUT_SIZE, Image.Resampling.BOX)
    return np.asarray(small.convert("HSV"), np.int16)


def is_cut(before: np.ndarray, after: np.ndarray, threshold: float) -> bool:
    """Whether the scene is cut between two thumbnails, as in PySceneDetect's content detector.

    threshold: limit of the mean change of hue, saturation and value, 0 to 255.
    """
    change = np.abs(before - after)
    change[..., 0] = np.minimum(change[..., 0], 256 - change[..., 0])  # hue is an angle
    return float(change.mean()) > threshold


def output_size(height: int, width: int, canvas: Size, full_frame: bool) -> Size:
    """Height and width of the frames of a clip.

    full_frame: the complete frame, scaled to the smallest size that contains `canvas`; otherwise its center, cropped to the
        aspect ratio of `canvas` and scaled to it.
    """
    if not full_frame:
        return canvas

    def longer(fixed: int, free: int, scaled: int) -> int:
        """The side of the frame that exceeds `free` pixels, if the other one has `fixed` pixels."""
        return min(scaled, max(fixed * MAX_ASPECT_RATIO, free)) // GRID * GRID

    if width * canvas[0] > height * canvas[1]:
        return canvas[0], longer(*canvas, canvas[0] * width // height)
    return longer(canvas[1], canvas[0], canvas[1] * height // width), canvas[1]


def decode(
    path: str,
    sizes: Sequence[Size],
    timeout: float,
    clip_frames: int,
    min_clip_frames: int,
    full_frame: bool = False,
    fps: float | None = None,
    cut_threshold: float = 0.0,
    min_seconds: float = 0.0,
    max_seconds: float | None = None,
) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield a header and uint8 RGB frames `[F, H, W, 3]` for each clip in order, then a header with num_clips and
    warning (None: none).

    Args:
        path: local path of the video.
        sizes: possible sizes of the canvas; the nearest to the aspect ratio of the video is used for all of its clips.
            `output_size` gives H and W.
        timeout: time limit in seconds for opening the video, and for each clip.
        clip_frames, min_clip_frames: maximum and minimum number of frames per clip.
        full_frame: see `output_size`.
        fps: resample to this frame rate; None uses every frame.
        cut_threshold: clips end at scene cuts (see `is_cut`); 0 disables cut detection.
        min_seconds, max_seconds: limits on the duration of the video.

    Raises:
        UnusableVideo: the video is damaged, too short or too long.
    """
    signal.setitimer(signal.ITIMER_REAL, timeout)
    video = VideoStream(path)
    if video.seconds < min_seconds:
        raise UnusableVideo(f"too short: {video.seconds:.1f} s, less than {min_seconds:g} s")
    if max_seconds is not None and video.seconds > max_seconds:
        raise UnusableVideo(f"too long: {video.seconds:.1f} s, more than {max_seconds:g} s")
    canvas = nearest_size(video.height, video.width, sizes)
    size = output_size(video.height, video.width, canvas, full_frame)
    crop = crop_box(video.height, video.width, *size)
    rate = fps or (video.num_frames / video.seconds if video.variable_rate else video.fps)
    images = video.resampled(fps) if fps else (image for _, image in video)

    clip: list[np.ndarray] = []
    small: Any = None  # thumbnail of the previous frame
    start = clips = i = 0
    for i, image in enumerate(images):
        frame = _resize(image, crop, size)
        small, before = thumbnail(frame) if cut_threshold else None, small
        if len(clip) == clip_frames or (clip and cut_threshold and is_cut(before, small, cut_threshold)):
            if len(clip) >= min_clip_frames:
                clips += 1
                signal.setitimer(signal.ITIMER_REAL, 0)  # no time limit while the consumer processes the clip
                yield _header(start, clip, rate, canvas, crop), np.stack(clip)
            start, clip = i, []
            signal.setitimer(signal.ITIMER_REAL, timeout)
        clip.append(frame)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if len(clip) >= min_clip_frames:
        clips += 1
        yield _header(start, clip, rate, canvas, crop), np.stack(clip)
    if i + 1 < min_clip_frames:
        raise UnusableVideo(f"too short: {i + 1} frames, fewer than {min_clip_frames}")
    if not clips:
        raise UnusableVideo(f"too short: no {min_clip_frames} consecutive frames without a cut")
    yield {"num_clips": clips, "warning": "; ".join(video.warnings) or None}, np.empty(0, np.uint8)


def _header(
    start: int, clip: list[np.ndarray], fps: float, canvas: Size, crop: tuple[float, float, float, float]
) -> dict[str, Any]:
    height, width = clip[0].shape[:2]
    return {
        "start": start, "num_frames": len(clip), "fps": fps, "height": height, "width": width, "canvas": canvas, "crop": crop,
    }  # fmt: skip


def _resize(image: np.ndarray, crop: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS, box=crop))


def _reason(error: BaseException) -> str:
    """First line of a decoder error, without its timestamp, source location and stack trace."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", lines[0]).strip()[:200]


def send_clips(request: dict[str, Any], output: BinaryIO) -> None:
    """Decode the requested video and write its messages to `output`."""

    def send(header: dict, payload: bytes | memoryview = b"") -> None:
        output.write(json.dumps(header | {"bytes": len(payload)}).encode() + b"\n")
        output.write(payload)
        output.flush()

    try:
        for header, frames in decode(**request):
            send(header, frames.data.cast("B"))
    except BrokenPipeError:
        pass
    except Exception as error:  # any error of a decoder is treated as a defect of the file
        signal.setitimer(signal.ITIMER_REAL, 0)
        send({"error": str(error) if isinstance(error, UnusableVideo) else _reason(error)})


def main() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    requests = socket.socket(fileno=sys.stdin.fileno())
    while True:
        request, outputs, _, _ = socket.recv_fds(requests, REQUEST_BYTES, 1)
        if not request:
            return
        with open(outputs[0], "wb") as output:
            if (child := os.fork()) == 0:
                try:
                    send_clips(json.loads(request), output)
                    os._exit(0)  # skip decord's destructors, which may block
                finally:
                    os._exit(1)
        _, status = os.waitpid(child, 0)
        requests.send(str(os.waitstatus_to_exitcode(status)).encode())


if __name__ == "__main__":
    main()
