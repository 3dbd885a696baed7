"""Checks, before anything is generated, of how driving poses match an image."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tcan.pose.cleaning import SIDES, CleanPoses, flips, frame_ranges
from tcan.pose.parts import BODY
from tcan.pose.skeleton import JOINTS, MIRROR, PARENTS, PROPORTIONS

MAX_OUTSIDE = 0.1
"""Maximum share of joints outside the frame over the video."""
MAX_OUTSIDE_FRAME = 0.5
"""Maximum share of joints outside the frame in one frame."""
MAX_MISSING = 0.1
"""Maximum share of frames without a person."""
MAX_SCALE_STEP = 1.25
"""Maximum ratio of the driver's sizes in consecutive frames."""
MAX_SCALE_RANGE = 1.6
"""Maximum ratio of the driver's sizes over the video: retargeting follows neither a zoom nor a walk to the camera."""
MIN_COMMON = 5
"""Minimum number of bones in both of two frames whose sizes are compared."""
FACING_AWAY = 0.5
"""Minimum share of frames in which the driver faces the other way than the person in the image."""

PLAUSIBLE = (0.4, 2.2)
"""Range of a bone's length relative to PROPORTIONS and the median of all bones. Children, large heads and cartoon characters
are within it; a stump or a wrong detection is not."""
FULL = 90
"""Percentile of a bone's length over the video that is its full length."""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    check: str
    """frame, limbs, scale, missing or flips."""
    text: str
    problem: bool


def match_poses(
    driver: CleanPoses,
    poses: NDArray[np.float32],
    height: int,
    width: int,
    character: NDArray[np.float32] | None = None,
) -> list[Finding]:
    """Check the joints of one person, in the order frame, limbs, scale, missing, flips.

    Args:
        driver: keypoints of the driving video.
        poses: the same after retargeting or scaling, `[F, N, 3]` in pixels of the output.
        height, width: size of the output in pixels.
        character: keypoints of the person in the image `[18, 3]` in pixels of the output; None without retargeting.
    """
    driver, poses = replace(driver, poses=driver.poses[:, BODY]), poses[:, BODY]
    return [
        _check_frame(poses, height, width, character),
        _check_limbs(poses, None if character is None else driver.poses),
        _check_scale(driver.poses),
        _check_missing(driver),
        _check_flips(driver, character),
    ]


def outside_frame(poses: NDArray[np.float32], height: int, width: int) -> NDArray[np.bool_]:
    """Whether each joint of poses `[F, 18, 3]` was found and is outside the image: bool `[F, 18]`."""
    x, y = poses[..., 0], poses[..., 1]
    return (poses[..., 2] > 0) & ((x < 0) | (x >= width) | (y < 0) | (y >= height))


def _check_frame(
    poses: NDArray[np.float32], height: int, width: int, character: NDArray[np.float32] | None
) -> Finding:
    """Joints that the image does not show, such as the legs of a close-up, do not count."""
    counted = poses[..., 2] > 0
    if character is not None:
        counted &= (character[:, 2] > 0) & ~outside_frame(character[None], height, width)[0]
    outside = outside_frame(poses, height, width) & counted
    if not outside.any():
        return Finding("frame", "all joints stay in the frame", False)
    share = outside.sum() / counted.sum()
    by_frame = outside.sum(axis=1) / np.maximum(counted.sum(axis=1), 1)
    worst = int(by_frame.argmax())
    most = np.argsort(-outside.sum(axis=0), kind="stable")[:3]
    names = ", ".join(JOINTS[j] for j in most if outside[:, j].any())
    text = f"{share:.0%} of the joints are outside the frame, most often {names}; {by_frame[worst]:.0%} in frame {worst}"
    return Finding("frame", text, bool(share > MAX_OUTSIDE or by_frame[worst] > MAX_OUTSIDE_FRAME))


def _check_limbs(poses: NDArray[np.float32], driver: NDArray[np.float32] | None) -> Finding:
    """With the `driver` before retargeting: a limb that the driver shows foreshortened in all frames may be short."""
    ratios = _relative_lengths(poses)
    if len(ratios) < MIN_COMMON:
        return Finding("limbs", "too few limbs to compare", False)
    allowed = {} if driver is None else _relative_lengths(driver)
    wrong = [
        joint
        for joint, ratio in ratios.items()
        if ratio > PLAUSIBLE[1] or ratio < PLAUSIBLE[0] <= allowed.get(joint, PLAUSIBLE[0])
    ]
    if not wrong:
        return Finding("limbs", "all limbs have plausible lengths", False)
    names = ", ".join(
        f"{JOINTS[PARENTS[joint]]} to {JOINTS[joint]} {ratios[joint]:.1f} times" for joint in wrong
    )
    return Finding("limbs", f"lengths relative to those of a human body: {names}", True)


