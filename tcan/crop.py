"""Crops that fit images and keypoints of any size to the size of the output.

The decoder processes of preprocessing import this module, so it does not import torch.
"""

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]
"""`(x0, y0, x1, y1)` in pixels of the source image."""


def crop_box(source_height: int, source_width: int, height: int, width: int) -> Box:
    """Largest centered box with the aspect ratio height : width."""
    scale = min(source_height / height, source_width / width)
    x0, y0 = (source_width - width * scale) / 2, (source_height - height * scale) / 2
    return x0, y0, x0 + width * scale, y0 + height * scale


def fit_image(image: np.ndarray, height: int, width: int, box: Box | None = None) -> np.ndarray:
    """Crop an image and resize it (Lanczos): uint8 RGB `[H, W, 3]` -> `[height, width, 3]`.

    Args:
        box: crop with the aspect ratio of the result; None: `crop_box`.
    """
    if image.shape[:2] == (height, width):
        return image
    box = box or crop_box(image.shape[0], image.shape[1], height, width)
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
