"""Retargeting of motion to the character's body proportions (TCAN, pose retargeting)."""

import numpy as np
from numpy.typing import NDArray

from tcan.errors import UserError
from tcan.pose.skeleton import JOINTS, MIRROR, NECK, NOSE, PARENTS

MAX_STRETCH = 1.1
"""Maximum length of a bone, relative to its length in the driver's first frame."""
MIN_RATIO = 0.1
"""Minimum length of a character's bone relative to the driver's, both divided by |neck - nose|. A shorter bone points at
the camera, so its length is unknown."""


def retarget(driving: NDArray[np.float32], character: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transfer the motion of driving `[F, 18, 3]` to the proportions, size and position of character `[18, 3]`.

    From the neck outwards, each bone keeps its direction in the frame and gets the length

        character's length * clip(driver's length now / driver's length in the first frame, 0, MAX_STRETCH)

    The clipped factor is the bone's foreshortening. A joint moves with all its descendants. The character's length is
    the maximum of its left and right bone. If the character lacks a bone, or its length is below MIN_RATIO, the length
    is the driver's times the pivot ratio: |neck - nose| of the character divided by the driver's. The neck is at

        character's neck + (driver's neck now - driver's neck in the first frame) * pivot ratio

    The pivot ratio is constant over the video. Computed per frame, it would move the body whenever the head nods.
    If the first frame lacks a joint, the first frame that has it replaces it. A joint that is missing in a frame stays
    missing there, and its descendants attach to the nearest ancestor that was found.

    Raises:
        UserError: the character, or every frame of the driver, lacks neck or nose.
    """
    if not (character[[NECK, NOSE], 2] > 0).all():
        raise UserError(
            "retargeting: the character's neck and nose were not both found; give its keypoints, or disable retargeting"
        )
    found = driving[..., 2] > 0  # [F, 18]
    if not (found[:, NECK] & found[:, NOSE]).any():
        raise UserError(
            "retargeting: no frame has the driver's neck and nose; give another video, or disable retargeting"
        )
    driver_xy = driving[..., :2].astype(np.float64)
    character_xy = character[:, :2].astype(np.float64)

    neck = _interpolate_missing(driver_xy[:, NECK], found[:, NECK])
    pivot = _length(character_xy[NOSE] - character_xy[NECK])
    pivot = pivot / max(_first_length(driver_xy, found, NECK, NOSE), 1e-6)
    # Positions [F, 2] of each joint before and after retargeting, with substitutes for joints that were not found.
    before = {NECK: neck}
    after = {NECK: character_xy[NECK] + (neck - neck[found[:, NECK]][0]) * pivot}
    for joint, parent in PARENTS.items():
        bone = driver_xy[:, joint] - before[parent]
        scale = np.full(len(driving), pivot)
        first = _first_length(driver_xy, found, parent, joint)
        length = _character_length(character_xy, character[:, 2] > 0, parent, joint)
        if length >= MIN_RATIO * first * pivot and length > 0 and first > 0:
            current = _length(bone)
            stretched = length * np.clip(current / first, 0, MAX_STRETCH) / np.maximum(current, 1e-6)
            scale = np.where(found[:, parent], stretched, pivot)
        target = after[parent] + bone * scale[:, None]
        before[joint] = np.where(found[:, joint, None], driver_xy[:, joint], before[parent])
        after[joint] = np.where(found[:, joint, None], target, after[parent])

    result = np.zeros_like(driving)
    for joint in range(len(JOINTS)):
        result[:, joint, :2] = after[joint]
    result[..., 2] = driving[..., 2]
    result[~found] = 0
    return result


def _length(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linalg.norm(vectors, axis=-1)


def _first_length(points: NDArray[np.float64], found: NDArray[np.bool_], a: int, b: int) -> float:
    """Length of a bone in the first frame that has both ends; 0 if no frame has them."""
    frames = np.flatnonzero(found[:, a] & found[:, b])
    return float(_length(points[frames[0], a] - points[frames[0], b])) if len(frames) else 0.0


def _character_length(points: NDArray[np.float64], found: NDArray[np.bool_], a: int, b: int) -> float:
    """Maximum of the lengths of a bone and its mirrored bone in the character; 0 if it has neither."""
    sides = [(a, b), (MIRROR[a], MIRROR[b])]
    return max(
        (float(_length(points[i] - points[j])) for i, j in sides if found[i] and found[j]),
        default=0.0,
    )


def _interpolate_missing(points: NDArray[np.float64], found: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Interpolate missing points `[F, 2]` linearly; before the first and after the last, repeat them."""
    frames, seen = np.arange(len(points)), np.flatnonzero(found)
    return np.stack([np.interp(frames, seen, points[seen, axis]) for axis in (0, 1)], axis=1)
