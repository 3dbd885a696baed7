import logging

import numpy as np
import pytest

from tcan.errors import UserError
from tcan.pose.tracking import fill_gaps, follow_main_person, one_body, smoothed, without_outliers
from tests.tcan.pose.bodies import body

NOBODY = np.zeros((0, 18, 3), np.float32)


def test_the_largest_then_the_nearest():
    # A dancer walks right, past a bystander who from frame 5 on is the larger; the detector's order changes.
    dancer = [body(100 + 10 * f, 80, 200) for f in range(20)]
    frames = []
    for f, pose in enumerate(dancer):
        both = [pose, body(250, 150, 150 if f < 5 else 300)]
        frames.append(np.stack(both if f % 2 else both[::-1]))
    np.testing.assert_array_equal(follow_main_person(frames, 512, 512), np.stack(dancer))


def test_a_bystander_is_not_the_dancer_but_may_become_the_one_to_follow():
    dancer, bystander = body(100, 100, 200), body(480, 100, 100)
    both, alone = np.stack([dancer, bystander]), bystander[None]
    followed = follow_main_person([NOBODY, both, alone, both] + [alone] * 8, 512, 512)
    assert not followed[0].any()
    np.testing.assert_array_equal(followed[1], dancer)
    assert not followed[2].any()
    np.testing.assert_array_equal(followed[3], dancer)
    assert not followed[4].any()
    np.testing.assert_array_equal(followed[-1], bystander)


def test_nobody_at_all():
    followed = follow_main_person([NOBODY] * 3, 64, 64)
    assert followed.shape == (3, 18, 3) and not followed.any()
    assert follow_main_person([], 64, 64).shape == (0, 18, 3)


def test_short_gaps_are_filled_in_straight():
    truth = np.stack([body(50 + 3 * f, 60 - 2 * f, 100) for f in range(12)])
    truth[..., 2] = np.linspace(0.5, 1, 12)[:, None]
    holes = truth.copy()
    holes[3:6, 4] = 0  # 3 frames: filled
    holes[2:7, 7] = 0  # 5 frames: too long
    holes[:2, 9] = 0  # either end: unknown
    holes[10:, 10] = 0
    before = holes.copy()
    filled = fill_gaps(holes, max_gap=3)
    np.testing.assert_array_equal(holes, before)
    np.testing.assert_allclose(filled[3:6, 4], truth[3:6, 4], rtol=1e-5)
    holes[3:6, 4] = filled[3:6, 4]
    np.testing.assert_array_equal(filled, holes)


def test_a_stretch_without_anybody_is_bridged_and_reported(caplog: pytest.LogCaptureFixture):
    """A straight walk: wherever the walker is missed between two sights, they are on the way from one to the other."""
    walk = np.stack([body(50 + 4 * f, 60, 100) for f in range(30)])
    walk[:8, 7] = 0  # a wrist that comes into sight in frame 8 ...
    walk[20:, 4] = 0  # ... and one that leaves it
    seen = [pose[None] for pose in walk]
    lost = [0, *range(5, 16), 28, 29]
    for f in lost:
        seen[f] = NOBODY
    with caplog.at_level(logging.WARNING):
        poses = one_body(seen, 256, 256, "walk.mp4")
    assert caplog.messages == [
        "walk.mp4: nobody found in frames 0, 5-15, 28-29 of 0-29; bridged from the frames around"
    ]
    expected = walk.copy()
    expected[0], expected[28:] = walk[1], walk[27]
    always = [j for j in range(18) if j not in (4, 7)]
    np.testing.assert_allclose(poses[:, always], expected[:, always], rtol=1e-5)
    assert not poses[5:11, 7].any()  # as in the nearer frame, which lacks it
    np.testing.assert_allclose(poses[11:16, 7], np.repeat(walk[16:17, 7], 5, axis=0))
    caplog.clear()
    one_body(seen[16:28], 256, 256, "walk.mp4")
    assert not caplog.messages
    with pytest.raises(UserError, match=r"empty\.mp4: no person found"):
        one_body([NOBODY] * 3, 64, 64, "empty.mp4")


def swing(frames: int = 40) -> np.ndarray:
    """Arms that go up and down, quickly."""
    poses = np.stack([body(100, 60, 150) for _ in range(frames)])
    poses[:, [3, 4, 6, 7], 1] += 30 * np.sin(np.arange(frames) * 2 * np.pi / 14)[:, None]
    return poses


def test_only_what_jumps_away_is_an_outlier():
    poses = swing()
    np.testing.assert_array_equal(without_outliers(poses), poses)
    wrong = poses.copy()
    wrong[10, 4, :2] += 80  # one frame
    wrong[20:22, 7, 0] -= 60  # two
    wrong[30, 9] = 0  # lost anyway
    cleaned = without_outliers(wrong)
    taken = np.argwhere((wrong[..., 2] > 0) & (cleaned[..., 2] == 0)).tolist()
    assert taken == [[10, 4], [20, 7], [21, 7]]
    mended = one_body([pose[None] for pose in wrong], 256, 256, "", smooth=5)
    assert np.abs(mended[..., :2] - poses[..., :2]).max() < 5  # of the 80 and 60 pixels
    untouched = one_body([pose[None] for pose in wrong], 256, 256, "")
    np.testing.assert_array_equal(untouched[10, 4], wrong[10, 4])


def test_smoothing_fits_parabolas():
    rng = np.random.default_rng(0)
    poses = swing(12)
    poses[..., :2] += rng.normal(0, 2, poses[..., :2].shape)
    poses[4, 5] = 0  # stretches of 4 and 7 frames: the first is too short
    result = smoothed(poses, 7)
    times = np.arange(-3, 4)
    for frame in range(3, 9):
        curve = np.polyfit(times, poses[frame - 3 : frame + 4, 4, :2], 2)
        np.testing.assert_allclose(result[frame, 4, :2], curve[-1], rtol=1e-4)  # its value in the middle
    np.testing.assert_array_equal(result[:5, 5], poses[:5, 5])
    np.testing.assert_allclose(result[8, 5, :2], np.polyfit(times, poses[5:12, 5, :2], 2)[-1], rtol=1e-4)
    np.testing.assert_array_equal(result[..., 2], poses[..., 2])
