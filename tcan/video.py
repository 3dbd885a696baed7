"""Read and write videos and images as uint8 RGB arrays."""

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from tcan.atomic_write import atomic_write
from tcan.errors import UserError
from tcan.impostor import impostor
from tcan.pixels import pil_to_uint8
from tcan.video_stream import UnusableVideo, VideoStream


class VideoFrames:
    """Iterable over the frames of a video at a constant rate, upright uint8 RGB `[height, width, 3]`, square pixels.

        for frame in VideoFrames("dance.mp4"): ...

    Frames are decoded linearly, one at a time (see `tcan.video_stream`), so memory does not grow with the length of the
    video. The object can be iterated any number of times. Frame k is the one shown k / fps seconds after the first.

    Args:
        fps: resample to this rate. None: every frame once at the rate of the video, `fps`; if the rate varies, the
            video is resampled to the rate that most frames have, so that its duration is kept.

    Raises:
        UserError: the file is missing, empty, damaged, or not a video. Raised during iteration too, because damage can
            be anywhere in the file.
    """

    def __init__(self, path: str | os.PathLike, fps: float | None = None) -> None:
        self.path = _existing_file(path, "video")
        with self._user_errors():
            self._stream = VideoStream(self.path)
        self.height, self.width = self._stream.height, self._stream.width
        self._resampled = fps is not None or self._stream.variable_rate
        self.fps = fps or self._stream.fps

    @property
    def num_frames(self) -> int:
        """Number of frames that the container claims to show, at the rate `fps`."""
        return round(self._stream.seconds * self.fps) if self._resampled else self._stream.num_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        with self._user_errors():
            if self._resampled:
                yield from self._stream.resampled(self.fps)
            else:
                yield from (image for _, image in self._stream)

    @contextmanager
    def _user_errors(self) -> Iterator[None]:
        try:
            yield
        except UnusableVideo as error:
            raise UserError(f"{self.path}: cannot be read as a video ({error}); use another file") from None


def read_video(path: str | os.PathLike, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """Read all frames of a video, or the first `max_frames`: uint8 RGB `[F, H, W, 3]`, and frames per second.

    Raises:
        UserError: see `VideoFrames`.
    """
    video = VideoFrames(path)
    return np.stack(list(islice(video, max_frames))), video.fps


@dataclass(frozen=True)
class _Format:
    """A video format, by FFmpeg's names of container, codecs and pixel format."""

    container: str
    codec: str
    pixels: str
    options: dict[str, str]
    copied_audio: tuple[str, ...] = ()  # audio codecs that the container accepts without re-encoding
    audio_codec: str = ""  # re-encodes all other audio; empty: the format has no audio


FORMATS = {
    # Every player supports yuv420p. With x264's macroblock tree, the same frames give different files on CPUs with AVX-512 at many
    # sizes, such as 448 x 640, depending on the contents of freed memory.
    ".mp4": _Format(
        "mp4",
        "libx264",
        "yuv420p",
        {"crf": "16", "preset": "medium", "x264-params": "mbtree=0"},
        ("aac", "mp3"),
        "aac",
    ),
    ".webm": _Format(
        "webm",
        "libvpx-vp9",
        "yuv420p",
        {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"},
        ("opus", "vorbis"),
        "libopus",
    ),
    ".gif": _Format("gif", "gif", "pal8", {}),
}
PNG_NAME = "{:06d}.png"
ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")
"""Image formats, by their names in PIL, whose pages are frames."""


def check_target(path: str | os.PathLike, audio: bool = False) -> None:
    """Check, before any frame exists, that `write_video` can write to this path.

    Raises:
        UserError: a suffix that is not in `FORMATS`, a folder that is not empty, a format without audio although audio
            is requested, a folder that is not writable.
    """
    path = Path(path)
    form = FORMATS.get(path.suffix.lower())
    if form is None and path.suffix:
        raise UserError(
            f"{path}: unsupported suffix; use {', '.join(FORMATS)}, or no suffix for a folder of PNG images"
        )
    if audio and not (form and form.audio_codec):
        raise UserError(f"{path}: this format has no audio; use .mp4 or .webm, or disable audio")
    if path.is_dir() and (form or any(path.iterdir())):
        raise UserError(f"{path}: a folder of this name exists; choose another name or remove the folder")
    if path.is_file() and not form:
        raise UserError(
            f"{path}: a file of this name exists; choose another name for the folder of PNG images"
        )
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"{path}: cannot write the video, {folder} is not a writable folder; choose another folder"
        )


def write_video(
    frames: Iterable[np.ndarray],
    path: str | os.PathLike,
    fps: float,
    audio: str | os.PathLike | None = None,
) -> None:
    """Write frames in the format of the path's suffix: .mp4 (H.264), .webm (VP9), .gif, or, without a suffix, a folder
    of PNG images (`000000.png`, ...: lossless, without a frame rate). The path exists only after the last frame.

    Args:
        frames: uint8 RGB `[H, W, 3]` each, all of the same size. They are consumed one at a time, so a generator keeps
            memory constant. Mp4 and webm need even sizes: an odd last row or column is duplicated.
        fps: frames per second. A gif stores times in 1/100 s, which shifts its frames by up to that much.
        audio: a video whose first audio stream is copied, cut to the length of the frames. It is re-encoded only if the
            format does not support its codec. A video without audio has the same effect as None.

    Raises:
        UserError: no frames; see `check_target`; the audio cannot be read; the file cannot be written (missing folder,
            permissions, full disk).
    """
    path = Path(path)
    check_target(path, audio is not None)
    form = FORMATS.get(path.suffix.lower())
    try:
        with atomic_write(path) as partial:
            if form is None:
                count = _write_images(frames, partial)
            else:
                count = _write_movie(frames, partial, fps, form, None if audio is None else Path(audio))
            if count == 0:
                raise UserError(f"{path}: no frames to write; check the input")
    except OSError as error:  # file errors of PyAV are OSErrors
        raise UserError(
            f"{path}: cannot write the video ({error.strerror or error}); check the folder"
        ) from None


def _write_images(frames: Iterable[np.ndarray], folder: Path) -> int:
    folder.mkdir()
    count = 0
    for count, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(folder / PNG_NAME.format(count - 1))
    return count


def _write_movie(
    frames: Iterable[np.ndarray], path: Path, fps: float, form: _Format, audio: Path | None
) -> int:
    rate = Fraction(fps).limit_denominator(1001)
    muxer = {"movflags": "+faststart"} if form.container == "mp4" else {}
    count = 0
    with (
        av.open(str(path), "w", format=form.container, options=muxer) as container,
        closing(_audio_packets(container, audio, form)) as packets,
    ):
        stream = container.add_stream(form.codec, rate=rate, options=form.options)
        stream.pix_fmt = form.pixels
        palette = None
        packet = next(packets, None)  # adds the audio stream: impossible after the first image is written
        for count, frame in enumerate(frames, start=1):
            if form.pixels == "yuv420p":
                frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if form.pixels == "pal8":
                palette = palette or _Palette(image.width, image.height, rate)
                image = palette.apply(image)
            if count == 1:
                stream.height, stream.width = image.height, image.width
            image.pts, image.time_base = count - 1, 1 / rate
            container.mux(stream.encode(image))
            while packet is not None and packet.pts * packet.time_base < count / rate:
                container.mux(packet)
                packet = next(packets, None)
        if count:
            container.mux(stream.encode(None))
    return count


class _Palette:
    """Conversion of gif frames to 256 colors, chosen per frame, so that no frame has to wait for later ones."""

    def __init__(self, width: int, height: int, rate: Fraction) -> None:
        self.graph = av.filter.Graph()
        source = self.graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate)
        split = self.graph.add("split")
        colors = self.graph.add("palettegen", "stats_mode=single")
        use = self.graph.add("paletteuse", "new=1:dither=sierra2_4a")
        sink = self.graph.add("buffersink")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(colors, 1, 0)
        colors.link_to(use, 0, 1)
        use.link_to(sink)
        self.graph.configure()

    def apply(self, image: av.VideoFrame) -> av.VideoFrame:
        self.graph.push(image)
        return self.graph.pull()


