"""Synthetic pose errors: rates, sizes and affected frames of each kind, against poses with known positions."""

import numpy as np
import pytest

from tcan.pose import PoseErrors, corrupt_poses
from tcan.pose.corrupt import KINDS

FRAMES, SIDE = 40, 200


@pytest.fixture
def poses() -> np.ndarray:
    """Every joint of every frame at another position; the left ear is missing in all frames."""
    positions = np.random.default_rng(0).uniform(20, 180, (FRAMES, 18, 2))
    keypoints = np.concatenate([positions, np.ones((FRAMES, 18, 1))], axis=2).astype(np.float32)
    keypoints[:, 17] = 0
    return keypoints


def affected(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return np.flatnonzero((before != after).any((1, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_errors_and_the_input_is_unchanged(poses: np.ndarray, kind: str) -> None:
    before = poses.copy()
    first, again, other = (corrupt_poses(poses, kind, 0.4, 0.05, SIDE, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(poses, before)
    assert np.array_equal(first, other) == (kind in ("none",))
    assert (first[:, 17] == 0).all() or kind == "swaps"  # a missing joint stays missing
    none = corrupt_poses(poses, kind, 0.0, 0.0, SIDE, 1)
    np.testing.assert_array_equal(none, poses)


@pytest.mark.parametrize("kind", ["jitter", "outliers", "swaps", "frozen", "burst"])
def test_share_is_the_fraction_of_affected_frames(poses: np.ndarray, kind: str) -> None:
    frames = affected(poses, corrupt_poses(poses, kind, 0.25, 0.05, SIDE, 3))
    assert len(frames) == 10
    assert (np.ptp(frames) == 9) == (kind == "burst")


def test_missing_removes_joints_at_the_requested_rate(poses: np.ndarray) -> None:
    found = corrupt_poses(poses, "missing", 0.3, 0, SIDE, 0)[:, :17, 2] > 0
    assert 1 - found.mean() == pytest.approx(0.3, abs=0.05)


def test_jitter_and_offset_have_the_requested_size(poses: np.ndarray) -> None:
    moved = (corrupt_poses(poses, "jitter", 1, 0.05, SIDE, 0) - poses)[:, :17, :2]
    assert moved.std() == pytest.approx(10, rel=0.06)
    shift = (corrupt_poses(poses, "offset", 0, 0.05, SIDE, 0) - poses)[:, :17, :2]
    np.testing.assert_allclose(np.linalg.norm(shift, axis=-1), 10, rtol=1e-4)
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:1, :1], shift.shape), atol=1e-4)


def test_swaps_exchange_left_and_right(poses: np.ndarray) -> None:
    swapped = corrupt_poses(poses, "swaps", 1, 0, SIDE, 0)
    right_arm, left_arm = [2, 3, 4], [5, 6, 7]
    np.testing.assert_array_equal(swapped[:, right_arm], poses[:, left_arm])
    np.testing.assert_array_equal(swapped[:, :2], poses[:, :2])  # nose and neck have no counterpart
    np.testing.assert_array_equal(swapped[:, 17], poses[:, 16])
    assert (swapped[:, 16] == 0).all()


def test_frozen_frames_repeat_the_previous_pose(poses: np.ndarray) -> None:
    frozen = corrupt_poses(poses, "frozen", 0.5, 0, SIDE, 0)
    frames = affected(poses, frozen)
    assert frames[0] > 0
    np.testing.assert_array_equal(frozen[frames], frozen[frames - 1])
    np.testing.assert_array_equal(corrupt_poses(poses[:1], "frozen", 1, 0, SIDE, 0), poses[:1])


def test_training_errors_equal_the_recorded_values(poses: np.ndarray) -> None:
    """Training samples must not change: the sums were recorded before inference errors were added."""
    corrupted = PoseErrors(0.2, 0.05, 0.3).apply(poses, SIDE, np.random.default_rng(7))
    assert (float(corrupted.sum(dtype=np.float64)), int((corrupted[..., 2] > 0).sum())) == (
        91044.60163879395,
        441,
    )
