"""Pose-independent likeness of a person in two images: colours of the same body parts."""

import cv2
import numpy as np

from tcan.pose.skeleton import DRAWN_LIMBS, LIMBS

PARTS = (*LIMBS[:DRAWN_LIMBS], (2, 8), (5, 11), (4, 4), (7, 7), (10, 10), (13, 13))
"""Body parts as joint pairs (start and end of a line): limbs, flanks, and single joints (wrists and ankles) paired with
themselves, where skin or shoes begin."""


def part_colours(frames: np.ndarray, poses: np.ndarray, radius: float = 0.02) -> np.ndarray:
    """Return the mean CIELAB colour of each body part in each frame.

    A part consists of the pixels within `radius` of the line between its two joints. Occluding parts, such as an arm in
    front of the chest, are included.

    Args:
        frames: uint8 RGB `[F, H, W, 3]`.
        poses: keypoints `[F, 18, 3]` in pixels of the frames.
        radius: as a fraction of the image height.

    Returns:
        `[F, len(PARTS), 3]`, L in 0..100; NaN where a joint of the part is missing or the part is outside the image.
    """
    height, width = frames.shape[1:3]
    colours = np.full((len(frames), len(PARTS), 3), np.nan)
    y, x = np.mgrid[:height, :width]
    centres = np.stack([x, y], axis=-1) + 0.5  # [H, W, 2]: pixel centres
    for i, (frame, pose) in enumerate(zip(frames, poses, strict=True)):
        lab = cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        for j, (start, end) in enumerate(PARTS):
            if pose[start, 2] > 0 and pose[end, 2] > 0:
                near = _distance_to_segment(centres, pose[start, :2], pose[end, :2]) <= radius * height
                if near.any():
                    colours[i, j] = lab[near].mean(axis=0)
    return colours


def colour_distance(result: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the CIE76 colour difference dE = |Lab_1 - Lab_2| per frame, averaged over the parts visible in both.

    Adjacent patches are distinguishable from about dE = 2. The dE of black and white is 100.

    Args:
        result: `part_colours` of a clip, `[F, P, 3]`.
        reference: `part_colours` of the reference image, `[P, 3]`.

    Returns:
        `[F]`, NaN for a frame without a part that is also visible in the reference.
    """
    differences = np.linalg.norm(result - reference, axis=-1)
    shared = ~np.isnan(differences)
    count = shared.sum(axis=-1)
    return np.where(count, np.where(shared, differences, 0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def _distance_to_segment(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of points `[..., 2]` from the line segment between start and end, `[...]`."""
    along = end - start
    fraction = ((points - start) @ along) / max(float(along @ along), 1e-12)
    nearest = start + np.clip(fraction, 0, 1)[..., None] * along
    return np.linalg.norm(points - nearest, axis=-1)
