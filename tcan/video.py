"""Videos and pictures on disk <-> uint8 RGB arrays."""

import os
from collections.abc import Iterable
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tcan.errors import UserError


def read_video(path: str | os.PathLike, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """All frames of a video, or its first `max_frames`.

    PyAV rather than decord, which can wait without end for frames that a damaged file's header claims.

    Returns:
        frames, uint8 RGB `[F, H, W, 3]`, turned as the file says, and frames per second.

    Raises:
        UserError: the file is missing, empty, damaged, or no video.
    """
    path = _existing_file(path, "video")
    unusable = UserError(f"{path}: cannot be read as a video (damaged or another format); give another file")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate, claimed = stream.average_rate, stream.frames
            frames = [_upright(frame) for frame in islice(container.decode(stream), max_frames)]
    except (av.error.FFmpegError, IndexError):  # IndexError: sound without pictures
        raise unusable from None
    if not frames or not rate or (max_frames is None and len(frames) < 0.99 * claimed):
        raise unusable
    return np.stack(frames), float(rate)


def write_video(frames: Iterable[np.ndarray], path: str | os.PathLike, fps: float) -> None:
    """Writes H.264 (yuv420p, which every player knows) in an mp4; the file appears under its name when it is whole.

    Args:
        frames: uint8 RGB `[H, W, 3]` each, all of one size; taken one at a time, so a generator needs no memory.
            H.264 wants even sizes: the last row or column is repeated where one is odd.

    Raises:
        UserError: no frame, or the file cannot be written (no such folder, no right, full disk).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    count = 0
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "16", "preset": "medium"}
            for count, frame in enumerate(frames, start=1):
                frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
                if count == 1:
                    stream.height, stream.width = frame.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            if count:
                container.mux(stream.encode(None))
        if count == 0:
            raise UserError(f"{path}: no frame to write")
        os.replace(partial, path)
    except OSError as error:  # av's own errors of files are OSErrors too
        raise UserError(
            f"{path}: cannot write the video ({error.strerror or error}); check the folder"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def read_picture(path: str | os.PathLike) -> np.ndarray:
    """A picture as uint8 RGB `[H, W, 3]`, turned as its EXIF orientation says; transparent parts become white.

    Raises:
        UserError: the file is missing, empty, damaged, or no picture.
    """
    path = _existing_file(path, "picture")
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        raise UserError(
            f"{path}: cannot be read as a picture (damaged or another format); give another file"
        ) from None
    white = Image.new("RGBA", upright.size, "white")
    return np.array(Image.alpha_composite(white, upright).convert("RGB"))


def write_picture(picture: np.ndarray, path: str | os.PathLike) -> None:
    """Writes uint8 RGB `[H, W, 3]` in the format of the path's suffix; the file appears when it is whole."""
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        Image.fromarray(picture).save(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the picture ({error.strerror or error}); check the folder"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def crop_box(
    source_height: int, source_width: int, height: int, width: int
) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1): the largest centred box of a source picture with the canvas's proportions, in source pixels."""
    scale = min(source_height / height, source_width / width)
    x0, y0 = (source_width - width * scale) / 2, (source_height - height * scale) / 2
    return x0, y0, x0 + width * scale, y0 + height * scale


def fit_picture(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture's `crop_box` at the canvas's size: uint8 RGB `[H, W, 3]` -> `[height, width, 3]`."""
    if picture.shape[:2] == (height, width):
        return picture
    box = crop_box(picture.shape[0], picture.shape[1], height, width)
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS, box=box))


def fit_keypoints(
    keypoints: np.ndarray, source_height: int, source_width: int, height: int, width: int
) -> np.ndarray:
    """Keypoints `[..., 18, 3]` in source pixels -> where `fit_picture` puts them; a joint not found stays at 0."""
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
