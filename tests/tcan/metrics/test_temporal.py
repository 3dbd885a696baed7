"""The warping error of synthetic motion with a known flow."""

import cv2
import numpy as np
import pytest

from tcan.metrics import warping_error
from tcan.metrics.temporal import consistent_flow, optical_flow, warp


def texture(size: int = 128, seed: int = 0) -> np.ndarray:
    """A smooth random texture, uint8 `[size, size, 3]` in 30..225."""
    noise = np.random.default_rng(seed).standard_normal((size, size, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 4)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return (30 + 195 * smooth).astype(np.uint8)


def test_static_video_has_no_warping_error() -> None:
    assert warping_error(np.repeat(texture()[None], 3, axis=0)) == 0


def test_translation_has_a_small_warping_error() -> None:
    image = texture(160)
    moving = np.stack([image[16 : 16 + 128, 3 * t : 3 * t + 128] for t in range(5)])
    unwarped = ((moving[1:] / 255 - moving[:-1] / 255) ** 2).mean()
    assert warping_error(moving) < 0.01 * unwarped


def test_flow_of_a_translation_is_its_offset() -> None:
    image = cv2.cvtColor(texture(160), cv2.COLOR_RGB2GRAY)
    flow = optical_flow(image[16:144, 16:144], image[14:142, 13:141])
    np.testing.assert_allclose(flow[16:-16, 16:-16].mean(axis=(0, 1)), (3, 2), atol=0.1)


def test_brightness_flicker_has_its_squared_amplitude() -> None:
    # The flow of DIS is invariant to the brightness of a patch, so the flow remains 0.
    frames = np.repeat(texture()[None], 4, axis=0)
    frames[1::2] += 12
    assert warping_error(frames) == pytest.approx((12 / 255) ** 2, rel=0.02)


def test_independent_noise_has_twice_its_variance() -> None:
    frames = np.repeat(texture()[None], 4, axis=0)
    noise = np.random.default_rng(1).normal(0, 4, frames.shape)
    noisy = np.clip(frames + noise, 0, 255).round().astype(np.uint8)
    # The flow follows some of the noise, which reduces the error.
    assert warping_error(noisy) == pytest.approx(2 * (4 / 255) ** 2, rel=0.3)


def test_warp_samples_at_the_target_of_the_flow() -> None:
    image = np.arange(20.0)[None, :, None] * np.ones((8, 1, 2)) + 100 * np.arange(8.0)[:, None, None]
    flow = np.full((8, 20, 2), (2.25, 1.0))  # x, y
    np.testing.assert_allclose(warp(image, flow)[:7, :17], image[:7, :17] + 2.25 + 100, rtol=1e-12)


def test_flow_that_is_not_reverted_or_leaves_the_image_is_inconsistent() -> None:
    forward = np.zeros((10, 20, 2))
    forward[..., 0] = 5
    backward = -forward
    backward[2, 9] = 0  # target of pixel (2, 4): not reverted
    mask = consistent_flow(forward, backward)
    expected = np.zeros((10, 20), bool)
    expected[:, :15] = True  # the targets of the last 5 columns are outside
    expected[2, 4] = False
    np.testing.assert_array_equal(mask, expected)


def test_occluded_and_uncovered_pixels_do_not_count() -> None:
    """An opaque square that moves over a texture: the flow at its edges is not reverted."""
    background, square = texture(seed=1), 255 - texture(seed=2)[:40, :40]
    frames = np.repeat(background[None], 2, axis=0)
    for t in range(2):
        frames[t, 40:80, 30 + 12 * t : 70 + 12 * t] = square
    flow = optical_flow(*(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames))
    without_mask = ((warp(frames[1], flow) / 255 - frames[0] / 255) ** 2).mean()
    assert warping_error(frames) < 0.5 * without_mask


def test_single_frame_is_nan_and_tiny_frames_raise() -> None:
    assert np.isnan(warping_error(texture()[None]))
    with pytest.raises(ValueError, match="at least 12 pixels"):
        warping_error(np.zeros((2, 11, 64, 3), np.uint8))
