"""Each measure against its formula worked out by hand."""

import numpy as np
import pytest

from tcan.metrics import (
    background_mask,
    colour_distance,
    flicker,
    image_metrics,
    joint_errors,
    mean_pose,
    part_colours,
    pose_metrics,
)


def standing_pose() -> np.ndarray:
    """18 joints `[1, 18, 3]` of someone upright in a image of 100 x 100."""
    places = [
        (50, 20), (50, 30), (42, 30), (38, 42), (36, 54), (58, 30), (62, 42), (64, 54), (45, 56), (45, 72), (45, 88),
        (55, 56), (55, 72), (55, 88), (48, 18), (52, 18), (46, 19), (54, 19),
    ]  # fmt: skip
    return np.array([[(x, y, 1) for x, y in places]], dtype=np.float32)


def test_image_metrics_of_equal_frames() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert image_metrics(frames, frames) == {"l1": 0, "psnr": np.inf, "ssim": pytest.approx(1)}


def test_image_metrics_by_formula() -> None:
    # 10 apart everywhere, once over and once under: uint8 differences would wrap around
    truth = np.full((1, 16, 16, 3), 100, np.uint8)
    result = truth.copy()
    result[:, :8] += 10
    result[:, 8:] -= 10
    metrics = image_metrics(result, truth)
    assert metrics["l1"] == pytest.approx(10 / 255, rel=1e-5)
    assert metrics["psnr"] == pytest.approx(20 * np.log10(255 / 10), rel=1e-5)


def test_psnr_is_the_mean_over_frames() -> None:
    truth = np.zeros((2, 16, 16, 3), np.uint8)
    result = np.stack([np.full((16, 16, 3), 1, np.uint8), np.full((16, 16, 3), 100, np.uint8)])
    expected = np.mean([20 * np.log10(255 / 1), 20 * np.log10(255 / 100)])
    assert image_metrics(result, truth)["psnr"] == pytest.approx(expected, rel=1e-5)


def test_pose_metrics_of_shifted_joints() -> None:
    truth = standing_pose()
    found = truth.copy()
    found[0, 4, 0] += 4  # wrist, 4 % of the height: within both
    found[0, 7, 1] += 8  # wrist, 8 %: within 10 % only
    found[0, 3, 0] += 30  # elbow: within neither
    found[0, 10] = 0  # ankle not found: missed
    found[0, 0, 0] += 40  # nose, which the truth lacks: not counted
    truth[0, 0] = 0
    metrics = pose_metrics(found, truth, height=100)
    assert metrics["pose_5"] == pytest.approx(14 / 17)
    assert metrics["pose_10"] == pytest.approx(15 / 17)
    assert metrics["pose_5_wrists"] == 0.5
    assert metrics["pose_10_wrists"] == 1
    assert metrics["pose_5_elbows"] == metrics["pose_10_elbows"] == 0.5
    assert metrics["pose_5_ankles"] == 0.5
    assert metrics["pose_error"] == pytest.approx((0.04 + 0.08 + 0.30) / 16)
    errors = joint_errors(found, truth, height=100)
    assert np.isnan(errors[0, 0]) and np.isinf(errors[0, 10])


def test_mean_pose_leaves_out_joints_not_found() -> None:
    first, second = standing_pose(), standing_pose()
    second[0, :, :2] += 10
    second[0, 4] = 0
    mean = mean_pose([first, second])
    np.testing.assert_allclose(mean[0], [55, 25, 1])
    np.testing.assert_allclose(mean[4], first[0, 4])


def test_flicker_is_the_deviation_outside_the_person() -> None:
    poses = np.repeat(standing_pose(), 4, axis=0)
    mask = background_mask(poses, 100, 100, margin=0.1)
    assert not mask[50, 50] and not mask[20, 50] and not mask[88, 50]
    assert mask[5, 5] and mask[95, 95]
    assert not mask[88, 45 - 9] and mask[88, 45 - 12]  # the margin is 10 pixels beside the ankle
    frames = np.full((4, 100, 100, 3), 100, np.uint8)
    frames[:, ~mask] = np.random.default_rng(0).integers(0, 256, (4, (~mask).sum(), 3))  # the person may move
    assert flicker(frames, mask) == 0
    frames[::2, mask] += 6  # 100, 106, 100, 106: deviation 3
    assert flicker(frames, mask) == pytest.approx(3)


def test_background_of_few_joints_and_of_none() -> None:
    none = np.zeros((1, 18, 3), np.float32)
    assert background_mask(none, 20, 20).all()
    for count in (1, 2):
        few = none.copy()
        few[0, :count] = (10, 10, 1)
        assert not background_mask(few, 20, 20)[10, 10]


def test_flicker_without_background_is_nan() -> None:
    assert np.isnan(flicker(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((4, 4), bool)))


def test_likeness_does_not_depend_on_the_pose() -> None:
    """The same three colours on the same parts in another place: no distance; other colours: their dE."""

    def dress(pose: np.ndarray, shirt: tuple, trousers: tuple) -> np.ndarray:
        frame = np.full((100, 100, 3), 255, np.uint8)
        waist = int(pose[8, 1])
        left, right = int(pose[:, 0].min()) - 5, int(pose[:, 0].max()) + 5
        frame[: waist + 1, left:right] = shirt
        frame[waist + 1 :, left:right] = trousers
        return frame

    pose, moved = standing_pose()[0], standing_pose()[0]
    moved[:, :2] += (12, -6)
    red, blue, black, white = (200, 30, 30), (30, 30, 200), (0, 0, 0), (255, 255, 255)
    reference = part_colours(dress(pose, red, blue)[None], pose[None], radius=0.01)[0]
    same = part_colours(dress(moved, red, blue)[None], moved[None], radius=0.01)
    assert colour_distance(same, reference)[0] < 3  # what parts at the waist take of the other colour
    dark = part_colours(dress(pose, black, black)[None], pose[None])[0]
    light = part_colours(dress(moved, white, white)[None], moved[None])
    np.testing.assert_allclose(colour_distance(light, dark), 100, atol=0.1)  # L is 0 and 100


def test_likeness_leaves_out_parts_that_either_lacks() -> None:
    pose = standing_pose()
    colours = part_colours(np.full((1, 100, 100, 3), 50, np.uint8), pose)
    assert not np.isnan(colours).any()
    pose[0, 4] = 0
    assert np.isnan(part_colours(np.full((1, 100, 100, 3), 50, np.uint8), pose)).any()
    nothing = part_colours(np.zeros((1, 100, 100, 3), np.uint8), np.zeros_like(pose))
    assert np.isnan(colour_distance(nothing, colours[0])).all()
