"""Videos and images on disk <-> uint8 RGB arrays."""

import os
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tcan.errors import UserError


class VideoFrames:
    """A video's frames in order, uint8 RGB `[height, width, 3]`, turned as the file says: decoded one at a time as they
    are asked for, so that memory holds those in use; it can be gone through any number of times.

        for frame in VideoFrames("dance.mp4"): ...

    `fps` are its frames per second. PyAV rather than decord, which can wait without end for frames that a damaged
    file's header claims.

    Raises:
        UserError: the file is missing, empty, damaged, or no video; while going through it too, since damage may lie
            anywhere in it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = _existing_file(path, "video")
        with self._opened() as (_, stream):
            self.fps = float(stream.average_rate or 0)
        first = next(iter(self), None)
        if first is None or not self.fps:
            raise self._unusable()
        self.height, self.width = first.shape[:2]

    def __iter__(self) -> Iterator[np.ndarray]:
        with self._opened() as (container, stream):
            count, shape = 0, None
            for frame in container.decode(stream):
                image = _upright(frame)
                if image.shape != (shape or image.shape):
                    raise UserError(f"{self.path}: its frames are of several sizes; give a video of one size")
                count, shape = count + 1, image.shape
                yield image
            if count < 0.99 * stream.frames:
                raise self._unusable()

    @contextmanager
    def _opened(self) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                yield container, stream
        except (av.error.FFmpegError, IndexError):  # IndexError: sound without images
            raise self._unusable() from None

    def _unusable(self) -> UserError:
        return UserError(
            f"{self.path}: cannot be read as a video (damaged or another format); give another file"
        )


def read_video(path: str | os.PathLike, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """All frames of a video at once, or its first `max_frames`: `[F, H, W, 3]`, and frames per second.

    Raises:
        UserError: as `VideoFrames`.
    """
    video = VideoFrames(path)
    return np.stack(list(islice(video, max_frames))), video.fps


@dataclass(frozen=True)
class _Format:
    """How a file of moving images is made: FFmpeg's names of container and codecs."""

    container: str
    codec: str
    pixels: str
    options: dict[str, str]
    kept_sounds: tuple[str, ...] = ()  # codecs of sound that the container takes as they are
    sound: str = ""  # the codec for all others


FORMATS = {
    # yuv420p, which every player knows
    ".mp4": _Format("mp4", "libx264", "yuv420p", {"crf": "16", "preset": "medium"}, ("aac", "mp3"), "aac"),
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


def check_target(path: str | os.PathLike, sound: bool = False) -> None:
    """That `write_video` can write this, as far as that can be known before there is a frame.

    Raises:
        UserError: a name that is none of `FORMATS` nor a folder's, a folder that holds something already, a format that
            can't hold the sound asked for, a place where nothing can be written.
    """
    path = Path(path)
    form = FORMATS.get(path.suffix.lower())
    if form is None and path.suffix:
        raise UserError(
            f"{path}: name it {', '.join(FORMATS)}, or without a suffix for a folder of PNG images"
        )
    if sound and not (form and form.sound):
        raise UserError(f"{path}: cannot hold sound; name it .mp4 or .webm, or leave out the sound")
    if path.is_dir() and (form or any(path.iterdir())):
        raise UserError(f"{path}: a folder that is there already; name another, or remove it")
    if path.is_file() and not form:
        raise UserError(f"{path}: a file that is there already; name another for the folder of PNG images")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{path}: cannot write the video: {folder} is no folder that can be written to")


def write_video(
    frames: Iterable[np.ndarray],
    path: str | os.PathLike,
    fps: float,
    sound: str | os.PathLike | None = None,
) -> None:
    """Writes frames as the path's suffix says: .mp4 (H.264), .webm (VP9), .gif, or, without a suffix, a folder of PNG
    (`000000.png`, ...: exact, without the frame rate). It appears under its name when it is whole.

    Args:
        frames: uint8 RGB `[H, W, 3]` each, all of one size; taken one at a time, so a generator needs no memory.
            Mp4 and webm want even sizes: the last row or column is repeated where one is odd.
        fps: a gif holds hundredths of a second, so its frames may be shown that much earlier or later.
        sound: a video whose sound is copied, as far as the frames last; encoded anew only where the format can't hold
            it as it is. One without sound is as good as None.

    Raises:
        UserError: no frame; as `check_target`; the sound can't be read; the file cannot be written (no such folder, no
            right, full disk).
    """
    path = Path(path)
    check_target(path, sound is not None)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    form = FORMATS.get(path.suffix.lower())
    try:
        if form is None:
            count = _write_images(frames, partial)
        else:
            count = _write_movie(frames, partial, fps, form, None if sound is None else Path(sound))
        if count == 0:
            raise UserError(f"{path}: no frame to write")
        os.replace(partial, path)
    except OSError as error:  # av's own errors of files are OSErrors too
        raise UserError(
            f"{path}: cannot write the video ({error.strerror or error}); check the folder"
        ) from None
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _write_images(frames: Iterable[np.ndarray], folder: Path) -> int:
    folder.mkdir()
    count = 0
    for count, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(folder / PNG_NAME.format(count - 1))
    return count


def _write_movie(
    frames: Iterable[np.ndarray], path: Path, fps: float, form: _Format, sound: Path | None
) -> int:
    rate = Fraction(fps).limit_denominator(1001)
    muxer = {"movflags": "+faststart"} if form.container == "mp4" else {}
    count = 0
    with (
        av.open(str(path), "w", format=form.container, options=muxer) as container,
        closing(_sound_packets(container, sound, form)) as packets,
    ):
        stream = container.add_stream(form.codec, rate=rate, options=form.options)
        stream.pix_fmt = form.pixels
        palette = None
        packet = next(packets, None)  # now, since a file's streams are fixed by its first image
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
    """The 256 colours of each frame of a gif, chosen for it alone, so that no frame waits for those after it."""

    def __init__(self, width: int, height: int, rate: Fraction) -> None:
        self.graph = av.filter.Graph()
        source = self.graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate)
        split = self.graph.add("split")
        colours = self.graph.add("palettegen", "stats_mode=single")
        use = self.graph.add("paletteuse", "new=1:dither=sierra2_4a")
        sink = self.graph.add("buffersink")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(colours, 1, 0)
        colours.link_to(use, 0, 1)
        use.link_to(sink)
        self.graph.configure()

    def apply(self, image: av.VideoFrame) -> av.VideoFrame:
        self.graph.push(image)
        return self.graph.pull()


