import logging

import numpy as np
import pytest

from tcan.errors import UserError
from tcan.pose.cleaning import (
    MAX_BRIDGE,
    clean_poses,
    correct_swaps,
    fill_gaps,
    main_person_poses,
    remove_outliers,
    smooth_poses,
)
from tcan.pose.skeleton import MIRROR
from tcan.pose.tracking import check_selection, select_people, track_main_person
from tests.tcan.pose.bodies import body

NO_PEOPLE = np.zeros((0, 18, 3), np.float32)


def shuffled(rng: np.random.Generator, *poses: np.ndarray) -> np.ndarray:
    """The people of a frame `[P, 18, 3]`, in random order."""
    return np.stack([poses[i] for i in rng.permutation(len(poses))])


def test_tracks_the_person_who_is_largest_over_the_video():
    """A dancer passes a bystander, who becomes larger for a few frames; the detection order alternates."""
    rng = np.random.default_rng(0)
    dancer = [body(100 + 10 * f, 80, 200) for f in range(20)]
    frames = [shuffled(rng, pose, body(250, 150, 250 if 5 < f < 9 else 150)) for f, pose in enumerate(dancer)]
    np.testing.assert_array_equal(track_main_person(frames, 512, 512), np.stack(dancer))


def test_bystander_never_replaces_the_dancer():
    """The dancer is found in frames 3 to 9 except 5, and leaves; the bystander is alone in the other frames."""
    dancer, bystander = body(100, 100, 400), body(480, 100, 100)
    frames = [
        np.stack([bystander, dancer]) if f in (3, 4, 6, 7, 8, 9) else bystander[None] for f in range(16)
    ]
    tracked = track_main_person([NO_PEOPLE, *frames], 512, 512)
    expected = np.stack([dancer if f - 1 in (3, 4, 6, 7, 8, 9) else np.zeros((18, 3)) for f in range(17)])
    np.testing.assert_array_equal(tracked, expected)


