"""Linear decoding of videos: every frame as `ffmpeg` shows it, with its time. All jobs read videos with `VideoStream`.

decord reads short, ordinary mp4 and Matroska files, frame after frame. It never seeks, because its seeking returns wrong
frames in many files. PyAV reads all others: decord decodes ahead of its reader without a limit, blocks on frames that a
header declares but the file lacks, and ignores edit lists, aspect ratios, mirroring, interlacing and HDR.

The decoder processes of preprocessing import this module, so it does not import torch.
"""

import io
import logging
import os
import struct
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import decord
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter
from PIL import ExifTags, Image, UnidentifiedImageError

from tcan.crop import fit_image
from tcan.impostor import impostor
from tcan.timestamps import Clock, constant_rate, resample

AHEAD_BYTES = 512 * 2**20
"""Decoded size of the longest video that decord reads."""
THREADS = 1
"""With several threads, the frames of a damaged or truncated file depend on their number, and so on the machine: frame
threads lose frames at a damaged packet, slice threads switch the error concealment off."""
MAX_CORRUPT = 0.1
"""Maximum fraction of frames that the decoder marks as corrupt."""
MAX_RATIO = 4
"""Pixels that a header claims to be wider or taller than this are taken as square."""
DECORD_FORMATS = ("mov,mp4", "matroska")
DECORD_CODECS = ("h264", "hevc")
HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions by their code in ITU-T H.273: SMPTE 2084, ARIB STD-B67."""
BT709 = 1
MATRICES = (0, 1, 2, 3, 4, 5, 6, 7, 9)
"""Color matrices that swscale converts, by their code in ITU-T H.273; others, such as YCgCo, are converted as BT.2020."""

logger = logging.getLogger(__name__)


class UnusableVideo(Exception):
    """The frames cannot be used; the message is the reason."""


@dataclass(frozen=True)
class _Header:
    """Properties of the container and its main video stream, read without decoding."""

    times: list[float]  # of the shown packets in seconds, increasing
    last_duration: float  # of the last packet in seconds; 0: unknown
    declared: int  # frames in the header, without those that the edit list hides; 0: unknown
    plain: bool  # every packet has a time, none is hidden, the first is a keyframe, the header counts all of them
    rates: list[Fraction]  # frame rates that the header claims
    ratio: Fraction  # width of a stored pixel / height
    discontinuous: bool  # the clock may jump
    codec: str
    container: str
    exif: int = 1  # EXIF orientation of the first frame, if it is a JPEG image


class VideoStream:
    """Frames of a video: upright uint8 RGB `[height, width, 3]` with square pixels, all of the same size.

        for time, image in VideoStream("dance.mp4"): ...

    Iteration yields every frame once, with its time in seconds after the first frame; `resampled` yields frames at a
    constant rate. Both decode linearly, one frame at a time, and can be repeated. Interlaced frames are deinterlaced
    (yadif), HDR is tone-mapped to BT.709. `warnings` is complete after an iteration.

    Attributes:
        height, width: size in pixels. If the frames have different sizes, all are fitted to the first one.
        fps: frames per second.
        variable_rate: whether the times differ from every constant rate by more than `timestamps.MAX_DRIFT` frames. Then
            `fps` is the rate that most frames have.
        num_frames: number of frames that the container claims to show.
        seconds: duration by the container's time stamps.
        start: time of the first frame on the file's clock, in seconds.

    Raises:
        UnusableVideo: not a video, without a decodable frame, or, at the end of an iteration, with more than MAX_CORRUPT
            corrupt frames.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = str(path)
        self.warnings: list[str] = []
        self._by_decord, self.start = False, 0.0
        self._pages = _animated_webp(self.path)
        self._header = self._pages or _read_header(self.path)
        times, last = self._header.times, self._header.last_duration
        self.num_frames = len(times)
        self.fps, self.variable_rate = constant_rate(times, last, self._header.rates)
        self.seconds = (times[-1] - times[0] + (last or 1 / self.fps)) if times else 0.0
        if self._pages:
            with Image.open(self.path) as image:
                self.width, self.height = image.size
        else:
            self._inspect_first_frame()

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        frames = self._webp if self._pages else self._decord if self._by_decord else self._pyav
        count = 0
        for time, image in frames():
            count += 1
            if image.shape[:2] != (self.height, self.width):
                self._warn(f"the frame size changes; all frames are fitted to {self.width} x {self.height}")
                image = fit_image(np.ascontiguousarray(image), self.height, self.width)
            yield time, np.ascontiguousarray(image)
        if not count:
            raise UnusableVideo("no frame can be decoded")
        if self._header.declared not in (0, count):
            self._warn(
                f"the header declares {self._header.declared} frames, but {count} can be decoded; using these"
            )

    def resampled(self, fps: float) -> Iterator[np.ndarray]:
        """Yield at frame k the image shown k / fps seconds after the first frame: repeats or skips frames."""
        return resample(self, fps, self._header.last_duration)

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)
            logger.warning("%s: %s", self.path, message)

    def _inspect_first_frame(self) -> None:
        """Set the size and the start, and choose the decoder."""
        header = self._header
        with closing(self._decoded()) as frames:
            time, first = next(frames, (None, None))
        if first is None:
            raise UnusableVideo("no frame can be decoded")
        self.start = time or 0.0
        self.height, self.width = _to_rgb(first, header, VideoReformatter()).shape[:2]
        if first.color_trc in HDR:
            self._warn(f"HDR ({HDR[first.color_trc]}); tone-mapped to BT.709")
        if first.colorspace not in MATRICES:
            self._warn(f"color matrix {int(first.colorspace)} is not supported; converted as BT.2020")
        self._by_decord = (
            header.plain
            and header.container.startswith(DECORD_FORMATS)
            and header.codec in DECORD_CODECS
            and header.ratio == 1
            and first.format.name == "yuv420p"
            and first.color_trc not in HDR
            and not _is_rotated(first)
            and len(header.times) * self.height * self.width * 3 <= AHEAD_BYTES
            and self._keyframes_are_alike()
        )

    def _keyframes_are_alike(self) -> bool:
        """Whether all keyframes are progressive and of one size; decord would stretch others."""
        with suppress(UnusableVideo), closing(self._decoded(keyframes=True)) as frames:
            return (
                len(
                    {(frame.width, frame.height, frame.interlaced_frame) for _, frame in frames}
                    | {(self.width, self.height, False)}
                )
                == 1
            )
        return False

    def _decoded(self, keyframes: bool = False) -> Generator[tuple[float | None, av.VideoFrame], None, None]:
        """Time on the file's clock and decoded frame, stored size and orientation."""
        try:
            with av.open(self.path) as container:
                stream = main_stream(container)
                stream.thread_count = THREADS
                if keyframes:
                    stream.codec_context.skip_frame = "NONKEY"
                best = _BestTime()
                for packet in container.demux(stream):
                    with suppress(
                        av.error.InvalidDataError
                    ):  # ffmpeg continues after a packet that cannot be decoded
                        for frame in packet.decode():
                            ticks = best(frame.pts, frame.dts)
                            yield (None if ticks is None else float(ticks * stream.time_base)), frame
        except av.error.EOFError:
            return
        except av.error.FFmpegError as error:
            raise UnusableVideo(f"damaged: {error.strerror}") from None

    def _pyav(self) -> Iterator[tuple[float, np.ndarray]]:
        count = corrupt = 0
        clock = Clock(1 / self.fps, self._header.discontinuous)
        # One for all frames: preparing the tone mapping takes seconds, and `frame.reformat` does it for every frame.
        reformatter = VideoReformatter()
        frames = ((clock(time), frame) for time, frame in self._decoded())
        for time, frame in self._deinterlaced(frames):
            count, corrupt = count + 1, corrupt + frame.is_corrupt
            yield time, _to_rgb(frame, self._header, reformatter)
        if corrupt > max(1, MAX_CORRUPT * count):
            raise UnusableVideo(f"damaged: {corrupt} of {count} frames are corrupt")

    def _deinterlaced(
        self, frames: Iterable[tuple[float, av.VideoFrame]]
    ) -> Iterator[tuple[float, av.VideoFrame]]:
        """Pass frames from the first interlaced one on through yadif, which delays them by one frame."""
        graph, layout, waiting = None, None, deque[float]()
        for time, frame in frames:
            new_layout = (frame.width, frame.height, frame.format.name)
            if graph and new_layout != layout:
                yield from _drain(graph, waiting)
                graph = None
            if graph is None and frame.interlaced_frame:
                self._warn("interlaced; deinterlaced with yadif")
                graph, layout = _yadif(frame), new_layout
            if graph is None:
                yield time, frame
                continue
            waiting.append(time)
            graph.vpush(frame)
            yield from _pull(graph, waiting)
        if graph:
            yield from _drain(graph, waiting)

    def _decord(self) -> Iterator[tuple[float, np.ndarray]]:
        """Frames by decord; if it fails, PyAV reads the remaining ones."""
        times, count = self._header.times, 0
        with suppress(decord.DECORDError, RuntimeError, StopIteration):
            reader = decord.VideoReader(self.path, num_threads=THREADS)
            for time in times if len(reader) == len(times) else ():
                image = reader.next().asnumpy()
                if image.shape != (
                    self.height,
                    self.width,
                    3,
                ):  # decord returns padded narrow frames as 4 channels
                    break
                count += 1
                yield time - times[0], image
        if count < len(times):
            self._by_decord = False
            yield from islice(self._pyav(), count, None)

    def _webp(self) -> Iterator[tuple[float, np.ndarray]]:
        with Image.open(self.path) as image:
            for number, time in enumerate(self._header.times):
                image.seek(number)
                yield time, np.array(image.convert("RGB"))


