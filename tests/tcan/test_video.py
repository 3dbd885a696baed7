"""Videos and pictures on disk."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tcan.errors import UserError
from tcan.video import fit_keypoints, fit_picture, read_picture, read_video, write_picture, write_video


def smooth_frames(count: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 10 * i)], axis=-1) for i in range(count)
    ]
    return np.array(frames).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 48), (63, 49)])
def test_video_round_trip(tmp_path: Path, height: int, width: int) -> None:
    frames = smooth_frames(7, height, width)
    write_video(iter(frames), tmp_path / "clip.mp4", fps=29.97)
    read, fps = read_video(tmp_path / "clip.mp4")
    assert fps == pytest.approx(29.97, abs=1e-3)
    assert read.shape == (7, height + height % 2, width + width % 2, 3)
    assert np.abs(read[:, :height, :width].astype(int) - frames).mean() < 3
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert len(read_video(tmp_path / "clip.mp4", max_frames=3)[0]) == 3


def test_video_is_what_players_know(tmp_path: Path) -> None:
    write_video(smooth_frames(2, 32, 32), tmp_path / "clip.mp4", fps=24)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == (
            "h264",
            "yuv420p",
            Fraction(24),
        )


def test_nothing_half_written(tmp_path: Path) -> None:
    def broken():
        yield from smooth_frames(2, 32, 32)
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        write_video(broken(), tmp_path / "clip.mp4", fps=24)
    with pytest.raises(UserError, match="no frame"):
        write_video([], tmp_path / "none.mp4", fps=24)
    assert not list(tmp_path.iterdir())


def test_unusable_videos(tmp_path: Path) -> None:
    write_video(smooth_frames(60, 64, 64), tmp_path / "whole.mp4", fps=24)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    for name, reason in (
        ("cut.mp4", "cannot be read as a video"),
        ("text.mp4", "cannot be read as a video"),
        ("empty.mp4", "empty file"),
        ("folder.mp4", "a folder"),
        ("missing.mp4", "no such video"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            read_video(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "turned.png"), np.rot90(pixels, k=-1))


def test_unusable_pictures(tmp_path: Path) -> None:
    write_picture(smooth_frames(1, 64, 64)[0], tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    for name in ("cut.png", "text.png", "empty.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            read_picture(tmp_path / name)


def test_keypoints_follow_the_picture() -> None:
    """A white dot in a wide picture, and its keypoint, end in the same place of a tall canvas."""
    picture = np.zeros((100, 200, 3), np.uint8)
    picture[58:63, 108:113] = 255
    fitted = fit_picture(picture, 128, 64)
    keypoints = np.zeros((18, 3), np.float32)
    keypoints[4] = (110.5, 60.5, 0.7)
    placed = fit_keypoints(keypoints, 100, 200, 128, 64)
    y, x = np.argwhere(fitted[..., 0] > 127).mean(axis=0) + 0.5
    np.testing.assert_allclose(placed[4], [x, y, 0.7], atol=0.6)
    assert not placed[:4].any()
