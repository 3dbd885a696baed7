"""Retargeting of motion to the character's body proportions (TCAN, pose retargeting)."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tcan.errors import UserError
from tcan.pose.keypoints import are_normalized, check_keypoints
from tcan.pose.parts import BODY, move_parts
from tcan.pose.skeleton import JOINTS, MIRROR, NECK, NOSE, PARENTS, PROPORTIONS

Method = Literal["robust", "paper"]
"""Estimates of bone lengths, see `retarget`."""

MAX_STRETCH = 1.1
"""Maximum length of a bone, relative to its full length in the driver."""
MIN_RATIO = 0.1
"""Minimum length of a character's bone relative to the driver's, both divided by |neck - nose|. A shorter bone points at
the camera, so its length is unknown."""
FORESHORTENED = 0.4
"""The same limit for the robust method, relative to the other side or to the body scale: real
proportions differ less between characters. Also the limit of a driver's bone relative to human proportions."""
MIN_BONES = 4
"""Minimum number of a driver's bones, one side, that define its size."""
NEAR_FULL = 0.8
"""A frame shows a bone at nearly full length from this fraction of the 75th percentile of its lengths."""
SCALE_JOINTS = (NOSE, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)
"""Joints whose bones define the body scale; those of eyes and ears have the scale of the head."""

logger = logging.getLogger(__name__)


@dataclass
class _Lengths:
    """Bone lengths by the joint at the end of the bone, in pixels."""

    driver: dict[int, float]
    """Full length in the driver; 0 if no frame has the bone."""
    character: dict[int, float]
    """Length of the character's bone; 0: the driver's length times `scale`."""
    scale: dict[int, float]
    pivot: float
    """Scale of the neck's movement."""


def retarget(
    driving: NDArray[np.float32], character: NDArray[np.float32], method: Method = "robust"
) -> NDArray[np.float32]:
    """Transfer the motion of driving `[F, N, 3]` to the proportions, size and position of character `[18, 3]`.

    From the neck outwards, each bone keeps its direction in the frame and gets the length

        character's length * clip(driver's length now / driver's full length, 0, MAX_STRETCH)

    The clipped factor is the bone's foreshortening. A joint moves with all its descendants. The character's length is
    the maximum of its left and right bone. The neck is at

        character's neck + (driver's neck now - driver's neck in the first frame) * pivot ratio

    The pivot ratio is |neck - nose| of the character divided by the driver's full length of that bone. It is constant
    over the video. Computed per frame, it would move the body whenever the head nods. A joint that is missing in a frame
    stays missing there, and its descendants attach to the nearest ancestor that was found: both lengths above are then the sums
    over the bones between them.

    Points of a hand (N = 130) move with the wrist and have the scale of the forearm; those of the face move with the nose and have
    the scale of the bone from neck to nose. Without wrist or nose, they are missing.

    method "paper": the driver's full length is the length in the first frame that has the bone. If the character lacks a
    bone, or its length is below MIN_RATIO, the length is the driver's times the pivot ratio.

    method "robust": the driver's full length is the median over the frames that show the bone at nearly full length
    (NEAR_FULL), and the maximum of both sides. Therefore, it does not depend on a bowed head or on an arm that points at
    the camera in the first frame. A bone that is foreshortened in all frames (a seated driver, a driver in profile) has the
    length of human proportions (PROPORTIONS). The body scale is the median ratio of the character's and the driver's bones. A bone
    that the character lacks, or that is below FORESHORTENED of the length given by the body scale, gets that length.
    Warnings of this module's logger name the joints.

    Raises:
        UserError: keypoints of another shape, NaN or inf; the character, or every frame of the driver, lacks neck or nose, or has both at the same position; an
            unknown method.
    """
    if method not in get_args(Method):
        raise UserError(f"retargeting = {method}: unknown method; use {' or '.join(get_args(Method))}")
    check_keypoints(driving, "the driving poses", frames=True)
    check_keypoints(character, "the character", frames=False)
    keypoints, driving = driving, driving[:, BODY]
    if are_normalized(character):
        raise UserError("the character: keypoints from 0 to 1; give them in pixels of the image")
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
    estimate = _robust_lengths if method == "robust" else _paper_lengths
    lengths = estimate(driver_xy, found, character_xy, character[:, 2] > 0)
    _warn(np.flatnonzero(~found.any(axis=0)), "not found in any driving pose: %s; not drawn")

    neck = _interpolate_missing(driver_xy[:, NECK], found[:, NECK])
    target = character_xy[NECK] + (neck - neck[found[:, NECK]][0]) * lengths.pivot
    moved, scales = _move_joints(driver_xy, found, neck, target, lengths)
    result = np.zeros_like(driving)
    for joint in range(len(JOINTS)):
        result[:, joint, :2] = moved[joint]
    result[..., 2] = driving[..., 2]
    result[~found] = 0
    return move_parts(keypoints, result, scales)


