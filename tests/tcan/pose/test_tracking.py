import logging

import numpy as np
import pytest

from tcan.errors import UserError
from tcan.pose.tracking import (
    fill_gaps,
    main_person_poses,
    remove_outliers,
    smooth_poses,
    track_main_person,
)
from tests.tcan.pose.bodies import body

NO_PEOPLE = np.zeros((0, 18, 3), np.float32)


def test_tracks_largest_then_nearest_person():
    # A dancer passes a bystander, who is larger from frame 5; the detection order alternates.
    dancer = [body(100 + 10 * f, 80, 200) for f in range(20)]
    frames = []
    for f, pose in enumerate(dancer):
        both = [pose, body(250, 150, 150 if f < 5 else 300)]
        frames.append(np.stack(both if f % 2 else both[::-1]))
    np.testing.assert_array_equal(track_main_person(frames, 512, 512), np.stack(dancer))


def test_bystander_is_tracked_only_after_the_dancer_is_gone():
    dancer, bystander = body(100, 100, 200), body(480, 100, 100)
    both, alone = np.stack([dancer, bystander]), bystander[None]
    tracked = track_main_person([NO_PEOPLE, both, alone, both] + [alone] * 8, 512, 512)
    assert not tracked[0].any()
    np.testing.assert_array_equal(tracked[1], dancer)
    assert not tracked[2].any()
    np.testing.assert_array_equal(tracked[3], dancer)
    assert not tracked[4].any()
    np.testing.assert_array_equal(tracked[-1], bystander)


def test_no_people_give_zero_keypoints():
    tracked = track_main_person([NO_PEOPLE] * 3, 64, 64)
    assert tracked.shape == (3, 18, 3) and not tracked.any()
    assert track_main_person([], 64, 64).shape == (0, 18, 3)


def test_short_gaps_are_interpolated_linearly():
    truth = np.stack([body(50 + 3 * f, 60 - 2 * f, 100) for f in range(12)])
    truth[..., 2] = np.linspace(0.5, 1, 12)[:, None]
    holes = truth.copy()
    holes[3:6, 4] = 0  # 3 frames: interpolated
    holes[2:7, 7] = 0  # 5 frames: too long
    holes[:2, 9] = 0  # either end: not interpolated
    holes[10:, 10] = 0
    before = holes.copy()
    filled = fill_gaps(holes, max_gap=3)
    np.testing.assert_array_equal(holes, before)
    np.testing.assert_allclose(filled[3:6, 4], truth[3:6, 4], rtol=1e-5)
    holes[3:6, 4] = filled[3:6, 4]
    np.testing.assert_array_equal(filled, holes)


def test_frames_without_people_are_interpolated_and_logged(caplog: pytest.LogCaptureFixture):
    """On a linear walk, interpolation recovers the true poses of frames without a detection."""
    walk = np.stack([body(50 + 4 * f, 60, 100) for f in range(30)])
    walk[:8, 7] = 0  # a wrist that is visible from frame 8
    walk[20:, 4] = 0  # a wrist that is visible until frame 19
    seen = [pose[None] for pose in walk]
    lost = [0, *range(5, 16), 28, 29]
    for f in lost:
        seen[f] = NO_PEOPLE
    with caplog.at_level(logging.WARNING):
        poses = main_person_poses(seen, 256, 256, "walk.mp4")
    assert caplog.messages == [
        "walk.mp4: no person found in frames 0, 5-15, 28-29 of 0-29; interpolated from the neighboring frames"
    ]
    expected = walk.copy()
    expected[0], expected[28:] = walk[1], walk[27]
    always = [j for j in range(18) if j not in (4, 7)]
    np.testing.assert_allclose(poses[:, always], expected[:, always], rtol=1e-5)
    assert not poses[5:11, 7].any()  # copied from the nearer frame, which lacks it
    np.testing.assert_allclose(poses[11:16, 7], np.repeat(walk[16:17, 7], 5, axis=0))
    caplog.clear()
    main_person_poses(seen[16:28], 256, 256, "walk.mp4")
    assert not caplog.messages
    with pytest.raises(UserError, match=r"empty\.mp4: no person found"):
        main_person_poses([NO_PEOPLE] * 3, 64, 64, "empty.mp4")


def test_frames_without_neck_use_the_midpoint_of_the_shoulders(caplog: pytest.LogCaptureFixture) -> None:
    """All other joints are detected, so no frame is empty, whether the neck is missing in one frame or in all."""
    walk = np.stack([body(50 + 4 * f, 60, 100, 0.1 * f) for f in range(12)])
    walk[:, 2, 2], walk[:, 5, 2] = 0.5, 0.8
    expected = walk.copy()
    expected[:, 1] = np.concatenate([(walk[:, 2, :2] + walk[:, 5, :2]) / 2, np.full((12, 1), 0.5)], axis=1)
    walk[:, 1] = 0
    with caplog.at_level(logging.WARNING):
        poses = main_person_poses([pose[None] for pose in walk], 256, 256, "walk.mp4")
    assert not caplog.messages
    np.testing.assert_allclose(poses, expected, rtol=1e-6)

    walk[3, 2] = 0  # no shoulder: no neck
    with caplog.at_level(logging.WARNING):
        main_person_poses([pose[None] for pose in walk[3:4]] + [expected[4:5]], 256, 256, "walk.mp4")
    assert caplog.messages == [
        "walk.mp4: no person found in frames 0 of 0-1; interpolated from the neighboring frames"
    ]


def swing(frames: int = 40) -> np.ndarray:
    """Arms that swing quickly."""
    poses = np.stack([body(100, 60, 150) for _ in range(frames)])
    poses[:, [3, 4, 6, 7], 1] += 30 * np.sin(np.arange(frames) * 2 * np.pi / 14)[:, None]
    return poses


def test_only_jumping_joints_are_outliers():
    poses = swing()
    np.testing.assert_array_equal(remove_outliers(poses), poses)
    wrong = poses.copy()
    wrong[10, 4, :2] += 80  # one frame
    wrong[20:22, 7, 0] -= 60  # two
    wrong[30, 9] = 0  # already missing
    cleaned = remove_outliers(wrong)
    removed = np.argwhere((wrong[..., 2] > 0) & (cleaned[..., 2] == 0)).tolist()
    assert removed == [[10, 4], [20, 7], [21, 7]]
    repaired = main_person_poses([pose[None] for pose in wrong], 256, 256, "", smoothing_window=5)
    assert np.abs(repaired[..., :2] - poses[..., :2]).max() < 5  # of the 80 and 60 pixels
    untouched = main_person_poses([pose[None] for pose in wrong], 256, 256, "")
    np.testing.assert_array_equal(untouched[10, 4], wrong[10, 4])


def test_smoothing_equals_a_local_parabola_fit():
    rng = np.random.default_rng(0)
    poses = swing(12)
    poses[..., :2] += rng.normal(0, 2, poses[..., :2].shape)
    poses[4, 5] = 0  # runs of 4 and 7 frames: the first is shorter than the window
    result = smooth_poses(poses, 7)
    times = np.arange(-3, 4)
    for frame in range(3, 9):
        curve = np.polyfit(times, poses[frame - 3 : frame + 4, 4, :2], 2)
        np.testing.assert_allclose(
            result[frame, 4, :2], curve[-1], rtol=1e-4
        )  # value at the center of the window
    np.testing.assert_array_equal(result[:5, 5], poses[:5, 5])
    np.testing.assert_allclose(result[8, 5, :2], np.polyfit(times, poses[5:12, 5, :2], 2)[-1], rtol=1e-4)
    np.testing.assert_array_equal(result[..., 2], poses[..., 2])
