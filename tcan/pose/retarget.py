"""Another body's motion on the character's proportions (TCAN, pose retargeting)."""

import numpy as np
from numpy.typing import NDArray

from tcan.errors import UserError
from tcan.pose.skeleton import JOINTS, MIRROR, NECK, NOSE, PARENTS

MAX_STRETCH = 1.1
"""Most that a bone may exceed its length in the driver's first frame."""
MIN_RATIO = 0.1
"""A bone of the character that is shorter than this share of the driver's (both relative to |neck - nose|) is seen end
on rather than short: its length isn't known."""


def retarget(driving: NDArray[np.float32], character: NDArray[np.float32]) -> NDArray[np.float32]:
    """driving [F, 18, 3] -> its motion with the proportions, size and place of character [18, 3].

    From the neck outwards, every bone keeps its direction in the frame and takes the length

        (the character's) * clip(now / in the driver's first frame, 0, 1.1)

    the clip being its foreshortening, so a joint moves with all that hangs on it. The character's length is the larger
    of its left and right. A bone that the character lacks, or shows at less than a tenth of what it should be, is the
    driver's, times the pivot ratio: |neck - nose| of the character over the driver's. The neck is at

        character's neck + (neck now - neck in the first frame) * pivot ratio

    The pivot ratio is one number for the whole video: taken anew in each frame, it would move the whole body whenever
    the head nods. Wherever the first frame lacks a joint, the first frame that has it stands for it. A joint missing in
    a frame stays missing there, and what hangs on it hangs on the nearest joint inwards that is there.

    Raises UserError if the character, or every frame of the driver, lacks neck or nose.
    """
    if not (character[[NECK, NOSE], 2] > 0).all():
        raise UserError(
            "retargeting needs the character's neck and nose: give its keypoints by hand, or switch it off"
        )
    found = driving[..., 2] > 0  # [F, 18]
    if not (found[:, NECK] & found[:, NOSE]).any():
        raise UserError("retargeting needs the driver's neck and nose in at least one frame: switch it off")
    here = driving[..., :2].astype(np.float64)
    there = character[:, :2].astype(np.float64)

    neck = _bridged(here[:, NECK], found[:, NECK])
    pivot = _length(there[NOSE] - there[NECK]) / max(_first_length(here, found, NECK, NOSE), 1e-6)
    # Of each frame's joints, found or not: where it is in the driver's frame, and where it goes.
    before = {NECK: neck}
    after = {NECK: there[NECK] + (neck - neck[found[:, NECK]][0]) * pivot}
    for joint, parent in PARENTS.items():
        bone = here[:, joint] - before[parent]
        scale = np.full(len(driving), pivot)
        first = _first_length(here, found, parent, joint)
        length = _character_length(there, character[:, 2] > 0, parent, joint)
        if length >= MIN_RATIO * first * pivot and length > 0 and first > 0:
            now = _length(bone)
            stretched = length * np.clip(now / first, 0, MAX_STRETCH) / np.maximum(now, 1e-6)
            scale = np.where(found[:, parent], stretched, pivot)
        moved = after[parent] + bone * scale[:, None]
        before[joint] = np.where(found[:, joint, None], here[:, joint], before[parent])
        after[joint] = np.where(found[:, joint, None], moved, after[parent])

    result = np.zeros_like(driving)
    for joint in range(len(JOINTS)):
        result[:, joint, :2] = after[joint]
    result[..., 2] = driving[..., 2]
    result[~found] = 0
    return result


def _length(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linalg.norm(vectors, axis=-1)


def _first_length(points: NDArray[np.float64], found: NDArray[np.bool_], a: int, b: int) -> float:
    """Length of a bone in the first frame that has both its ends; 0 if none has."""
    frames = np.flatnonzero(found[:, a] & found[:, b])
    return float(_length(points[frames[0], a] - points[frames[0], b])) if len(frames) else 0.0


def _character_length(points: NDArray[np.float64], found: NDArray[np.bool_], a: int, b: int) -> float:
    """The larger of a bone's left and right in the character; 0 if it has neither."""
    sides = [(a, b), (MIRROR[a], MIRROR[b])]
    return max(
        (float(_length(points[i] - points[j])) for i, j in sides if found[i] and found[j]),
        default=0.0,
    )


def _bridged(points: NDArray[np.float64], found: NDArray[np.bool_]) -> NDArray[np.float64]:
    """points [F, 2] with those not found interpolated, and held at both ends."""
    frames, seen = np.arange(len(points)), np.flatnonzero(found)
    return np.stack([np.interp(frames, seen, points[seen, axis]) for axis in (0, 1)], axis=1)
