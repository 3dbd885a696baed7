"""Dense body maps: images of a body whose colors tell the part, as those of DensePose, drawn from keypoints.

DensePose (Güler et al., 2018) finds the parts in an image, so its maps also show the outline of the body and its clothes. These maps
contain no more than the keypoints: the widths of the parts follow from the height of the torso.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from tcan.pose.skeleton import JOINTS

Point = NDArray[np.float64]
R_SHOULDER, L_SHOULDER, R_HIP, L_HIP = (
    JOINTS.index(name) for name in ("right_shoulder", "left_shoulder", "right_hip", "left_hip")
)
NECK = JOINTS.index("neck")
HEAD = [JOINTS.index(name) for name in ("nose", "right_eye", "left_eye", "right_ear", "left_ear")]
SIDES = ("right", "left")
BONES = [
    (JOINTS.index(f"{side}_{start}"), JOINTS.index(f"{side}_{end}"), radius)
    for start, end, radius in (
        ("hip", "knee", 0.16),
        ("knee", "ankle", 0.12),
        ("shoulder", "elbow", 0.1),
        ("elbow", "wrist", 0.08),
    )
    for side in SIDES
]
"""(start, end, half width as a fraction of the torso's height) of the limbs, in the order in which they are drawn."""
ENDS = [
    (JOINTS.index(f"{side}_{joint}"), radius)
    for joint, radius in (("ankle", 0.13), ("wrist", 0.12))
    for side in SIDES
]
"""(joint, radius as a fraction of the torso's height) of feet and hands."""
TORSO_FRONT, TORSO_BACK, HEAD_PART = range(len(BONES) + len(ENDS), len(BONES) + len(ENDS) + 3)
HEAD_RADIUS = 0.35
"""Smallest radius of the head as a fraction of the torso's height."""
LEVELS = (60, 144, 74, 158, 88, 172, 102, 185, 116, 199, 130, 213, 227, 241, 255)
COLORS = cv2.applyColorMap(np.array(LEVELS, np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)[:, 0, ::-1].tolist()
"""Color of each part: limbs, feet and hands in the order of `BONES` and `ENDS`, front of the torso, back, head. As in
DensePose's images, the colors are those of a color scale; the right and the left of a pair are far apart on it."""
SHADES = (1.0, 0.85, 0.7, 0.55)
"""Brightness along a limb from its start to its end, in place of DensePose's coordinate along the part."""


def draw_body_map(image: NDArray[np.uint8], joints: Point) -> None:
    """Draw a body `[18, 3]` on an RGB image `[H, W, 3]`. Parts with joints of score 0 are omitted.

    A body without neck or without hips has no torso; its widths follow from the distance of the shoulders.
    """
    unit = _torso_height(joints)
    for part, (start, end, radius) in enumerate(BONES[:4]):
        _limb(image, joints[start], joints[end], radius * unit, COLORS[part])
    for part, (joint, radius) in enumerate(ENDS[:2], start=len(BONES)):
        _disc(image, joints[joint], radius * unit, COLORS[part])
    corners = joints[[R_SHOULDER, L_SHOULDER, L_HIP, R_HIP]]
    if (corners[:, 2] > 0).all():
        faces_camera = corners[0, 0] <= corners[1, 0]
        color = COLORS[TORSO_FRONT if faces_camera else TORSO_BACK]
        outline = corners[:, :2].round().astype(np.int32)
        cv2.fillConvexPoly(image, cv2.convexHull(outline), color)
        cv2.polylines(image, [outline], True, color, max(1, round(0.2 * unit)))
    head = joints[HEAD]
    head = head[head[:, 2] > 0]
    if len(head):
        radius = max(HEAD_RADIUS * unit, float(np.ptp(head[:, :2], axis=0).max()) / 2)
        _disc(image, np.array([*head[:, :2].mean(axis=0), 1.0]), radius, COLORS[HEAD_PART])
    for part, (start, end, radius) in enumerate(BONES[4:], start=4):
        _limb(image, joints[start], joints[end], radius * unit, COLORS[part])
    for part, (joint, radius) in enumerate(ENDS[2:], start=len(BONES) + 2):
        _disc(image, joints[joint], radius * unit, COLORS[part])


def _torso_height(joints: Point) -> float:
    """Distance from the neck to the center of the hips; without them the distance of the shoulders, else a tenth of the extent."""
    hips = joints[[R_HIP, L_HIP]]
    shoulders = joints[[R_SHOULDER, L_SHOULDER]]
    if joints[NECK, 2] > 0 and (hips[:, 2] > 0).all():
        return float(np.linalg.norm(joints[NECK, :2] - hips[:, :2].mean(axis=0)))
    if (shoulders[:, 2] > 0).all():
        return float(np.linalg.norm(shoulders[0, :2] - shoulders[1, :2]))
    found = joints[joints[:, 2] > 0, :2]
    return float(np.ptp(found, axis=0).max()) / 10 if len(found) else 0.0


def _limb(image: NDArray[np.uint8], start: Point, end: Point, radius: float, color: list[int]) -> None:
    if start[2] <= 0 or end[2] <= 0:
        return
    thickness = max(1, round(2 * radius))
    points = start[:2] + np.linspace(0, 1, len(SHADES) + 1)[:, None] * (end[:2] - start[:2])
    rounded = [tuple(map(int, point)) for point in points.round()]
    for shade, first, second in reversed(list(zip(SHADES, rounded[:-1], rounded[1:], strict=True))):
        cv2.line(image, first, second, [round(shade * channel) for channel in color], thickness)


def _disc(image: NDArray[np.uint8], center: Point, radius: float, color: list[int]) -> None:
    if center[2] > 0:
        x, y = (round(value) for value in center[:2])
        cv2.circle(image, (x, y), max(1, round(radius)), color, thickness=-1)
