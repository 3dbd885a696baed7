"""Likeness of a person in two images, whatever the two poses: the colours of the same parts of the body."""

import cv2
import numpy as np

from tcan.pose.skeleton import DRAWN_LIMBS, LIMBS

PARTS = (*LIMBS[:DRAWN_LIMBS], (2, 8), (5, 11), (4, 4), (7, 7), (10, 10), (13, 13))
"""Pairs of joints whose joining line runs over one part of the body: limbs, the flanks; a joint with itself is the end
of its limb, where the skin or the shoe begins."""


def part_colours(frames: np.ndarray, poses: np.ndarray, radius: float = 0.02) -> np.ndarray:
    """Mean CIELAB colour of each part of the body in each frame.

    A part is what lies within `radius` (a share of the image's height) of the line between its two joints. What
    covers it there, such as an arm before the chest, is measured with it.

    Args:
        frames: uint8 RGB `[F, H, W, 3]`.
        poses: keypoints `[F, 18, 3]` in pixels of the frames.

    Returns:
        `[F, len(PARTS), 3]`, L in 0..100; NaN where a joint of the part is missing or the part is out of the image.
    """
    height, width = frames.shape[1:3]
    colours = np.full((len(frames), len(PARTS), 3), np.nan)
    y, x = np.mgrid[:height, :width]
    places = np.stack([x, y], axis=-1) + 0.5  # [H, W, 2]: pixel centres
    for i, (frame, pose) in enumerate(zip(frames, poses, strict=True)):
        lab = cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        for j, (start, end) in enumerate(PARTS):
            if pose[start, 2] > 0 and pose[end, 2] > 0:
                near = _distance_to_segment(places, pose[start, :2], pose[end, :2]) <= radius * height
                if near.any():
                    colours[i, j] = lab[near].mean(axis=0)
    return colours


def colour_distance(result: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean over the parts that both show of the colour difference CIE76, dE = |Lab_1 - Lab_2|, per frame.

    Two patches beside each other are told apart from about dE = 2; black and white are 100 apart.

    Args:
        result: `part_colours` of a clip, `[F, P, 3]`.
        reference: `part_colours` of the reference image, `[P, 3]`.

    Returns:
        `[F]`, NaN for a frame that shares no part with the reference.
    """
    differences = np.linalg.norm(result - reference, axis=-1)
    shared = ~np.isnan(differences)
    count = shared.sum(axis=-1)
    return np.where(count, np.where(shared, differences, 0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def _distance_to_segment(places: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    along = end - start
    share = ((places - start) @ along) / max(float(along @ along), 1e-12)
    nearest = start + np.clip(share, 0, 1)[..., None] * along
    return np.linalg.norm(places - nearest, axis=-1)
