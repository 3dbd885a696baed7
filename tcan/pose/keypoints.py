"""Checks and completion of keypoints that come from files, other programs or detectors."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcan.pose.skeleton import LEFT_SHOULDER, NECK, RIGHT_SHOULDER


def add_missing_necks(keypoints: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Set each missing neck of keypoints `[..., 18, 3]` to the midpoint of the shoulders, if both were found.

    This is the definition of OpenPose's neck: its training data has no annotated neck. The score is the minimum of both.
    """
    shoulders = keypoints[..., [RIGHT_SHOULDER, LEFT_SHOULDER], :]
    addable = (shoulders[..., 2] > 0).all(axis=-1) & ~(keypoints[..., NECK, 2] > 0)
    result = keypoints.copy()
    result[addable, NECK, :2] = shoulders[addable, :, :2].mean(axis=-2)
    result[addable, NECK, 2] = shoulders[addable, :, 2].min(axis=-1)
    return result
