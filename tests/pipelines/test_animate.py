"""`tcan animate`: what it refuses, each in one line."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.animate import animate, beside
from pipelines.config import load_config
from tcan.errors import UserError
from tcan.video import write_picture, write_video


def test_bad_input(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    write_picture(frames[0], tmp_path / "hero.png")
    write_video(frames, tmp_path / "dance.mp4", fps=24)
    (tmp_path / "renamed.mp4").write_text("text")
    (tmp_path / "renamed.png").write_text("text")
    good = {"image": "hero.png", "driving": "dance.mp4", "model": "model", "out": "out.mp4"}
    for change, reason in (
        ({"image": "missing.png"}, "no such picture"),
        ({"image": "renamed.png"}, "cannot be read as a picture"),
        ({"driving": "missing.mp4"}, "no such video"),
        ({"driving": "renamed.mp4"}, "cannot be read as a video"),
        ({"model": "missing"}, "no model folder"),
        ({"out": "out.gif"}, "name it so"),
    ):
        arguments = {key: tmp_path / name for key, name in (good | change).items()}
        with pytest.raises(UserError, match=reason) as error:
            animate(**arguments, config=load_config())
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out.mp4").exists()


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="overlap"):
        load_config("--animate.overlap", "16")


def test_side_by_side() -> None:
    reference, poses, result = (np.full((n, 2, 3, 3), n, np.uint8) for n in (1, 5, 5))
    frames = list(beside(reference[0], poses, iter(result + 1)))
    assert len(frames) == 5
    np.testing.assert_array_equal(frames[4][0, :, 0], [1] * 3 + [5] * 3 + [6] * 3)
