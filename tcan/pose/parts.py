"""Keypoints of bodies with hands and faces: one array `[..., 130, 3]`.

The first 18 points are the joints of `tcan.pose.skeleton`. The hands have OpenPose's 21 points each, the face has its 70 points.
Keypoints `[..., 18, 3]` are bodies without hands and face. Tracking and retargeting follow the joints; the points of a hand move
with its wrist, those of the face with the nose.
"""

import numpy as np
from numpy.typing import NDArray

from tcan.pose.skeleton import LEFT_WRIST, NOSE, RIGHT_WRIST

Keypoints = NDArray[np.float32]

BODY = slice(0, 18)
LEFT_HAND, RIGHT_HAND, FACE = slice(18, 39), slice(39, 60), slice(60, 130)
HANDS = slice(18, 60)
NUM_POINTS = 130
ANCHORS = ((LEFT_HAND, LEFT_WRIST), (RIGHT_HAND, RIGHT_WRIST), (FACE, NOSE))
"""Points of each part, and the joint with which they move."""


def join_parts(
    bodies: Keypoints, hands: Keypoints | None = None, faces: Keypoints | None = None
) -> Keypoints:
    """Keypoints `[..., 130, 3]`; without hands and faces, a copy of the bodies `[..., 18, 3]`.

    Args:
        hands: `[..., 2, 21, 3]` or `[..., 42, 3]`: left hand, right hand. None: not found.
        faces: `[..., 70, 3]`. None: not found.
    """
    if hands is None and faces is None:
        return bodies.copy()
    points = np.zeros((*bodies.shape[:-2], NUM_POINTS, 3), np.float32)
    points[..., BODY, :] = bodies
    if hands is not None:
        points[..., HANDS, :] = hands.reshape(points[..., HANDS, :].shape)
    if faces is not None:
        points[..., FACE, :] = faces
    return points


def keep_parts(keypoints: Keypoints, hands: bool = False, face: bool = False) -> Keypoints:
    """Keypoints `[..., 18, 3]` or `[..., 130, 3]` without the parts that are not kept; without parts, `[..., 18, 3]`."""
    if keypoints.shape[-2] == BODY.stop or not (hands or face):
        return keypoints[..., BODY, :]
    points = keypoints.copy()
    if not hands:
        points[..., HANDS, :] = 0
    if not face:
        points[..., FACE, :] = 0
    return points


def move_parts(
    keypoints: Keypoints, bodies: Keypoints, scales: dict[int, NDArray[np.float64]] | None = None
) -> Keypoints:
    """Moved bodies with the hands and the face of the keypoints.

        point = point + anchor's movement + (point - anchor's old position) * (scale - 1)

    So points stay exactly where they are if their anchor does not move: drawing rounds positions down. A part whose anchor was
    not found, before or after the movement, is all 0.

    Args:
        keypoints: `[..., 18, 3]` or `[..., 130, 3]`, before the movement.
        bodies: their joints `[..., 18, 3]` after it.
        scales: for each anchor, `[...]`; None: 1.
    """
    if keypoints.shape[-2] == BODY.stop:
        return bodies
    result = np.zeros_like(keypoints)
    result[..., BODY, :] = bodies
    for part, anchor in ANCHORS:
        old, new = keypoints[..., anchor, None, :], bodies[..., anchor, None, :]
        points = keypoints[..., part, :]
        scale = 1.0 if scales is None else scales[anchor][..., None, None]
        moved = points.copy()
        moved[..., :2] += new[..., :2] - old[..., :2] + (points[..., :2] - old[..., :2]) * (scale - 1)
        found = (points[..., 2:] > 0) & (old[..., 2:] > 0) & (new[..., 2:] > 0)
        result[..., part, :] = np.where(found, moved, 0)
    return result
