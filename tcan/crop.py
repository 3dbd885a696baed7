"""Sizes near an aspect ratio, and crops that fit images and keypoints of any size to the size of the output.

The decoder processes of preprocessing import this module, so it does not import torch.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]
"""`(x0, y0, x1, y1)` in pixels of the source image. A box may exceed the image (`pad_box`)."""

Size = tuple[int, int]
"""Height and width in pixels."""


def usual_sizes(side: int) -> list[Size]:
    """Sizes of about the area of a square, with aspect ratios from 1:2 to 2:1, the tallest first.

    Sides are multiples of `side / 8` from 0.75 to 1.5 times `side`: of SD1.5 (512), multiples of 64 from 384 to 768. For each
    height the width with the nearest area is chosen, and the reverse.

    side: side of the square in pixels, a multiple of 64.
    """
    step = side // 8
    sides = range(6 * step, 12 * step + 1, step)
    sizes = set()
    for first in sides:
        second = min(sides, key=lambda other: abs(first * other - side**2))
        sizes |= {(first, second), (second, first)}
    return sorted(sizes, key=lambda size: size[1] / size[0])


def nearest_size(height: float, width: float, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest to that of height and width; of equally near ones the first."""
    return min(sizes, key=lambda size: abs(math.log(height * size[1] / (width * size[0]))))


def crop_box(source_height: int, source_width: int, height: int, width: int) -> Box:
    """Largest centered box with the aspect ratio height : width."""
    scale = min(source_height / height, source_width / width)
    x0, y0 = (source_width - width * scale) / 2, (source_height - height * scale) / 2
    return x0, y0, x0 + width * scale, y0 + height * scale


def pad_box(source_height: int, source_width: int, height: int, width: int) -> Box:
    """Smallest centered box with the aspect ratio height : width that contains the image."""
    scale = max(source_height / height, source_width / width)
    x0, y0 = (source_width - width * scale) / 2, (source_height - height * scale) / 2
    return x0, y0, x0 + width * scale, y0 + height * scale


def fit_image(image: np.ndarray, height: int, width: int, box: Box | None = None) -> np.ndarray:
    """Crop an image and resize it (Lanczos): uint8 RGB `[H, W, 3]` -> `[height, width, 3]`.

    Args:
        box: crop with the aspect ratio of the result; outside of the image, its border pixels are repeated. None: `crop_box`.
    """
    if image.shape[:2] == (height, width):
        return image
    box = box or crop_box(image.shape[0], image.shape[1], height, width)
    outside = max(-box[0], -box[1], box[2] - image.shape[1], box[3] - image.shape[0])
    if (margin := math.ceil(outside)) > 0:
        image = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
        box = (box[0] + margin, box[1] + margin, box[2] + margin, box[3] + margin)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box=box))


def fit_keypoints(
    keypoints: np.ndarray,
    source_height: int,
    source_width: int,
    height: int,
    width: int,
    box: Box | None = None,
) -> np.ndarray:
    """Map keypoints `[..., 18, 3]` from source pixels to pixels of `fit_image`'s result; missing joints stay 0."""
    x0, y0, x1, y1 = box or crop_box(source_height, source_width, height, width)
    fitted = keypoints.copy()
    fitted[..., 0] = (keypoints[..., 0] - x0) * width / (x1 - x0)
    fitted[..., 1] = (keypoints[..., 1] - y0) * height / (y1 - y0)
    return np.where(keypoints[..., 2:] > 0, fitted, 0).astype(np.float32)
