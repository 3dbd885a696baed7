"""Pose images in the style on which the OpenPose ControlNet was trained, or as dense body maps."""

import colorsys
import math
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from tcan.pose.body_map import draw_body_map
from tcan.pose.parts import ANCHORS, BODY, FACE
from tcan.pose.skeleton import DRAWN_LIMBS, LIMBS

PoseStyle = Literal["skeleton", "body_map"]
COLORS = (
    (255, 0, 0),
    (255, 85, 0),
    (255, 170, 0),
    (255, 255, 0),
    (170, 255, 0),
    (85, 255, 0),
    (0, 255, 0),
    (0, 255, 85),
    (0, 255, 170),
    (0, 255, 255),
    (0, 170, 255),
    (0, 85, 255),
    (0, 0, 255),
    (85, 0, 255),
    (170, 0, 255),
    (255, 0, 255),
    (255, 0, 170),
    (255, 0, 85),
)
HAND_COLOR, FACE_COLOR = (0, 0, 255), (255, 255, 255)
HAND_EDGES = [
    (0 if joint == 1 else first + joint - 1, first + joint)
    for first in range(0, 20, 4)
    for joint in range(1, 5)
]
"""(start, end) points of the bones of a hand, from the wrist to the tip of each finger."""
EDGE_COLORS = [
    tuple(255 * channel for channel in colorsys.hsv_to_rgb(number / len(HAND_EDGES), 1, 1))
    for number in range(len(HAND_EDGES))
]


def draw_poses(
    keypoints: NDArray[np.float32],
    height: int,
    width: int,
    stick_width: int = 4,
    style: PoseStyle = "skeleton",
) -> NDArray[np.uint8]:
    """Draw keypoints `[F, N, 3]`, or of several people `[F, P, N, 3]`, in pixels on black RGB images `[F, height, width, 3]`.

    N is 18, or 130 to draw hands and face, too (see `tcan.pose.parts`). Points of score 0 are omitted; so are hands without
    a wrist and faces without a nose.

    Limbs are ellipses of half-width `stick_width` pixels at 60% of their color's brightness. Joints and points of hands are
    circles of radius `stick_width`; bones of hands are 50%, points of the face 75% of it. The default of 4 gives the strokes of
    controlnet_aux, which are designed for 512 x 512. With the style "body_map", the body is drawn as in `tcan.pose.body_map`.
    """
    images = np.zeros((len(keypoints), height, width, 3), np.uint8)
    people = [bodies.reshape(-1, *keypoints.shape[-2:]) for bodies in np.asarray(keypoints, np.float64)]
    for image, points in ((images[frame], body) for frame, bodies in enumerate(people) for body in bodies):
        joints = points[BODY]
        if style == "body_map":
            draw_body_map(image, joints)
        else:
            _draw_skeleton(image, joints, stick_width)
        if len(points) > len(joints):
            _draw_parts(image, points, stick_width)
    return images


def _draw_skeleton(image: NDArray[np.uint8], joints: NDArray[np.float64], stick_width: int) -> None:
    for (start, end), color in zip(LIMBS[:DRAWN_LIMBS], COLORS, strict=False):
        (x0, y0, s0), (x1, y1, s1) = joints[start], joints[end]
        if s0 <= 0 or s1 <= 0:
            continue
        center = (int((x0 + x1) / 2), int((y0 + y1) / 2))
        axes = (int(math.hypot(x0 - x1, y0 - y1) / 2), stick_width)
        angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
        outline = np.array(cv2.ellipse2Poly(center, axes, angle, 0, 360, 1))
        cv2.fillConvexPoly(image, outline, [int(channel * 0.6) for channel in color])
    for (x, y, score), color in zip(joints, COLORS, strict=True):
        if score > 0:
            cv2.circle(image, (int(x), int(y)), stick_width, color, thickness=-1)


def _draw_parts(image: NDArray[np.uint8], points: NDArray[np.float64], stick_width: int) -> None:
    """Draw the hands and the face of points `[130, 3]`."""
    for part, anchor in ANCHORS:
        if points[anchor, 2] <= 0:
            continue
        found = [(int(x), int(y)) if score > 0 else None for x, y, score in points[part]]
        if part != FACE:
            for (start, end), color in zip(HAND_EDGES, EDGE_COLORS, strict=True):
                if (first := found[start]) and (second := found[end]):
                    cv2.line(image, first, second, color, thickness=max(1, stick_width // 2))
        radius, color = (
            (max(1, round(0.75 * stick_width)), FACE_COLOR) if part == FACE else (stick_width, HAND_COLOR)
        )
        for point in filter(None, found):
            cv2.circle(image, point, radius, color, thickness=-1)
