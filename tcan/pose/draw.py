"""Pose images in the style on which the OpenPose ControlNet was trained."""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from tcan.pose.skeleton import DRAWN_LIMBS, LIMBS

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


def draw_poses(
    keypoints: NDArray[np.float32], height: int, width: int, stick_width: int = 4
) -> NDArray[np.uint8]:
    """Draw keypoints `[F, 18, 3]`, or of several people `[F, P, 18, 3]`, in pixels on black RGB images `[F, height, width, 3]`; joints of score 0 are omitted.

    Limbs are ellipses of half-width `stick_width` pixels at 60% of their color's brightness. Joints are circles of
    radius `stick_width`. The default of 4 gives the strokes of controlnet_aux, which are designed for 512 x 512.
    """
    images = np.zeros((len(keypoints), height, width, 3), np.uint8)
    people = np.asarray(keypoints, np.float64).reshape(len(keypoints), -1, 18, 3)
    for image, joints in ((images[frame], body) for frame, bodies in enumerate(people) for body in bodies):
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
    return images
