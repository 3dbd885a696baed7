"""`tcan evaluate`: metrics and control metrics of synthetic results with known values."""

import csv
from pathlib import Path

import numpy as np
import pytest

from pipelines.config.parser import load_config
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


def perfect_result(seed: int, num_frames: int = 6) -> Evaluated:
    """Puppet video whose result equals its ground truth."""
    clip = sample_clip("dance", seed, num_frames, every=6)
    poses = clip.keypoints
    drawn = draw_poses(poses, 128, 128, 2)
    return Evaluated(
        Path(f"{seed}.mp4"), 4.0, clip.frames, poses, drawn, clip.frames.copy(), poses.copy(), poses.copy()
    )


@pytest.fixture(scope="module")
def videos() -> list[Evaluated]:
    videos = [perfect_result(seed) for seed in (1, 2, 3)]
    compute_metrics(videos)
    return videos


def test_perfect_results_have_ideal_metrics_and_worse_controls(videos: list[Evaluated]) -> None:
    for video in videos:
        metrics = video.metrics
        assert (metrics["l1"], metrics["psnr"], metrics["ssim"]) == (0, np.inf, pytest.approx(1, abs=1e-4))
        assert metrics["pose_5"] == metrics["pose_5_wrists"] == metrics["pose_5_true"] == 1
        assert metrics["psnr_uint8_overflow"] == 100 and metrics["psnr_uint8_overflow_still"] < 40
        assert metrics["flicker"] == metrics["flicker_source"]
        assert 0 < metrics["warping_error"] == metrics["warping_error_source"]
        assert np.isfinite(metrics["psnr_still"]) and metrics["l1_still"] > 0
        assert metrics["pose_5_other"] < 0.6 and metrics["pose_5_mean_pose"] < 0.6
        assert metrics["colour_distance"] < metrics["colour_distance_other"]
        assert metrics["identified_chance"] == pytest.approx(1 / 3)
    assert np.mean([video.metrics["identified"] for video in videos]) > 0.9


def test_static_result_has_no_flicker_and_low_pose_score() -> None:
    videos = [perfect_result(seed) for seed in (1, 2)]
    for video in videos:
        video.result = np.repeat(video.truth[:1], len(video.truth), axis=0)
        video.found = np.repeat(video.poses[:1], len(video.poses), axis=0)
    compute_metrics(videos)
    for video in videos:
        assert video.metrics["flicker"] == 0 or np.isnan(video.metrics["flicker"])
        assert video.metrics["warping_error"] == 0 < video.metrics["warping_error_source"]
        assert video.metrics["pose_5"] < 0.7


def test_table_contains_warping_error_with_source_but_no_overflowing_psnr(videos: list[Evaluated]) -> None:
    lines = table(means([video.metrics for video in videos])).splitlines()
    assert [line for line in lines if line.startswith("warping error") and "source" in line]
    assert len([line for line in lines if "PSNR" in line]) == 1


def test_single_video_has_nan_cross_video_controls() -> None:
    video = perfect_result(1)
    compute_metrics([video])
    assert np.isnan(video.metrics["pose_5_other"]) and np.isnan(video.metrics["colour_distance_other"])
    assert "another" not in table(means([video.metrics]))


def test_means_ignore_missing_and_nan_metrics() -> None:
    assert means([{"a": 1.0, "b": float("nan")}, {"a": 3.0, "b": 2.0, "c": 5.0}]) == {"a": 2, "b": 2, "c": 5}


def test_csv_contact_sheet_and_comparison_have_expected_contents(
    videos: list[Evaluated], tmp_path: Path
) -> None:
    _write_csv(videos, tmp_path / "videos.csv")
    with open(tmp_path / "videos.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["pose_5"]) for row in rows] == [1, 1, 1]
    assert contact_sheet(videos).shape == (3 * 128, 13 * 128, 3)
    write_comparison(videos[0], tmp_path / "one.mp4")
    assert read_video(tmp_path / "one.mp4")[0].shape == (6, 128, 4 * 128, 3)


def test_invalid_video_sources_raise_user_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for videos, reason in ((tmp_path / "empty", "no videos"), (tmp_path / "missing", "no such")):
        with pytest.raises(UserError, match=reason):
            evaluate(videos, tmp_path / "model", tmp_path / "out", load_config())
    assert not (tmp_path / "out").exists()
