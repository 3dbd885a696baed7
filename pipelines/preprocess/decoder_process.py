"""The process that decodes: `decode.py` starts it, asks it for one video after another and reads what is sent.

decord can wait without end, holding the GIL, for frames that a header claims and the file lacks; it can crash, and it
keeps memory. So each video has a process of its own, forked from this one, which has imported decord already. Its
time limit is a timer of the kernel with the signal's default action, which ends the process whatever the interpreter is
doing, and also when the parent is gone.

decord also decodes ahead of its reader, up to the video's end if the reader is slow, as pose network and VAE are: a long
video would fill the memory. PyAV, which does not, reads those.

A request comes on the socket that is standard input: the arguments of `decode` as JSON, and where to send: messages of a
line of JSON and then as many bytes as its "bytes" says. The answer, when all is sent, is the status that the video's
process ended with.
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

REQUEST_BYTES = 2**16  # at most: a path has 4096
RAW_BYTES = 16 * 2**20  # of source images taken from decord at once
AHEAD_BYTES = 512 * 2**20  # of a video's images that decord may hold
GRID = 8  # pixels: the sides of what is sent are multiples, as the VAE takes them
WIDEST = 3  # times as long as wide: what is more of a whole image is left out, so that memory stays bounded
CUT_SIZE = (32, 32)  # enough to see a cut
MAX_REPAIRED = 0.01  # share of frames that decord may fill with their neighbours before it gives up


class Unusable(Exception):
    """The video is not one to use; the message is the reason."""


def frame_numbers(shown_at: np.ndarray, end: float, fps: float) -> list[int]:
    """The source's frame that is to be seen at each frame time of the resampled video; a higher fps than the source's
    repeats, and how long each frame of a variable frame rate stays is kept.

    shown_at: seconds at which each of the source's frames appears, rising. end: when the last one goes.
    """
    count = max(1, round((end - shown_at[0]) * fps))
    times = shown_at[0] + np.arange(count) / fps
    late = 1e-3  # times are rounded in the file
    return (np.searchsorted(shown_at, times + late, side="right") - 1).tolist()


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Hue, saturation and brightness, int16 `CUT_SIZE` + [3], of an RGB image."""
    small = Image.fromarray(image).resize(CUT_SIZE, Image.Resampling.BOX)
    return np.asarray(small.convert("HSV"), np.int16)


def is_cut(before: np.ndarray, after: np.ndarray, threshold: float) -> bool:
    """Whether hue, saturation and brightness change by more than `threshold` (0 to 255) on average from one thumbnail to
    the next, as PySceneDetect's content detector finds cuts."""
    change = np.abs(before - after)
    change[..., 0] = np.minimum(change[..., 0], 256 - change[..., 0])  # hue is an angle
    return float(change.mean()) > threshold


