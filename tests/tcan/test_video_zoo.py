"""Frames, times, aspect and colors of many kinds of files equal those of a linear decoding by ffmpeg."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tcan.video import VideoFrames
from tcan.video_stream import VideoStream
from tests.tcan import video_zoo as zoo

pytestmark = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="requires the program ffmpeg (Debian package ffmpeg)"
)
QUICK = zoo.NAMES[::2]
FPS = 30.0


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    zoo.make(folder)
    return folder


def test_zoo_has_at_least_60_files() -> None:
    assert len(set(zoo.NAMES)) >= 60


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in zoo.NAMES]
)
def test_frames_times_aspect_and_colors_equal_ffmpeg(folder: Path, name: str) -> None:
    video = VideoStream(folder / name, threads=1)
    assert (video.height, video.width) == zoo.displayed_size(folder / name)
    truth = zoo.decode(folder / name, video.height, video.width)
    frames = list(video)
    assert len(frames) == len(truth.frames)
    tolerance = 2e-3 + zoo.LATE.get(name, 0)
    np.testing.assert_allclose([time for time, _ in frames], truth.times, atol=tolerance)
    block = 4 if name in zoo.ROUNDED else 1
    assert max(difference(a, b, block) for (_, a), b in zip(frames, truth.frames, strict=True)) < 2

    # Frame k is the one that ffmpeg shows at k / FPS.
    resampled = list(VideoFrames(folder / name, FPS))
    times = [time for time, _ in frames] if name in zoo.LATE else truth.times
    shown = np.searchsorted(times, np.arange(len(resampled)) / FPS + 2e-3, side="right") - 1
    for image, index in zip(resampled, shown, strict=True):
        assert difference(image, truth.frames[index], block) < 2
    assert len(resampled) / FPS == pytest.approx(truth.times[-1], abs=0.6)
    assert len(resampled) / FPS > truth.times[-1]


def difference(a: np.ndarray, b: np.ndarray, block: int) -> float:
    """Mean absolute difference of two images, of their means over blocks of pixels."""
    signed = a.astype(float) - b
    height, width = (size // block * block for size in signed.shape[:2])
    blocks = signed[:height, :width].reshape(height // block, block, width // block, block, 3)
    return float(np.abs(blocks.mean(axis=(1, 3))).mean())
