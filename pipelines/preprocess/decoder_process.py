"""The decoder process: `decode.py` starts it, requests one video after another and reads the clips.

decord may block forever, holding the GIL, on frames that a header claims but the file lacks; it may crash, and it leaks
memory. So each video is decoded in a process forked from this one, which has already imported decord. The time limit is a
kernel timer with the default action of SIGALRM: it ends the process whatever the interpreter is doing, even if the parent is
gone.

decord also decodes ahead of its reader. If the reader (pose network and VAE) is slow, it decodes up to the end of the video,
so a long video would fill the memory. Long videos are read with PyAV, which does not decode ahead.

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
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import decord
import numpy as np
from PIL import Image

from tcan.crop import crop_box

REQUEST_BYTES = 2**16  # maximum size; a path has at most 4096
RAW_BYTES = 16 * 2**20  # decoded source frames per decord call
AHEAD_BYTES = 512 * 2**20  # decoded size of the longest video that decord reads
GRID = 8  # pixels: frame sizes are multiples of it, as the VAE requires
MAX_ASPECT_RATIO = 3  # wider or taller full frames are cropped to it, to limit memory
CUT_SIZE = (32, 32)  # thumbnail size for cut detection
MAX_REPAIRED = 0.01  # fraction of damaged frames that may be replaced by their neighbors


class Unusable(Exception):
    """The video cannot be used; the message is the reason."""


def resample_indices(shown_at: np.ndarray, end: float, fps: float) -> list[int]:
    """Index of the source frame to show at each frame of the resampled video.

    Frames are repeated if `fps` exceeds the source's frame rate. Frame durations of variable frame rates are respected.

    Args:
        shown_at: presentation time in seconds of each source frame, increasing.
        end: time in seconds at which the last frame ends.
        fps: frame rate of the resampled video.
    """
    count = max(1, round((end - shown_at[0]) * fps))
    times = shown_at[0] + np.arange(count) / fps
    tolerance = 1e-3  # seconds; times are rounded in the file
    return (np.searchsorted(shown_at, times + tolerance, side="right") - 1).tolist()


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


def output_size(height: int, width: int, canvas: int, full_frame: bool) -> tuple[int, int]:
    """Height and width of the frames of a clip.

    full_frame: the complete frame, its shorter side scaled to `canvas`; otherwise the center square, scaled to `canvas`.
    """
    if not full_frame:
        return canvas, canvas
    longer = min(canvas * max(height, width) // min(height, width), canvas * MAX_ASPECT_RATIO) // GRID * GRID
    return (canvas, longer) if width > height else (longer, canvas)


def decode(
    path: str,
    canvas: int,
    timeout: float,
    clip_frames: int,
    min_clip_frames: int,
    full_frame: bool = False,
    fps: float | None = None,
    cut_threshold: float = 0.0,
    min_seconds: float = 0.0,
    max_seconds: float | None = None,
) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield a header and uint8 RGB frames `[F, H, W, 3]` for each clip in order, then a header with num_clips.

    Args:
        path: local path of the video.
        canvas: side of the canvas in pixels; `output_size` gives H and W, the same for all clips.
        timeout: time limit in seconds for opening the video, and for each clip.
        clip_frames, min_clip_frames: maximum and minimum number of frames per clip.
        full_frame: see `output_size`.
        fps: resample to this frame rate; None uses every frame.
        cut_threshold: clips end at scene cuts (see `is_cut`); 0 disables cut detection.
        min_seconds, max_seconds: limits on the duration of the video.

    Raises:
        Unusable: the video is damaged, too short or too long.
    """
    signal.setitimer(signal.ITIMER_REAL, timeout)
    video = _open(path)
    if not (np.isfinite(video.fps) and video.fps > 0):
        raise Unusable("no frame rate")
    seconds = video.num_frames / video.fps
    if seconds < min_seconds:
        raise Unusable(f"too short: {seconds:.1f} s, less than {min_seconds:g} s")
    if max_seconds is not None and seconds > max_seconds:
        raise Unusable(f"too long: {seconds:.1f} s, more than {max_seconds:g} s")
    indices = list(range(video.num_frames)) if fps is None else resample_indices(*video.times(), fps)
    if len(indices) < min_clip_frames:
        raise Unusable(f"too short: {len(indices)} frames, fewer than {min_clip_frames}")

    clip: list[np.ndarray] = []
    small: Any = None  # thumbnail of the previous frame
    start = clips = 0
    for i, image in enumerate(_images(video, path, indices)):
        height, width = image.shape[:2]
        if i == 0:
            size = output_size(height, width, canvas, full_frame)
        crop = crop_box(height, width, *size)
        frame = _resize(image, crop, size)
        small, before = thumbnail(frame) if cut_threshold else None, small
        if len(clip) == clip_frames or (clip and cut_threshold and is_cut(before, small, cut_threshold)):
            if len(clip) >= min_clip_frames:
                clips += 1
                signal.setitimer(signal.ITIMER_REAL, 0)  # no time limit while the consumer processes the clip
                yield _header(start, clip, fps or video.fps, crop), np.stack(clip)
            start, clip = i, []
            signal.setitimer(signal.ITIMER_REAL, timeout)
        clip.append(frame)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if len(clip) >= min_clip_frames:
        clips += 1
        yield _header(start, clip, fps or video.fps, crop), np.stack(clip)
    if not clips:
        raise Unusable(f"too short: no {min_clip_frames} consecutive frames without a cut")
    yield {"num_clips": clips}, np.empty(0, np.uint8)