def main_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The video stream that ffmpeg chooses: the largest one that is not a cover image. A stream of one frame, such as the
    still image of an animated AVIF, is the last choice.

    Raises:
        UnusableVideo: no video stream.
    """
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise UnusableVideo("not a video: no video stream")
    default = av.stream.Disposition.default
    return max(
        streams,
        key=lambda s: (s.frames != 1, s.width * s.height + 5_000_000 * bool(s.disposition & default)),
    )


def _read_header(path: str) -> _Header:
    try:
        with av.open(path) as container:
            stream = main_stream(container)
            packets: list[tuple] = []
            exif = 1
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                if not packets and stream.codec_context.name == "mjpeg":
                    exif = _exif_orientation(bytes(packet))
                packets.append(
                    (packet.pts, packet.dts, packet.duration, packet.is_discard, packet.is_keyframe)
                )
            tick = float(stream.time_base)
            return replace(_header(packets, tick, stream, container.format), exif=exif)
    except av.error.FFmpegError:
        found = impostor(Path(path), "a video")
        raise UnusableVideo(
            found.partition(";")[0] if found else "not a video, or an unsupported format"
        ) from None


def _exif_orientation(jpeg: bytes) -> int:
    with suppress(UnidentifiedImageError, OSError, SyntaxError), Image.open(io.BytesIO(jpeg)) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _header(packets: list[tuple], tick: float, stream: av.VideoStream, form: av.ContainerFormat) -> _Header:
    shown = [packet for packet in packets if not packet[3]]
    times = [pts for pts, *_ in shown]
    complete = None not in times and len(set(times)) == len(times)
    discontinuous = bool(form.flags & av.format.Flags.ts_discont.value)
    if complete and not discontinuous:
        times.sort()
    else:  # decoding times increase
        rate = stream.average_rate or stream.guessed_rate or 25
        clock = Clock(float(1 / rate), discontinuous)
        known = [dts if dts is not None else pts for pts, dts, *_ in shown]
        times = [clock(None if time is None else time * tick) / tick for time in known]
    hidden = len(packets) - len(shown)
    ratio = stream.sample_aspect_ratio or Fraction(1)
    rates = (stream.average_rate, stream.base_rate, stream.guessed_rate)
    return _Header(
        times=[time * tick for time in times],
        last_duration=(shown[-1][2] or 0) * tick if shown else 0.0,
        declared=max(0, stream.frames - hidden),
        plain=complete
        and not hidden
        and bool(packets)
        and packets[0][4]
        and stream.frames in (0, len(packets)),
        rates=[rate for rate in rates if rate],
        ratio=ratio if Fraction(1, MAX_RATIO) <= ratio <= MAX_RATIO else Fraction(1),
        discontinuous=discontinuous,
        codec=stream.codec_context.name,
        container=form.name,
    )


def _animated_webp(path: str) -> _Header | None:
    """Times of the pages of an animated WebP, which FFmpeg does not decode; None for any other file."""
    with open(path, "rb") as file:
        if file.read(16)[8:] != b"WEBPVP8X":
            return None
    with Image.open(path) as image:
        times, now, duration = [], 0.0, 0.0
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            times.append(now)
            duration = image.info.get("duration", 0) / 1000
            now += duration
    return _Header(times, duration, len(times), False, [], Fraction(1), False, "webp", "webp")


class _BestTime:
    """A frame's time in ticks: the presentation time, or the decoding time if that is missing or less monotonic.

    The same choice as FFmpeg's `best_effort_timestamp`, which PyAV does not expose.
    """

    def __init__(self) -> None:
        self.last: list[int | None] = [None, None]
        self.faults = [0, 0]

    def __call__(self, pts: int | None, dts: int | None) -> int | None:
        for i, value in enumerate((pts, dts)):
            last = self.last[i]
            if value is not None:
                self.faults[i] += last is not None and value <= last
                self.last[i] = value
        if pts is not None and (dts is None or self.faults[0] <= self.faults[1]):
            return pts
        return dts


def _to_rgb(frame: av.VideoFrame, header: _Header, reformatter: VideoReformatter) -> np.ndarray:
    """Upright uint8 RGB `[H, W, 3]` with square pixels."""
    height, width, ratio = frame.height, frame.width, header.ratio
    width, height = (round(width * ratio), height) if ratio >= 1 else (width, round(height / ratio))
    options: dict[str, int] = {}
    if frame.color_trc in HDR:
        options |= {"dst_color_trc": BT709, "dst_color_primaries": BT709}
    if frame.colorspace not in MATRICES:
        options |= {"src_colorspace": Colorspace.BT2020, "dst_colorspace": Colorspace.BT2020}
    converted = reformatter.reformat(
        frame, width, height, "rgb24", interpolation="BICUBIC", threads=1, **options
    )
    return _upright(converted.to_ndarray(), frame, header.exif)


def _is_rotated(frame: av.VideoFrame) -> bool:
    with suppress(ValueError):
        return frame.side_data.get("DISPLAYMATRIX") is not None
    return frame.rotation != 0


def _upright(image: np.ndarray, frame: av.VideoFrame, exif: int) -> np.ndarray:
    """Apply a frame's display matrix (ISO 14496-12, 6.2.2): nine int32; x' = a x + c y, y' = b x + d y."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV cannot list side data of a kind that it does not know, such as EXIF
        if exif not in range(2, 9):
            return np.rot90(image, frame.rotation // 90)
        image = image.swapaxes(0, 1) if exif > 4 else image
        return image[:: -1 if exif in (3, 4, 7, 8) else 1, :: -1 if exif in (2, 3, 6, 7) else 1]
    if matrix is None:
        return image
    a, b, _, c, d = struct.unpack("<9i", bytes(matrix))[:5]
    if abs(a) + abs(d) < abs(b) + abs(c):
        image, x, y = image.swapaxes(0, 1), c, b
    else:
        x, y = a, d
    return image[:: -1 if y < 0 else 1, :: -1 if x < 0 else 1]


def _yadif(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    graph.link_nodes(source, graph.add("yadif", "deint=interlaced"), graph.add("buffersink")).configure()
    return graph


def _pull(graph: av.filter.Graph, times: deque[float]) -> Iterator[tuple[float, av.VideoFrame]]:
    with suppress(BlockingIOError, av.error.EOFError):
        while True:
            frame = graph.vpull()
            yield times.popleft(), frame


def _drain(graph: av.filter.Graph, times: deque[float]) -> Iterator[tuple[float, av.VideoFrame]]:
    graph.vpush(None)
    yield from _pull(graph, times)
