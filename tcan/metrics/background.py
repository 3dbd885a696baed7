"""Flicker: how much of the result moves where nothing moves in the source."""

from contextlib import suppress

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt
from scipy.spatial import ConvexHull, QhullError


def background_mask(poses: np.ndarray, height: int, width: int, margin: float = 0.10) -> np.ndarray:
    """True where the person is in no frame of a clip.

    The person of a frame: the convex hull of the joints found, widened by `margin` (a share of the height: for flesh,
    hair and clothes beyond the joints). The mask is what all frames leave.

    Args:
        poses: keypoints `[F, 18, 3]` in pixels of the image.

    Returns:
        bool `[height, width]`.
    """
    drawing = Image.new("1", (width, height))
    draw = ImageDraw.Draw(drawing)
    for pose in poses:
        points = pose[pose[:, 2] > 0, :2].astype(np.float64)
        with suppress(QhullError, ValueError):  # fewer than three points, or all in a line: the line itself
            points = points[ConvexHull(points).vertices]
        corners = [tuple(point) for point in points]
        if len(corners) > 2:
            draw.polygon(corners, fill=1)
        if corners:
            draw.line(corners, fill=1)
            draw.point(corners, fill=1)
    person = np.array(drawing)
    if not person.any():
        return np.ones((height, width), dtype=bool)
    return distance_transform_edt(~person) > margin * height


def flicker(frames: np.ndarray, mask: np.ndarray) -> float:
    """Standard deviation over time of each masked pixel and channel, averaged; in grey levels of 255.

    Args:
        frames: uint8 `[F, H, W, 3]`.
        mask: bool `[H, W]`, True where nothing should move.

    Returns:
        0 for a still background; NaN where the mask is empty.
    """
    pixels = frames[:, mask].astype(np.float64)  # [F, P, 3]
    return float(pixels.std(axis=0).mean()) if mask.any() else float("nan")