def _relative_lengths(poses: NDArray[np.float32]) -> dict[int, float]:
    """Full length by joint, relative to PROPORTIONS and the median of all bones."""
    relative = {}
    for joint, proportion in PROPORTIONS.items():
        for end in (joint, MIRROR[joint]):
            lengths = _lengths(poses, end)
            if np.isfinite(lengths).any():
                relative[end] = float(np.nanpercentile(lengths, FULL)) / proportion
    unit = max(float(np.median(list(relative.values()))), 1e-6) if relative else 1.0
    return {joint: value / unit for joint, value in relative.items()}


def _check_scale(driver: NDArray[np.float32]) -> Finding:
    lengths = np.stack([_lengths(driver, joint) for joint in PARENTS], axis=1)  # [F, 17]
    lengths[~(lengths > 0)] = np.nan
    steps = np.ones(len(driver))
    for frame in range(1, len(driver)):
        ratios = lengths[frame] / lengths[frame - 1]
        if np.isfinite(ratios).sum() >= MIN_COMMON:
            steps[frame] = np.nanmedian(ratios)
    jumps = np.flatnonzero(np.maximum(steps, 1 / steps) > MAX_SCALE_STEP)
    if len(jumps):
        return Finding("scale", f"the driver's size jumps in frames {frame_ranges(jumps)}", True)
    # Full lengths over a quarter of the video: a bone is seldom foreshortened for so long.
    parts = [part for part in np.array_split(lengths, 4) if len(part)]
    sizes = np.stack([_full_lengths(part) for part in parts])  # [4, 17]
    usable = np.isfinite(sizes).all(axis=0)
    if usable.sum() < MIN_COMMON:
        return Finding("scale", "too few limbs to compare", False)
    relative = np.median(sizes[:, usable] / sizes[0, usable], axis=1)
    factor = float(relative.max() / relative.min())
    text = f"the driver's size changes by a factor of {factor:.2f}"
    return Finding("scale", text, factor > MAX_SCALE_RANGE)


def _check_missing(driver: CleanPoses) -> Finding:
    count, missing = len(driver.poses), driver.missing
    if not len(missing):
        return Finding("missing", "every frame has a person", False)
    runs = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1)
    share = len(missing) / count
    text = f"{len(missing)} of {count} frames have no person ({share:.0%}), at most {max(map(len, runs))} in succession"
    return Finding("missing", text, share > MAX_MISSING)


def _check_flips(driver: CleanPoses, character: NDArray[np.float32] | None) -> Finding:
    events = {frame for joints in SIDES[:2] for frame in flips(driver.poses, list(joints))}
    if events:
        frames = frame_ranges(np.array(sorted(events)))
        return Finding("flips", f"left and right of the driver are exchanged in frames {frames}", True)
    if character is not None and _facing(character[None])[0]:
        facing = _facing(driver.poses)
        share = float((facing == -_facing(character[None])[0]).mean())
        if share > FACING_AWAY:
            text = f"the driver faces the other way than the person in the image in {share:.0%} of the frames"
            return Finding("flips", text, True)
    return Finding("flips", "left and right are consistent", False)


def _facing(poses: NDArray[np.float32]) -> NDArray[np.int64]:
    """1: seen from the front, -1: from behind, 0: unknown or from the side; `[F]`. From the order of the shoulders."""
    both = (poses[:, [1, 2, 5], 2] > 0).all(axis=1)
    across = poses[:, 5, 0] - poses[:, 2, 0]
    size = np.array([np.ptp(body[body[:, 2] > 0, 1]) if (body[:, 2] > 0).any() else 0.0 for body in poses])
    return np.where(both & (np.abs(across) > 0.08 * size), np.sign(across), 0).astype(np.int64)


def _lengths(poses: NDArray[np.float32], joint: int) -> NDArray[np.float64]:
    """Length of the bone that ends at the joint in each frame `[F]`; NaN where an end was not found."""
    both = (poses[:, joint, 2] > 0) & (poses[:, PARENTS[joint], 2] > 0)
    lengths = np.linalg.norm((poses[:, joint] - poses[:, PARENTS[joint]])[:, :2].astype(np.float64), axis=1)
    return np.where(both, lengths, np.nan)


def _full_lengths(lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """FULL percentile of lengths `[F, 17]` over the frames; NaN for bones in no frame."""
    full = np.full(lengths.shape[1], np.nan)
    seen = np.isfinite(lengths).any(axis=0)
    full[seen] = np.nanpercentile(lengths[:, seen], FULL, axis=0)
    return full
