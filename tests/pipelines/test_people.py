"""Datasets of several people, from rendered videos to the pose images of training."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from pipelines import cli
from pipelines.config.parser import load_config
from pipelines.preprocess.job import preprocess
from pipelines.puppets.world import Clip, sample_clip, write_clip
from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler
from tcan.errors import UserError
from tcan.pose import draw_poses
from tests.pipelines.test_preprocess import inside, read_clips


def write_two_puppets(folder: Path) -> np.ndarray:
    """Write duo.mp4: two puppets of different characters at the right of a video of 320 x 128 pixels.

    Returns the ground-truth keypoints `[12, 2, 18, 3]`.
    """
    first, second = (sample_clip("dance", seed, num_frames=12) for seed in (5, 2))
    frames = np.pad(first.frames, ((0, 0), (0, 0), (96, 96), (0, 0)), mode="edge")
    frames[:, :, 192:][second.mask] = second.frames[second.mask]
    truth = np.stack([first.keypoints, second.keypoints], axis=1)
    truth[:, :, :, 0] += np.array([96, 192], np.float32)[:, None]
    folder.mkdir()
    write_clip(Clip(frames, truth[:, 0], np.zeros(frames.shape[:3], bool)), folder / "duo")
    return truth


@pytest.mark.slow
def test_training_draws_all_people_at_their_true_positions(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The crop of 224 pixels holds both puppets, whose joints span 197 pixels."""
    truth = write_two_puppets(tmp_path / "videos")
    covered = {}
    for people in ("main", "all"):
        out = tmp_path / people
        options = ["--preprocess.buckets=[128x224]", "--preprocess.validation_fraction=0"]
        options += ["--preprocess.min_clip_frames=12", f"--preprocess.people={people}"]
        preprocess(
            str(tmp_path / "videos"), str(out), load_config(*options, f"--tracking.folder={tmp_path}/mlflow")
        )
        (row,) = read_clips(out)
        assert row.get("tracked_people") == (2 if people == "all" else None)
        x0 = row["crop"][0]
        sampler = Sampler(
            ClipStore(out), 2, seed=0, batch_size=1, size=None, vae_scaling_factor=1.0, stick_width=2, frames=12,
            drop_reference=0.1,
        )  # fmt: skip
        drawn = sampler.sample(0, 0)["pose"].any(axis=-1)
        near = np.stack([cv2.dilate(frame.astype(np.uint8), np.ones((7, 7))) for frame in drawn]) > 0
        true = [draw_poses(truth[:, i] - [x0, 0, 0], 128, 224, 2).any(axis=-1) for i in (0, 1)]
        covered[people] = [near[skeleton].mean() for skeleton in true]
        both = (
            np.stack([cv2.dilate(frame.astype(np.uint8), np.ones((7, 7))) for frame in true[0] | true[1]]) > 0
        )
        assert both[drawn].mean() > 0.95
        for command in ("verify", "info"):
            assert cli.main(["dataset", command, str(out)]) == 0
        assert f"people {people}" in capsys.readouterr().out
    assert inside(truth, row["crop"]).all()
    assert min(covered["all"]) > 0.95
    assert max(covered["main"]) > 0.95 and min(covered["main"]) < 0.1
    with pytest.raises(UserError, match="created with people all, not None"):
        preprocess(
            str(tmp_path / "videos"),
            str(out),
            load_config(*options[:-1], f"--tracking.folder={tmp_path}/mlflow"),
        )