def _move_joints(
    driver_xy: NDArray[np.float64],
    found: NDArray[np.bool_],
    neck: NDArray[np.float64],
    target: NDArray[np.float64],
    lengths: _Lengths,
) -> tuple[dict[int, NDArray[np.float64]], dict[int, NDArray[np.float64]]]:
    """Positions `[F, 2]` of the joints after retargeting, and scales `[F]` of their bones.

    Args:
        neck, target: positions `[F, 2]` of the neck before and after retargeting.
    """
    # With substitutes for joints that were not found.
    before, after = {NECK: neck}, {NECK: target}
    # Lengths of the bones from the nearest ancestor that was found [F]; NaN: unknown.
    driver_reach = {NECK: np.zeros(len(neck))}
    character_reach = {NECK: np.zeros(len(neck))}
    scales = {}
    for joint, parent in PARENTS.items():
        bone = driver_xy[:, joint] - before[parent]
        known = lengths.driver[joint] > 0 and lengths.character[joint] > 0
        full = driver_reach[parent] + (lengths.driver[joint] if known else np.nan)
        length = character_reach[parent] + (lengths.character[joint] if known else np.nan)
        current = _length(bone)
        scale = length * np.clip(current / full, 0, MAX_STRETCH) / np.maximum(current, 1e-6)
        scales[joint] = np.where(np.isnan(scale), lengths.scale[joint], scale)
        here = found[:, joint]
        before[joint] = np.where(here[:, None], driver_xy[:, joint], before[parent])
        after[joint] = np.where(here[:, None], after[parent] + bone * scales[joint][:, None], after[parent])
        driver_reach[joint] = np.where(here, 0, full)
        character_reach[joint] = np.where(here, 0, length)
    return after, scales


def _paper_lengths(
    driver_xy: NDArray[np.float64],
    found: NDArray[np.bool_],
    character_xy: NDArray[np.float64],
    character_found: NDArray[np.bool_],
) -> _Lengths:
    driver = {j: _first_length(_bone_lengths(driver_xy, found, j)) for j in PARENTS}
    head = float(_length(character_xy[NOSE] - character_xy[NECK]))
    pivot = _ratio(head, driver[NOSE])
    character = {}
    for joint in PARENTS:
        length = max(_side_lengths(character_xy, character_found, joint))
        character[joint] = length if length >= MIN_RATIO * driver[joint] * pivot else 0.0
    return _Lengths(driver, character, dict.fromkeys(PARENTS, pivot), pivot)


