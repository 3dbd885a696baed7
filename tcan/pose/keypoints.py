"""Checks and completion of keypoints that come from files, other programs or detectors."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcan.errors import UserError
from tcan.pose.parts import NUM_POINTS
from tcan.pose.skeleton import LEFT_SHOULDER, NECK, RIGHT_SHOULDER

MIN_EXTENT = 2.0
"""Minimum extent of keypoints in pixels. Some programs write coordinates relative to the image size, from 0 to 1."""


def check_keypoints(keypoints: Any, source: str, *, frames: bool) -> None:
    """Check that keypoints are finite numbers: bodies `[18, 3]`, or, of `frames`, `[F, 18, 3]` or `[F, 130, 3]`.

    Args:
        source: name of the keypoints in error messages.

    Raises:
        UserError: another type or shape, NaN or inf.
    """
    expected = "[F, 18, 3]" if frames else "[18, 3]"
    if not isinstance(keypoints, np.ndarray) or keypoints.dtype.kind not in "fiu":
        raise UserError(f"{source}: not a numeric array; pass keypoints {expected}")
    shapes = ((18, 3), (NUM_POINTS, 3)) if frames else ((18, 3),)
    if keypoints.ndim != (3 if frames else 2) or keypoints.shape[-2:] not in shapes or not len(keypoints):
        shape = ", ".join(map(str, keypoints.shape))
        raise UserError(
            f"{source}: shape [{shape}]; pass keypoints {expected} (x, y, score) in OpenPose's 18-point order"
        )
    if not np.isfinite(keypoints).all():
        raise UserError(f"{source}: NaN or inf in the keypoints; set missing joints to 0, 0, 0")


def are_normalized(keypoints: NDArray[np.floating[Any]]) -> bool:
    """Whether the found points of keypoints `[..., 3]` are all within MIN_EXTENT of the origin."""
    xy = keypoints[keypoints[..., 2] > 0, :2]
    return len(xy) > 0 and bool(np.abs(xy).max() <= MIN_EXTENT)


def add_missing_necks(keypoints: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Set each missing neck of keypoints `[..., N, 3]` to the midpoint of the shoulders, if both were found.

    This is the definition of OpenPose's neck: its training data has no annotated neck. The score is the minimum of both.
    """
    shoulders = keypoints[..., [RIGHT_SHOULDER, LEFT_SHOULDER], :]
    addable = (shoulders[..., 2] > 0).all(axis=-1) & ~(keypoints[..., NECK, 2] > 0)
    result = keypoints.copy()
    result[addable, NECK, :2] = shoulders[addable, :, :2].mean(axis=-2)
    result[addable, NECK, 2] = shoulders[addable, :, 2].min(axis=-1)
    return result
