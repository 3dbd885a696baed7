"""Metrics compared with values computed by hand."""

import numpy as np
import pytest
import torch

from tcan.metrics import (
    background_mask,
    colour_distance,
    flicker,
    image_metrics,
    joint_errors,
    l1_disco,
    mean_pose,
    part_colours,
    pose_metrics,
    psnr_uint8_overflow,
    ssim_disco,
)


def standing_pose() -> np.ndarray:
    """Keypoints `[1, 18, 3]` of a standing person in an image of 100 x 100."""
    positions = [
        (50, 20), (50, 30), (42, 30), (38, 42), (36, 54), (58, 30), (62, 42), (64, 54), (45, 56), (45, 72), (45, 88),
        (55, 56), (55, 72), (55, 88), (48, 18), (52, 18), (46, 19), (54, 19),
    ]  # fmt: skip
    return np.array([[(x, y, 1) for x, y in positions]], dtype=np.float32)


def test_identical_frames_have_perfect_image_metrics() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert image_metrics(frames, frames) == {"l1": 0, "psnr": np.inf, "ssim": pytest.approx(1)}


def test_l1_and_psnr_follow_their_formulas() -> None:
    # The difference is +10 or -10 everywhere; uint8 differences would wrap around.
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


def test_overflowing_psnr_wraps_the_square_of_the_difference() -> None:
    truth = np.full((1, 16, 16, 3), 100, np.uint8)
    for difference, wrapped_square in ((10, 100), (-10, 100), (17, 289 - 256), (-100, 10000 % 256), (5, 25)):
        result = (truth.astype(int) + difference).astype(np.uint8)
        expected = 10 * np.log10(255**2 / wrapped_square)
        assert psnr_uint8_overflow(result, truth) == pytest.approx(expected, rel=1e-12)
    # 16² = 256 wraps to 0, for which the published scripts return 100.
    assert psnr_uint8_overflow(truth + 16, truth) == psnr_uint8_overflow(truth, truth) == 100


def test_overflowing_psnr_equals_the_mean_of_squares_modulo_256() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32, 3), dtype=np.uint8)
    squares = (frames[0].astype(np.int64) - frames[1]) ** 2 % 256
    tensors = torch.from_numpy(frames)
    assert squares.sum() == ((tensors[0] - tensors[1]) ** 2).sum()  # torch: the same overflow
    expected = np.mean([10 * np.log10(255**2 / frame.mean()) for frame in squares])
    assert psnr_uint8_overflow(*frames) == pytest.approx(expected, rel=1e-12)
    assert image_metrics(*frames)["psnr"] < 9 < 27 < expected  # unrelated images


def test_overflowing_psnr_rejects_other_types_and_shapes() -> None:
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    for other in (frames.astype(np.float32), frames[:, :8]):
        with pytest.raises(ValueError, match="must"):
            psnr_uint8_overflow(other, frames)


def test_l1_of_the_published_scripts_is_divided_by_the_number_of_pixels() -> None:
    truth = np.full((2, 256, 256, 3), 100, np.uint8)
    assert l1_disco(truth - 24, truth) == pytest.approx(24 / 256**2)  # 3.66e-4, a usual published value
    assert l1_disco(truth[:, ::2, ::2] - 24, truth[:, ::2, ::2]) == pytest.approx(4 * 24 / 256**2)