def _robust_lengths(
    driver_xy: NDArray[np.float64],
    found: NDArray[np.bool_],
    character_xy: NDArray[np.float64],
    character_found: NDArray[np.bool_],
) -> _Lengths:
    one_side = {j: _full_length(_bone_lengths(driver_xy, found, j)) for j in PARENTS}
    driver = _plausible_lengths({j: max(one_side[j], one_side[MIRROR[j]]) for j in PARENTS})
    sides = {j: _side_lengths(character_xy, character_found, j) for j in PARENTS}
    character = {j: max(sides[j]) for j in PARENTS}
    # Left and right have equal lengths now, so each pair of bones counts once.
    ratios = [character[j] / driver[j] for j in SCALE_JOINTS if j <= MIRROR[j] and character[j] and driver[j]]
    body = _ratio(float(np.median(ratios)) if ratios else 0.0, 1.0)

    missing: list[int] = []
    short: list[int] = []
    mirrored: list[int] = []
    for joint in SCALE_JOINTS:
        plausible = FORESHORTENED * body * driver[joint]
        if character[joint] < plausible:
            (short if character_found[joint] else missing).append(joint)
            character[joint] = body * driver[joint]
        elif 0 < sides[joint][0] < FORESHORTENED * sides[joint][1]:
            mirrored.append(joint)
    _warn(missing, "not found in the image: %s; bone lengths are estimated from the body proportions")
    _warn(short, "foreshortened in the image: %s; bone lengths are estimated from the body proportions")
    _warn(mirrored, "foreshortened in the image: %s; bone lengths are those of the other side")

    pivot = _ratio(character[NOSE], driver[NOSE])
    scale = {j: body if j in SCALE_JOINTS else pivot for j in PARENTS}
    for joint in set(PARENTS) - set(SCALE_JOINTS):
        if character[joint] < MIN_RATIO * driver[joint] * pivot:
            character[joint] = 0.0
    return _Lengths(driver, character, scale, pivot)


def _plausible_lengths(driver: dict[int, float]) -> dict[int, float]:
    """The driver's full lengths, with human proportions for bones that no frame shows at full length."""
    heights = [driver[joint] / share for joint, share in PROPORTIONS.items() if driver[joint]]
    if len(heights) < MIN_BONES:
        return driver
    height = float(np.median(heights))
    short = [j for j, share in PROPORTIONS.items() if 0 < driver[j] < FORESHORTENED * share * height]
    estimated = {j: PROPORTIONS[right] * height for right in short for j in (right, MIRROR[right])}
    _warn(
        sorted(estimated),
        "foreshortened in all driving poses: %s; full lengths are estimated from human proportions",
    )
    return driver | estimated


def _ratio(character: float, driver: float) -> float:
    if character <= 0 or driver <= 0:
        raise UserError(
            f"retargeting: nose and neck of the {'character' if driver > 0 else 'driver'} are at the same position; "
            "correct its keypoints, or disable retargeting"
        )
    return character / driver


def _warn(joints: Iterable[int], text: str) -> None:
    """Log a warning that names the joints, if there are any."""
    if names := ", ".join(JOINTS[joint] for joint in joints):
        logger.warning(f"retargeting: {text}", names)


def _length(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linalg.norm(vectors, axis=-1)


def _bone_lengths(points: NDArray[np.float64], found: NDArray[np.bool_], joint: int) -> NDArray[np.float64]:
    """Lengths of a joint's bone in the frames of points `[F, 18, 2]` that have both ends; none is 0."""
    both = found[:, joint] & found[:, PARENTS[joint]]
    lengths = _length(points[both, joint] - points[both, PARENTS[joint]])
    return lengths[lengths > 0]


def _first_length(lengths: NDArray[np.float64]) -> float:
    return float(lengths[0]) if len(lengths) else 0.0


def _full_length(lengths: NDArray[np.float64]) -> float:
    """Median of the lengths near their 75th percentile: robust to foreshortened frames and to outliers."""
    if not len(lengths):
        return 0.0
    return float(np.median(lengths[lengths >= NEAR_FULL * np.percentile(lengths, 75)]))


def _side_lengths(points: NDArray[np.float64], found: NDArray[np.bool_], joint: int) -> tuple[float, float]:
    """Lengths of a joint's bone and of its mirrored bone in points `[18, 2]`; 0 for a bone that was not found."""
    own, other = (
        float(_length(points[j] - points[PARENTS[j]])) if found[j] and found[PARENTS[j]] else 0.0
        for j in (joint, MIRROR[joint])
    )
    return own, other


def _interpolate_missing(points: NDArray[np.float64], found: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Interpolate missing points `[F, 2]` linearly; before the first and after the last, repeat them."""
    frames, seen = np.arange(len(points)), np.flatnonzero(found)
    return np.stack([np.interp(frames, seen, points[seen, axis]) for axis in (0, 1)], axis=1)