def in_step(seed: int, frames: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Two dancers `[F, 18, 3]` each who sway and swing their arms in step while they cross with noisy keypoints."""
    rng = np.random.default_rng(seed)
    speed, period, size = rng.uniform(2, 6), rng.uniform(12, 30), rng.uniform(60, 90)
    middle = frames / 2 + rng.uniform(-3, 3)
    dancers = []
    for side, scale in ((1, 1.0), (-1, 0.95)):
        poses = []
        for f in range(frames):
            sway = 4 * np.sin(2 * np.pi * f / period)
            pose = body(128 + side * speed * (f - middle) + sway, 60, size * scale)
            pose[[3, 4, 6, 7], 1] -= size * 0.15 * (1 + np.sin(2 * np.pi * f / period))
            pose[:, :2] += rng.normal(0, 0.8, (18, 2))
            poses.append(pose)
        dancers.append(np.stack(poses))
    return dancers[0], dancers[1]


@pytest.mark.parametrize("hidden", [0, 4], ids=["both found", "one hidden while crossing"])
def test_dancers_who_move_in_step_and_cross_are_not_exchanged(hidden: int) -> None:
    """16 of 16 random crossings, in random order of detection; while they overlap, only the first may be found."""
    for seed in range(16):
        rng = np.random.default_rng(100 + seed)
        first, second = in_step(seed)
        nearest = np.abs((first - second)[:, 1, 0]).argmin()
        covered = range(nearest - hidden // 2, nearest - hidden // 2 + hidden)
        frames = [
            first[f][None] if f in covered else shuffled(rng, first[f], second[f]) for f in range(len(first))
        ]
        tracked = track_main_person(frames, 256, 256)
        far = np.abs((first - second)[:, 1, 0]) > 8
        np.testing.assert_array_equal(tracked[far], first[far], err_msg=f"seed {seed}")


@pytest.mark.parametrize("size", [30, 60, 110])
def test_fast_runner_is_found_in_every_frame(size: int) -> None:
    runner = np.stack([body(10 + 30 * f, 40, size) for f in range(5)])
    np.testing.assert_array_equal(track_main_person([pose[None] for pose in runner], 128, 128), runner)


def test_bystander_who_is_alone_in_the_first_frame_is_not_the_main_person() -> None:
    dancer = np.stack([body(300 + 3 * f, 150, 250) for f in range(20)])
    bystander = body(60, 150, 300)
    frames = (
        [bystander[None]]
        + [np.stack([bystander, pose]) for pose in dancer[1:2]]
        + [pose[None] for pose in dancer[2:]]
    )
    tracked = track_main_person(frames, 512, 512)
    assert not tracked[0].any()
    np.testing.assert_array_equal(tracked[1:], dancer[1:])


def test_person_is_followed_after_a_scene_cut() -> None:
    before, after = body(100, 100, 200), body(450, 200, 240)
    tracked = track_main_person([before[None]] * 10 + [after[None]] * 10, 512, 512)
    np.testing.assert_array_equal(tracked, np.stack([before] * 10 + [after] * 10))


def test_selected_people_are_those_at_the_position() -> None:
    left, middle, right = body(80, 100, 150), body(250, 100, 250), body(420, 100, 200)
    frames = [np.stack([middle, right, left])] * 6

    def selected(person: str) -> np.ndarray:
        return np.stack(select_people(frames, 512, 512, person, "dance.mp4"))[:, 0]

    for person, expected in (
        ("largest", [middle]),
        ("1", [middle]),
        ("3", [left]),
        ("left", [left]),
        ("right", [right]),
        ("430,220", [right]),
        ("left+right", [left, right]),
        ("2+80,100", [right, left]),
    ):
        np.testing.assert_array_equal(selected(person), np.stack(expected), err_msg=person)
    with pytest.raises(UserError, match=r"dance\.mp4: person 4: only 3 found; use a number up to 3"):
        selected("4")
    with pytest.raises(UserError, match="largest\\+1 selects one person twice"):
        selected("largest+1")
    for invalid in ("", "0", "1.5", "above", "1,2,3", "nan,1", "left,right"):
        with pytest.raises(UserError, match=r"--person .*: invalid person; use largest"):
            check_selection(invalid, "--person")


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

    walk[3, 2] = 0  # no shoulder: the neck moves like the other joints
    with caplog.at_level(logging.WARNING):
        poses = main_person_poses([walk[3][None], expected[4][None]], 256, 256, "walk.mp4")
    assert not caplog.messages
    np.testing.assert_allclose(poses[0, 1, :2], expected[3, 1, :2], atol=4)
    np.testing.assert_array_equal(poses[0, 3:], walk[3, 3:])


def test_only_stretches_below_the_limit_are_bridged(caplog: pytest.LogCaptureFixture) -> None:
    walk = np.stack([body(50 + f, 60, 100) for f in range(2 * MAX_BRIDGE + 12)])
    seen = walk.copy()
    seen[4 : 4 + MAX_BRIDGE] = 0
    first = 8 + MAX_BRIDGE
    seen[first : first + MAX_BRIDGE + 1] = 0
    with caplog.at_level(logging.WARNING):
        cleaned = clean_poses(seen, "walk.mp4")
    assert (
        f"except frames {first}-{first + MAX_BRIDGE}, which are more than {MAX_BRIDGE} frames" in caplog.text
    )
    assert not cleaned.poses[first : first + MAX_BRIDGE + 1].any()
    assert len(cleaned.missing) == 2 * MAX_BRIDGE + 1
    kept = np.delete(np.arange(len(walk)), np.arange(first, first + MAX_BRIDGE + 1))
    np.testing.assert_allclose(cleaned.poses[kept], walk[kept], atol=1e-3)


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


@pytest.mark.parametrize("frames", [range(10, 13), range(3), range(37, 40), range(20, 21)])
def test_swapped_sides_are_exchanged(frames: range) -> None:
    poses = swing()
    poses[:, :, 0] += 2 * np.arange(40)[:, None]
    wrong = poses.copy()
    for f in frames:
        wrong[f] = poses[f, list(MIRROR)]
    corrected, changed = correct_swaps(wrong)
    np.testing.assert_array_equal(corrected, poses)
    assert changed.tolist() == list(frames)
    cleaned = main_person_poses([pose[None] for pose in wrong], 256, 256, "", smoothing_window=5)
    assert np.abs(cleaned[..., :2] - poses[..., :2]).max() < 5  # the shoulders are 36 px apart


def test_turns_of_the_body_are_not_swaps() -> None:
    """A pirouette, and a turn within a frame after which the dancer is seen from behind."""
    turning = np.stack([body(100, 60, 150)] * 40)
    neck = turning[:, 1:2, 0].copy()
    turning[:, :, 0] = neck + (turning[:, :, 0] - neck) * np.cos(np.arange(40) * 2 * np.pi / 20)[:, None]
    turned = np.stack([body(100, 60, 150)] * 40)
    turned[15:] = turned[15:, list(MIRROR)]
    for poses in (turning, turned):
        corrected, changed = correct_swaps(poses)
        np.testing.assert_array_equal(corrected, poses)
        assert not len(changed)


@pytest.mark.parametrize("frames", [[0], [0, 1], [39], [38, 39]])
def test_outliers_at_the_ends_are_replaced(frames: list[int]) -> None:
    poses = swing()
    wrong = poses.copy()
    wrong[frames, 4, :2] += 80
    cleaned = remove_outliers(wrong)
    removed = np.argwhere((wrong[..., 2] > 0) & (cleaned[..., 2] == 0)).tolist()
    assert removed == [[f, 4] for f in frames]
    repaired = main_person_poses([pose[None] for pose in wrong], 256, 256, "", smoothing_window=5)
    assert (
        np.abs(repaired[..., :2] - poses[..., :2]).max() < 27
    )  # of 80; the wrist moves at most 27 px in two frames


def test_smoothing_trusts_joints_of_high_score() -> None:
    line = np.stack([body(50 + 3 * f, 60, 100) for f in range(15)])
    noisy = line.copy()
    noisy[7, 4, :2] += 10
    errors = []
    for score in (1.0, 0.1):
        noisy[7, 4, 2] = score
        errors.append(np.abs(smooth_poses(noisy, 7)[7, 4, :2] - line[7, 4, :2]).max())
    # A parabola fitted to 7 equal weights has weight 1/3 at its center; with 0.1: 1 / (1 + 20) (weighted least squares).
    np.testing.assert_allclose(errors, [10 / 3, 10 / 21], rtol=1e-3)


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