def test_ssim_of_the_published_scripts_uses_grey_images_and_unbiased_covariances() -> None:
    # Columns with the period of the window: each window contains each of the 7 values 7 times.
    columns = np.random.default_rng(0).integers(0, 256, (2, 7), dtype=np.uint8)
    result, truth = (
        np.broadcast_to(np.tile(c, 6)[None, None, :, None], (2, 20, 42, 3)).copy() for c in columns
    )
    a, b = (np.repeat(column, 7).astype(np.float64) for column in columns)
    (aa, ab), (_, bb) = np.cov(a, b, ddof=1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    means = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
    expected = means * (2 * ab + c2) / (aa + bb + c2)
    assert ssim_disco(result, truth) == pytest.approx(expected, rel=1e-9)
    # BT.601 weights of the channels: a red difference of 100 is a grey difference of 30.
    truth = np.full((1, 16, 16, 3), 100, np.uint8)
    red = truth + np.array([100, 0, 0], np.uint8)
    assert ssim_disco(red, truth) == pytest.approx((2 * 130 * 100 + c1) / (130**2 + 100**2 + c1), rel=1e-9)


def test_pose_metrics_count_joints_by_their_distance() -> None:
    truth = standing_pose()
    found = truth.copy()
    found[0, 4, 0] += 4  # wrist, 4 % of the height: within 5 % and 10 %
    found[0, 7, 1] += 8  # wrist, 8 %: within 10 % only
    found[0, 3, 0] += 30  # elbow, 30 %: outside both
    found[0, 10] = 0  # ankle, not detected: an error
    found[0, 0, 0] += 40  # nose, missing in the truth: ignored
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


def test_mean_pose_ignores_undetected_joints() -> None:
    first, second = standing_pose(), standing_pose()
    second[0, :, :2] += 10
    second[0, 4] = 0
    mean = mean_pose([first, second])
    np.testing.assert_allclose(mean[0], [55, 25, 1])
    np.testing.assert_allclose(mean[4], first[0, 4])


def test_flicker_is_the_standard_deviation_outside_the_person() -> None:
    poses = np.repeat(standing_pose(), 4, axis=0)
    mask = background_mask(poses, 100, 100, margin=0.1)
    assert not mask[50, 50] and not mask[20, 50] and not mask[88, 50]
    assert mask[5, 5] and mask[95, 95]
    assert not mask[88, 45 - 9] and mask[88, 45 - 12]  # the margin around the ankle is 10 pixels
    frames = np.full((4, 100, 100, 3), 100, np.uint8)
    frames[:, ~mask] = np.random.default_rng(0).integers(
        0, 256, (4, (~mask).sum(), 3)
    )  # motion of the person is ignored
    assert flicker(frames, mask) == 0
    frames[::2, mask] += 6  # 100, 106, 100, 106: deviation 3
    assert flicker(frames, mask) == pytest.approx(3)


def test_background_mask_of_two_or_fewer_joints() -> None:
    none = np.zeros((1, 18, 3), np.float32)
    assert background_mask(none, 20, 20).all()
    for count in (1, 2):
        few = none.copy()
        few[0, :count] = (10, 10, 1)
        assert not background_mask(few, 20, 20)[10, 10]


def test_flicker_is_nan_without_background() -> None:
    assert np.isnan(flicker(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((4, 4), bool)))


def test_colour_distance_is_independent_of_the_pose() -> None:
    """The same colours at another position have a small distance; other colours have their dE."""

    def dress(pose: np.ndarray, shirt: tuple, trousers: tuple) -> np.ndarray:
        frame = np.full((100, 100, 3), 255, np.uint8)
        waist = int(pose[8, 1])
        left, right = int(pose[:, 0].min()) - 5, int(pose[:, 0].max()) + 5
        frame[: waist + 1, left:right] = shirt
        frame[waist + 1 :, left:right] = trousers
        return frame

    pose, shifted = standing_pose()[0], standing_pose()[0]
    shifted[:, :2] += (12, -6)
    red, blue, black, white = (200, 30, 30), (30, 30, 200), (0, 0, 0), (255, 255, 255)
    reference = part_colours(dress(pose, red, blue)[None], pose[None], radius=0.01)[0]
    same = part_colours(dress(shifted, red, blue)[None], shifted[None], radius=0.01)
    assert colour_distance(same, reference)[0] < 3  # parts at the waist contain both colours
    dark = part_colours(dress(pose, black, black)[None], pose[None])[0]
    light = part_colours(dress(shifted, white, white)[None], shifted[None])
    np.testing.assert_allclose(colour_distance(light, dark), 100, atol=0.1)  # L = 0 and L = 100


def test_colour_distance_ignores_parts_missing_in_either_image() -> None:
    pose = standing_pose()
    colours = part_colours(np.full((1, 100, 100, 3), 50, np.uint8), pose)
    assert not np.isnan(colours).any()
    pose[0, 4] = 0
    assert np.isnan(part_colours(np.full((1, 100, 100, 3), 50, np.uint8), pose)).any()
    nothing = part_colours(np.zeros((1, 100, 100, 3), np.uint8), np.zeros_like(pose))
    assert np.isnan(colour_distance(nothing, colours[0])).all()
