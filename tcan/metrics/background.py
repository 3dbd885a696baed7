"""Flicker: variation of the background over time in a generated video with a static background."""

from contextlib import suppress

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt
from scipy.spatial import ConvexHull, QhullError


def background_mask(poses: np.ndarray, height: int, width: int, margin: float = 0.10) -> np.ndarray:
    """Return the mask of pixels that the person covers in no frame of a clip.

    The person's area in a frame is the convex hull of the detected joints, dilated by the margin to include body, hair
    and clothes outside the joints.

    Args:
        poses: keypoints `[F, 18, 3]` in pixels of the image.
        height, width: size of the image in pixels.
        margin: dilation as a fraction of the height.

    Returns:
        bool `[height, width]`, True for background.
    """
    drawing = Image.new("1", (width, height))
    draw = ImageDraw.Draw(drawing)
    for pose in poses:
        points = pose[pose[:, 2] > 0, :2].astype(np.float64)
        with suppress(QhullError, ValueError):  # fewer than 3 points, or collinear: draw the line
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
    """Return the temporal standard deviation, averaged over masked pixels and channels, on the scale 0..255.

    Args:
        frames: uint8 `[F, H, W, 3]`.
        mask: bool `[H, W]`, True for background.

    Returns:
        0 for a static background; NaN if the mask is empty.
    """
    pixels = frames[:, mask].astype(np.float64)  # [F, P, 3]
    return float(pixels.std(axis=0).mean()) if mask.any() else float("nan")
