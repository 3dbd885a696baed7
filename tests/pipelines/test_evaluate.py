"""`tcan evaluate`: metrics and controls of results that are known beforehand."""

import csv
from pathlib import Path

import numpy as np
import pytest

from pipelines.config_parser import load_config
from pipelines.evaluate import (
    Evaluated,
    _write_csv,
    compute_metrics,
    contact_sheet,
    evaluate,
    means,
    table,
    write_comparison,
)
from pipelines.puppets.world import sample_clip
from tcan.errors import UserError
from tcan.pose import draw_poses
from tcan.video import read_video


def perfect(seed: int, num_frames: int = 6) -> Evaluated:
    """A puppet reconstructed without a fault."""
    clip = sample_clip("dance", seed, num_frames, every=6)
    poses = clip.keypoints
    drawn = draw_poses(poses, 128, 128, 2)
    return Evaluated(
        Path(f"{seed}.mp4"), 4.0, clip.frames, poses, drawn, clip.frames.copy(), poses.copy(), poses.copy()
    )


@pytest.fixture(scope="module")
def videos() -> list[Evaluated]:
    videos = [perfect(seed) for seed in (1, 2, 3)]
    compute_metrics(videos)
    return videos


def test_perfect_results_and_their_controls(videos: list[Evaluated]) -> None:
    for video in videos:
        m = video.metrics
        assert (m["l1"], m["psnr"], m["ssim"]) == (0, np.inf, pytest.approx(1, abs=1e-4))
        assert m["pose_5"] == m["pose_5_wrists"] == m["pose_5_true"] == 1
        assert m["flicker"] == m["flicker_source"]
        assert np.isfinite(m["psnr_still"]) and m["l1_still"] > 0
        assert m["pose_5_other"] < 0.6 and m["pose_5_mean_pose"] < 0.6
        assert m["colour_distance"] < m["colour_distance_other"]
        assert m["identified_chance"] == pytest.approx(1 / 3)
    assert np.mean([video.metrics["identified"] for video in videos]) > 0.9


def test_a_result_that_stands_still() -> None:
    videos = [perfect(seed) for seed in (1, 2)]
    for video in videos:
        video.result = np.repeat(video.truth[:1], len(video.truth), axis=0)
        video.found = np.repeat(video.poses[:1], len(video.poses), axis=0)
    compute_metrics(videos)
    for video in videos:
        assert video.metrics["flicker"] == 0 or np.isnan(video.metrics["flicker"])
        assert video.metrics["pose_5"] < 0.7


def test_one_video_has_no_control_by_another() -> None:
    video = perfect(1)
    compute_metrics([video])
    assert np.isnan(video.metrics["pose_5_other"]) and np.isnan(video.metrics["colour_distance_other"])
    assert "another" not in table(means([video.metrics]))


def test_means_leave_out_what_a_video_lacks() -> None:
    assert means([{"a": 1.0, "b": float("nan")}, {"a": 3.0, "b": 2.0, "c": 5.0}]) == {"a": 2, "b": 2, "c": 5}


def test_what_is_written(videos: list[Evaluated], tmp_path: Path) -> None:
    _write_csv(videos, tmp_path / "videos.csv")
    with open(tmp_path / "videos.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["pose_5"]) for row in rows] == [1, 1, 1]
    assert contact_sheet(videos).shape == (3 * 128, 13 * 128, 3)
    write_comparison(videos[0], tmp_path / "one.mp4")
    assert read_video(tmp_path / "one.mp4")[0].shape == (6, 128, 4 * 128, 3)


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for videos, reason in ((tmp_path / "empty", "no videos"), (tmp_path / "missing", "no such")):
        with pytest.raises(UserError, match=reason):
            evaluate(videos, tmp_path / "model", tmp_path / "out", load_config())
    assert not (tmp_path / "out").exists()
