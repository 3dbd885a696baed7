import numpy as np

from tcan.pose.follow import fill_gaps, follow_main_person
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