def _audio_packets(
    output: av.container.OutputContainer, source: Path | None, form: _Format
) -> Generator[av.Packet, None, None]:
    """Packets of the source's first audio stream for a new stream of `output`; time 0 is the source's first image."""
    if source is None:
        return
    try:
        with av.open(str(source)) as container:
            if not container.streams.audio:
                return
            audio = container.streams.audio[0]
            begin = _first_image_time(source)
            if audio.codec_context.name in form.copied_audio:
                stream = output.add_stream_from_template(audio)
                for packet in container.demux(audio):
                    if packet.dts is not None:  # None: the empty packet at the end
                        shift = round(begin / packet.time_base)
                        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                        packet.stream = stream
                        yield packet
            else:
                stream = output.add_stream(form.audio_codec, rate=48000)
                end: float | None = None
                for frame in container.decode(audio):
                    if frame.pts is None:  # formats such as WMV give only some frames a time
                        frame.time_base = Fraction(1, frame.sample_rate)
                        time = begin if end is None else end
                    else:
                        time = float(frame.pts * frame.time_base)
                    end = time + frame.samples / frame.sample_rate
                    frame.pts = round((time - begin) / frame.time_base)
                    yield from stream.encode(frame)
                yield from stream.encode(None)
    except av.error.FFmpegError as error:
        raise UserError(f"{source}: cannot read the audio ({error.strerror}); disable audio") from None


def _first_image_time(path: Path) -> float:
    """Time of the first image on the file's clock, in seconds; 0 for audio without images."""
    try:
        return VideoStream(path).start
    except UnusableVideo:
        return 0.0


def is_image(path: str | os.PathLike) -> bool:
    """Whether a file contains an image; False for videos, animations and anything else. Further pages of other formats
    are not frames: those of a photo (MPO) are thumbnails or depth maps."""
    try:
        with Image.open(path) as image:
            return image.format not in ANIMATIONS or getattr(image, "n_frames", 1) == 1
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        return False


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image as uint8 RGB `[H, W, 3]`; see `tcan.pixels.pil_to_uint8`.

    Raises:
        UserError: the file is missing, empty, damaged, or not an image; see `pil_to_uint8`.
    """
    path = _existing_file(path, "image")
    try:
        with Image.open(path) as image:
            return pil_to_uint8(image, str(path))
    except Image.DecompressionBombError:
        raise UserError(
            f"{path}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels; scale the image down"
        ) from None
    except (UnidentifiedImageError, OSError, SyntaxError):
        found = impostor(path, "an image")
        raise UserError(
            f"{path}: {found or 'cannot be read as an image (damaged or unsupported format); use another file'}"
        ) from None


def write_image(image: np.ndarray, path: str | os.PathLike) -> None:
    """Write uint8 RGB `[H, W, 3]` atomically, in the format of the path's suffix.

    Raises:
        UserError: a suffix that is not an image format, or a folder that is not writable.
    """
    path = Path(path)
    if path.is_dir() or Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{path}: not the name of an image file; use a name such as clips.png")
    try:
        with atomic_write(path) as partial:
            Image.fromarray(image).save(partial)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the image ({error.strerror or error}); check the folder"
        ) from None


def _existing_file(path: str | os.PathLike, kind: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: {'a folder, not a file' if path.is_dir() else f'no such {kind}'}; check the path"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty file; use another {kind}")
    return path
