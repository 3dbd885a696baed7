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
    np.testing.assert_allclose([time for time, _ in frames], truth.times, atol=2e-3)
    differences = [np.abs(a.astype(int) - b).mean() for (_, a), b in zip(frames, truth.frames, strict=True)]
    assert max(differences) < 2

    # Frame k is the one that ffmpeg shows at k / FPS.
    resampled = list(VideoFrames(folder / name, FPS))
    shown = np.searchsorted(truth.times, np.arange(len(resampled)) / FPS + 2e-3, side="right") - 1
    for image, index in zip(resampled, shown, strict=True):
        assert np.abs(image.astype(int) - truth.frames[index]).mean() < 2
    assert len(resampled) / FPS == pytest.approx(truth.times[-1], abs=0.6)
    assert len(resampled) / FPS > truth.times[-1]