def _sound_packets(
    output: av.container.OutputContainer, source: Path | None, form: _Format
) -> Generator[av.Packet, None, None]:
    """The packets of the source's first sound, for a new stream of `output`, by time from the source's first image."""
    if source is None:
        return
    try:
        with av.open(str(source)) as container:
            if not container.streams.audio:
                return
            taken = container.streams.audio[0]
            begin = 0.0
            if container.streams.video and (first := container.streams.video[0]).start_time:
                begin = float(first.start_time * first.time_base)
            if taken.codec_context.name in form.kept_sounds:
                stream = output.add_stream_from_template(taken)
                for packet in container.demux(taken):
                    if packet.dts is not None:  # the last, empty one has none
                        shift = round(begin / packet.time_base)
                        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                        packet.stream = stream
                        yield packet
            else:
                stream = output.add_stream(form.sound, rate=48000)
                for frame in container.decode(taken):
                    frame.pts -= round(begin / frame.time_base)
                    yield from stream.encode(frame)
                yield from stream.encode(None)
    except av.error.FFmpegError as error:
        raise UserError(
            f"{source}: its sound cannot be read ({error.strerror}); leave out the sound"
        ) from None


def is_image(path: str | os.PathLike) -> bool:
    """Whether a file holds one image, rather than a video, an animated gif, or something else."""
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) == 1
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        return False


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A image as uint8 RGB `[H, W, 3]`, turned as its EXIF orientation says; transparent parts become white.

    Raises:
        UserError: the file is missing, empty, damaged, or no image.
    """
    path = _existing_file(path, "image")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        raise UserError(
            f"{path}: cannot be read as a image (damaged or another format); give another file"
        ) from None
    white = Image.new("RGBA", upright.size, "white")
    return np.array(Image.alpha_composite(white, upright).convert("RGB"))


def write_image(image: np.ndarray, path: str | os.PathLike) -> None:
    """Writes uint8 RGB `[H, W, 3]` in the format of the path's suffix; the file appears when it is whole.

    Raises:
        UserError: a name that is no image's, or a folder that can't be written to.
    """
    path = Path(path)
    if path.is_dir() or Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{path}: must name a image, such as clips.png")
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        Image.fromarray(image).save(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the image ({error.strerror or error}); check the folder"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def crop_box(
    source_height: int, source_width: int, height: int, width: int
) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1): the largest centred box of a source image with the canvas's proportions, in source pixels."""
    scale = min(source_height / height, source_width / width)
    x0, y0 = (source_width - width * scale) / 2, (source_height - height * scale) / 2
    return x0, y0, x0 + width * scale, y0 + height * scale


def fit_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image's `crop_box` at the canvas's size: uint8 RGB `[H, W, 3]` -> `[height, width, 3]`."""
    if image.shape[:2] == (height, width):
        return image
    box = crop_box(image.shape[0], image.shape[1], height, width)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box=box))


def fit_keypoints(
    keypoints: np.ndarray, source_height: int, source_width: int, height: int, width: int
) -> np.ndarray:
    """Keypoints `[..., 18, 3]` in source pixels -> where `fit_image` puts them; a joint not found stays at 0."""
    x0, y0, x1, y1 = crop_box(source_height, source_width, height, width)
    fitted = keypoints.copy()
    fitted[..., 0] = (keypoints[..., 0] - x0) * width / (x1 - x0)
    fitted[..., 1] = (keypoints[..., 1] - y0) * height / (y1 - y0)
    return np.where(keypoints[..., 2:] > 0, fitted, 0).astype(np.float32)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))


def _existing_file(path: str | os.PathLike, kind: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a' if path.is_dir() else 'no such'} {kind}; check the path")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty file; give a {kind}")
    return path