def _header(
    start: int, clip: list[np.ndarray], fps: float, crop: tuple[float, float, float, float]
) -> dict[str, Any]:
    height, width = clip[0].shape[:2]
    return {
        "start": start, "num_frames": len(clip), "fps": fps, "height": height, "width": width, "crop": crop
    }  # fmt: skip


# --- readers ---------------------------------------------------------------------------------------------------------


class _Decord:
    """decord reader: fast, with random access."""

    def __init__(self, path: str) -> None:
        self.reader = decord.VideoReader(path, num_threads=1, fault_tol=MAX_REPAIRED)
        self.num_frames, self.fps = len(self.reader), float(self.reader.get_avg_fps())
        self.frame_bytes = int(np.prod(self.reader[0].shape))

    def times(self) -> tuple[np.ndarray, float]:
        """Presentation times of the frames and the end of the last frame, in seconds."""
        times = self.reader.get_frame_timestamp(range(self.num_frames))
        return times[:, 0], float(times[-1, 1])

    def images(self, indices: list[int]) -> Iterator[np.ndarray]:
        """Upright uint8 RGB images `[H, W, 3]` of increasing frame indices; few are in memory at a time."""
        chunk = max(1, RAW_BYTES // self.frame_bytes)
        for i in range(0, len(indices), chunk):
            yield from self.reader.get_batch(indices[i : i + chunk]).asnumpy()


class _PyAV:
    """PyAV reader with the same interface, for long videos and for videos that decord cannot read.

    decord fails at codecs that its bundled ffmpeg lacks (AV1), at transport streams and at tiny images.
    """

    def __init__(self, path: str) -> None:
        import av  # 50% of the startup time, and rarely needed

        self.path, self.av = path, av
        with av.open(path) as container:
            stream = container.streams.video[0]
            self.fps = float(stream.average_rate or 0)
            tick = float(stream.time_base)
            self.packets = sorted(  # (presentation time, duration) in seconds
                (packet.pts * tick, (packet.duration or 0) * tick)
                for packet in container.demux(stream)
                # Frames trimmed without re-encoding stay in the file as references, marked to be discarded.
                if packet.pts is not None and not packet.is_discard
            )
        self.num_frames = len(self.packets)

    def times(self) -> tuple[np.ndarray, float]:
        last, duration = self.packets[-1]
        return np.array([time for time, _ in self.packets]), last + duration

    def images(self, indices: list[int]) -> Iterator[np.ndarray]:
        remaining = iter(indices)
        index = next(remaining, None)
        damaged = 0
        try:
            with self.av.open(self.path) as container:
                container.streams.video[0].thread_count = 1
                for i, frame in enumerate(container.decode(video=0)):
                    damaged += frame.is_corrupt
                    if i == index:
                        image = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))
                    while i == index:
                        yield np.ascontiguousarray(image)
                        index = next(remaining, None)
        except self.av.error.FFmpegError as error:
            raise Unusable(f"damaged: {error.strerror}") from None
        if index is not None:
            raise Unusable("damaged: fewer frames than the file declares")
        if damaged > MAX_REPAIRED * self.num_frames:
            raise Unusable(f"damaged: {damaged} corrupt frames")


def _open(path: str) -> _Decord | _PyAV:
    with suppress(Exception):
        video = _Decord(path)
        if video.num_frames * video.frame_bytes <= AHEAD_BYTES:
            return video
        del video  # frees the frames that it has decoded ahead
    try:
        return _PyAV(path)
    except IndexError:
        raise Unusable("not a video: no video stream") from None
    except Exception:  # both readers raise many error types
        raise Unusable("not a video, or an unsupported format") from None


def _images(video: _Decord | _PyAV, path: str, indices: list[int]) -> Iterator[np.ndarray]:
    """Read the frames. If decord fails, PyAV reads the remaining frames; it fails only if the file is damaged."""
    num_read = 0
    try:
        for image in video.images(indices):
            yield image
            num_read += 1
    except Exception:
        if not isinstance(video, _Decord):
            raise
        yield from _PyAV(path).images(indices[num_read:])


def _resize(image: np.ndarray, crop: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS, box=crop))


def _reason(error: BaseException) -> str:
    """First line of a decord error, without its timestamp, source location and stack trace."""
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
    except Exception as error:  # any error of a reader is treated as a defect of the file
        signal.setitimer(signal.ITIMER_REAL, 0)
        send({"error": str(error) if isinstance(error, Unusable) else _reason(error)})


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
