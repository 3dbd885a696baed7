"""Warping error: temporal consistency of a video along its own optical flow."""

import cv2
import numpy as np
from scipy.ndimage import map_coordinates

MIN_SIZE = 12
"""Smallest height and width in pixels for which OpenCV computes the flow."""


def warping_error(frames: np.ndarray) -> float:
    """Return the temporal warping error (Lai et al., ECCV 2018) of a video; pixel values in [0, 1].

    For each pair of adjacent frames: the mean squared difference, over pixels and channels, of frame t and frame t + 1
    warped to t (bilinear, float64). Only pixels with a consistent flow count. The error is the mean over the pairs. The
    flow is OpenCV's DIS flow (Kroeger et al., ECCV 2016) between the grey images of the two frames, in both directions.

    The error does not compare with the truth: it is 0 for a frozen video and decreases with blur. Compare it with the error
    of the source.

    Args:
        frames: uint8 RGB `[F, H, W, 3]`; H and W at least `MIN_SIZE`.

    Returns:
        0 for a static video; NaN for fewer than 2 frames or if no pixel has a consistent flow.

    Raises:
        ValueError: the frames are smaller than `MIN_SIZE`.
    """
    if min(frames.shape[1:3]) < MIN_SIZE:
        raise ValueError(f"frames {frames.shape} must be at least {MIN_SIZE} pixels high and wide")
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    errors = []
    for t in range(len(frames) - 1):
        forward, backward = optical_flow(grey[t], grey[t + 1]), optical_flow(grey[t + 1], grey[t])
        consistent = consistent_flow(forward, backward)
        if consistent.any():
            difference = warp(frames[t + 1], forward) / 255 - frames[t] / 255
            errors.append((difference[consistent] ** 2).mean())
    return float(np.mean(errors)) if errors else float("nan")


def optical_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return OpenCV's DIS flow from the first to the second image, medium preset at full resolution.

    Full resolution instead of the preset's 50 % halves the warping error of small videos without flicker.

    Args:
        first, second: grey, uint8 `[H, W]`.

    Returns:
        float64 `[H, W, 2]`, x and y in pixels.
    """
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)
    pair = np.ascontiguousarray(first), np.ascontiguousarray(second)  # DIS rejects views
    flow = dis.calc(*pair, None)  # type: ignore[call-overload]  # the stub lacks "no initial flow"
    return flow.astype(np.float64)


def warp(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Sample an image at x + flow(x), bilinear; locations outside have the value of the nearest pixel.

    Args:
        image: `[H, W, C]`.
        flow: `[H, W, 2]`, x and y in pixels.

    Returns:
        float64 `[H, W, C]`.
    """
    locations = _targets(flow)
    channels = np.moveaxis(image.astype(np.float64), -1, 0)
    return np.stack(
        [map_coordinates(channel, locations, order=1, mode="nearest") for channel in channels], -1
    )


def consistent_flow(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Return the mask of pixels whose forward flow the backward flow reverts, and which remain in the image.

    With f the forward flow at a pixel and b the backward flow at its target: |f + b|² < 0.01 (|f|² + |b|²) + 0.5, in
    pixels (Sundaram et al., ECCV 2010). It excludes occluded pixels.

    Args:
        forward, backward: `[H, W, 2]`, x and y in pixels.

    Returns:
        bool `[H, W]`.
    """
    height, width = forward.shape[:2]
    y, x = _targets(forward)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    back = warp(backward, forward)
    tolerance = 0.01 * ((forward**2).sum(axis=-1) + (back**2).sum(axis=-1)) + 0.5
    return inside & (((forward + back) ** 2).sum(axis=-1) < tolerance)


def _targets(flow: np.ndarray) -> np.ndarray:
    """Locations `[2, H, W]` (y, x) to which the flow moves the pixels."""
    return np.mgrid[: flow.shape[0], : flow.shape[1]] + np.moveaxis(flow[..., ::-1], -1, 0)