def sent_size(height: int, width: int, canvas: int, whole: bool) -> tuple[int, int]:
    """Height and width of what is sent of a image: its centred square at the canvas's side, or, whole, all of it with
    the canvas's side as its shorter one."""
    if not whole:
        return canvas, canvas
    longer = min(canvas * max(height, width) // min(height, width), canvas * WIDEST) // GRID * GRID
    return (canvas, longer) if width > height else (longer, canvas)


def centred_box(height: int, width: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box of a image with the proportions of `size` (height, width): (x0, y0, x1, y1) in pixels."""
    scale = min(height / size[0], width / size[1])
    x0, y0 = (width - size[1] * scale) / 2, (height - size[0] * scale) / 2
    return x0, y0, x0 + size[1] * scale, y0 + size[0] * scale


def decode(
    path: str,
    canvas: int,
    timeout: float,
    clip_frames: int,
    min_clip_frames: int,
    whole: bool = False,
    fps: float | None = None,
    cut_threshold: float = 0.0,
    min_seconds: float = 0.0,
    max_seconds: float | None = None,
) -> Iterator[tuple[dict, np.ndarray]]:
    """A header and uint8 RGB frames [F, H, W, 3] for each clip, in order; H and W as `sent_size` says, the same in all.

    fps: resample to this; None: every frame as it comes. cut_threshold: clips end where the scene is cut (`is_cut`); 0: cuts are not looked for.
    min_seconds, max_seconds: of the whole video.
    """
    signal.setitimer(signal.ITIMER_REAL, timeout)
    video = _open(path)
    if not (np.isfinite(video.fps) and video.fps > 0):
        raise Unusable("has no frame rate")
    seconds = video.num_frames / video.fps
    if seconds < min_seconds:
        raise Unusable(f"too short: {seconds:.1f} s, less than {min_seconds:g} s")
    if max_seconds is not None and seconds > max_seconds:
        raise Unusable(f"too long: {seconds:.1f} s, more than {max_seconds:g} s")
    numbers = list(range(video.num_frames)) if fps is None else frame_numbers(*video.times(), fps)
    if len(numbers) < min_clip_frames:
        raise Unusable(f"too short: {len(numbers)} frames, fewer than {min_clip_frames}")

    clip: list[np.ndarray] = []
    small: Any = None  # of the frame before
    start = clips = 0
    for i, image in enumerate(_images(video, path, numbers)):
        height, width = image.shape[:2]
        if i == 0:
            size = sent_size(height, width, canvas, whole)
        crop = centred_box(height, width, size)
        frame = _resize(image, crop, size)
        small, before = thumbnail(frame) if cut_threshold else None, small
        if len(clip) == clip_frames or (clip and cut_threshold and is_cut(before, small, cut_threshold)):
            if len(clip) >= min_clip_frames:
                clips += 1
                signal.setitimer(signal.ITIMER_REAL, 0)  # the reader of clips may take its time
                yield _header(start, clip, fps or video.fps, crop), np.stack(clip)
            start, clip = i, []
            signal.setitimer(signal.ITIMER_REAL, timeout)
        clip.append(frame)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if len(clip) >= min_clip_frames:
        clips += 1
        yield _header(start, clip, fps or video.fps, crop), np.stack(clip)
    if not clips:
        raise Unusable(f"too short: no {min_clip_frames} frames without a cut")
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
    """The video as decord reads it: fast, at any frame."""

    def __init__(self, path: str) -> None:
        self.reader = decord.VideoReader(path, num_threads=1, fault_tol=MAX_REPAIRED)
        self.num_frames, self.fps = len(self.reader), float(self.reader.get_avg_fps())
        self.frame_bytes = int(np.prod(self.reader[0].shape))

    def times(self) -> tuple[np.ndarray, float]:
        """Seconds at which the frames appear, and at which the last one goes."""
        times = self.reader.get_frame_timestamp(range(self.num_frames))
        return times[:, 0], float(times[-1, 1])

    def images(self, numbers: list[int]) -> Iterator[np.ndarray]:
        """uint8 RGB [H, W, 3] of these frames, rising, upright; few are held at a time."""
        chunk = max(1, RAW_BYTES // self.frame_bytes)
        for i in range(0, len(numbers), chunk):
            yield from self.reader.get_batch(numbers[i : i + chunk]).asnumpy()


class _PyAV:
    """The same for long videos and for what decord fails at: what its own ffmpeg does not know (AV1), transport streams,
    tiny images."""

    def __init__(self, path: str) -> None:
        import av  # half of a decoder's start, and seldom needed

        self.path, self.av = path, av
        with av.open(path) as container:
            stream = container.streams.video[0]
            self.fps = float(stream.average_rate or 0)
            tick = float(stream.time_base)
            self.packets = sorted(  # seconds: (shown at, for)
                (packet.pts * tick, (packet.duration or 0) * tick)
                for packet in container.demux(stream)
                # What was cut off without encoding anew is there, for what refers to it, but isn't to be shown.
                if packet.pts is not None and not packet.is_discard
            )
        self.num_frames = len(self.packets)

    def times(self) -> tuple[np.ndarray, float]:
        last, duration = self.packets[-1]
        return np.array([time for time, _ in self.packets]), last + duration

    def images(self, numbers: list[int]) -> Iterator[np.ndarray]:
        wanted = iter(numbers)
        number = next(wanted, None)
        damaged = 0
        try:
            with self.av.open(self.path) as container:
                container.streams.video[0].thread_count = 1
                for i, frame in enumerate(container.decode(video=0)):
                    damaged += frame.is_corrupt
                    if i == number:
                        image = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))
                    while i == number:
                        yield np.ascontiguousarray(image)
                        number = next(wanted, None)
        except self.av.error.FFmpegError as error:
            raise Unusable(f"damaged: {error.strerror}") from None
        if number is not None:
            raise Unusable("damaged: fewer images than the file says it has")
        if damaged > MAX_REPAIRED * self.num_frames:
            raise Unusable(f"damaged: {damaged} of its images")


def _open(path: str) -> _Decord | _PyAV:
    with suppress(Exception):
        video = _Decord(path)
        if video.num_frames * video.frame_bytes <= AHEAD_BYTES:
            return video
        del video  # with what it has decoded ahead by now
    try:
        return _PyAV(path)
    except IndexError:
        raise Unusable("not a video: holds no images") from None
    except Exception:  # both readers' errors are many
        raise Unusable("not a video that can be read") from None


def _images(video: _Decord | _PyAV, path: str, numbers: list[int]) -> Iterator[np.ndarray]:
    """Of the reader that opened it; from where decord fails, of PyAV, which says whether the file is at fault."""
    done = 0
    try:
        for image in video.images(numbers):
            yield image
            done += 1
    except Exception:
        if not isinstance(video, _Decord):
            raise
        yield from _PyAV(path).images(numbers[done:])


def _resize(image: np.ndarray, crop: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS, box=crop))


def _reason(error: BaseException) -> str:
    """decord's message without time, place in its sources and stack: its own words only."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", lines[0]).strip()[:200]


def send_clips(request: dict[str, Any], output: BinaryIO) -> None:
    def send(header: dict, payload: bytes | memoryview = b"") -> None:
        output.write(json.dumps(header | {"bytes": len(payload)}).encode() + b"\n")
        output.write(payload)
        output.flush()

    try:
        for header, frames in decode(**request):
            send(header, frames.data.cast("B"))
    except BrokenPipeError:
        pass
    except Exception as error:  # whatever decord makes of a file is a property of the file
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
                    os._exit(0)  # decord's destructors may wait too
                finally:
                    os._exit(1)
        _, status = os.waitpid(child, 0)
        requests.send(str(os.waitstatus_to_exitcode(status)).encode())


if __name__ == "__main__":
    main()
