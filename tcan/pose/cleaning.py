"""Temporal cleaning of one person's keypoints: left/right swaps, outliers, smoothing, gaps."""

import logging
import warnings
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from tcan.errors import UserError
from tcan.pose.keypoints import add_missing_necks
from tcan.pose.parts import BODY, HANDS, LEFT_HAND, RIGHT_HAND
from tcan.pose.skeleton import LEFT_WRIST, MIRROR, NECK
from tcan.pose.tracking import People, body_size, select_people

OUTLIER = 0.1
"""Minimum distance of an outlier from its joint's median over 5 frames, as a fraction of the body size."""
SMOOTH_ORDER = 2
"""Order of the polynomial that smoothing fits; order 2 preserves the turning points of a swing."""
MAX_BRIDGE = 48
"""Maximum number of consecutive frames without a person that are interpolated."""
MAX_SWAP = 8
"""Maximum number of consecutive frames with left and right swapped; after more frames, it is a turn of the body."""
SWAPPED = 0.5
"""Swapped joints are closer than this fraction of the distance of the joints as detected."""
SWAP_DISTANCE = 0.05
"""Minimum distance of swapped joints between frames, as a fraction of the body size."""
MIN_JOINTS = 4
"""Minimum number of joints of a frame that has a person although the neck is missing."""
SIDES = ((2, 3, 4, 5, 6, 7), (8, 9, 10, 11, 12, 13), (14, 15, 16, 17))
"""Arms, legs and head, which detectors swap separately. The hands are swapped with the arms."""
MIRRORED_HANDS = [*range(RIGHT_HAND.start, RIGHT_HAND.stop), *range(LEFT_HAND.start, LEFT_HAND.stop)]

logger = logging.getLogger(__name__)


@dataclass
class CleanPoses:
    """Keypoints of one person, and what was changed."""

    poses: NDArray[np.float32]
    """`[F, N, 3]`, N: 18, or 130 with hands and face; all 0 in stretches without a person that are too long to interpolate."""
    missing: NDArray[np.int64]
    """Frames without a person."""
    swapped: NDArray[np.int64]
    """Frames in which left and right were swapped."""


def main_person_poses(
    people: People,
    height: float,
    width: float,
    source: str,
    smoothing_window: int = 0,
    person: str = "largest",
) -> NDArray[np.float32]:
    """Pose of one person in every frame, `[F, N, 3]`, from all people `[P, N, 3]` of each frame (N: 18 or 130).

    The person is tracked (`tcan.pose.tracking`) and cleaned (`clean_poses`).

    Args:
        people: keypoints `[P, N, 3]` of each frame, in pixels.
        height, width: frame size in pixels.
        source: name of the input in messages.
        smoothing_window: smoothing window in frames (odd, >= 5). 0 disables smoothing and the removal of outliers.
        person: see `tcan.pose.tracking.select_people`; one person.

    Raises:
        UserError: no frame has a person; see `select_people`.
    """
    (poses,) = select_people(people, height, width, person, source)
    return clean_poses(poses, source, smoothing_window).poses


def clean_poses(poses: NDArray[np.float32], source: str, smoothing_window: int = 0) -> CleanPoses:
    """Complete the detected keypoints `[F, N, 3]` of one person (N: 18, or 130 with hands and face).

    A missing neck is the midpoint of the shoulders, else that of the nearest frame, moved like the other joints. Joints
    that are missing for a few frames are interpolated. With a smoothing window, left/right swaps and outliers are
    corrected first and the movement is smoothed. At most MAX_BRIDGE consecutive frames without a person are interpolated
    from the neighboring frames; one warning of this module's logger lists them.

    Raises:
        UserError: no frame has a person.
    """
    poses = add_missing_necks(poses)
    swapped = np.zeros(0, np.int64)
    if smoothing_window:
        poses, swapped = correct_swaps(poses)
        poses = hold_ends(remove_outliers(poses), poses)
        poses = smooth_poses(fill_gaps(poses), smoothing_window)
    else:
        poses = fill_gaps(poses)
    poses = estimate_necks(poses)
    if not (poses[:, NECK, 2] > 0).any():
        raise UserError(f"{source}: no person found; give an image or a video that shows the full body")
    poses, missing = interpolate_missing_frames(poses)
    if len(missing):
        logger.warning(
            "%s: no person found in frames %s of 0-%d; %s",
            *(source, frame_ranges(missing), len(poses) - 1, _bridging(poses, missing)),
        )
    return CleanPoses(poses, missing, swapped)


def frame_ranges(frames: NDArray[np.int64]) -> str:
    """Frames as text, e.g. `0, 5-15`; at most 8 ranges."""
    ranges = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in _runs(frames)]
    more = f" and {len(ranges) - 8} more ranges" if len(ranges) > 8 else ""
    return ", ".join(ranges[:8]) + more


def _bridging(poses: NDArray[np.float32], missing: NDArray[np.int64]) -> str:
    empty = missing[~(poses[missing, :, 2] > 0).any(axis=1)]
    text = "interpolated from the neighboring frames"
    if len(empty):
        text += (
            f", except frames {frame_ranges(empty)}, which are more than {MAX_BRIDGE} frames and have no pose"
        )
    return text


def fill_gaps(keypoints: NDArray[np.float32], max_gap: int = 4) -> NDArray[np.float32]:
    """Interpolate points of keypoints `[F, N, 3]` that are missing for at most `max_gap` consecutive frames.

    x, y and score are interpolated linearly between the frames next to the gap. Longer gaps, and gaps at either end of
    the video, stay.
    """
    filled = keypoints.copy()
    for joint in range(keypoints.shape[1]):
        seen = np.flatnonzero(keypoints[:, joint, 2] > 0)
        for before, after in pairwise(seen):
            if 1 < after - before <= max_gap + 1:
                weight = np.linspace(0, 1, after - before + 1, dtype=np.float32)[1:-1, None]
                filled[before + 1 : after, joint] = (
                    keypoints[before, joint] * (1 - weight) + keypoints[after, joint] * weight
                )
    return filled


def correct_swaps(keypoints: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Exchange left and right of keypoints `[F, N, 3]` where they are swapped for at most MAX_SWAP frames.

    Arms, legs and head are corrected separately. Left and right are swapped between two frames if the exchanged joints
    are much closer to those of the frame before. The next such event ends the swap; without one, the body has turned.

    Returns:
        The keypoints, and the frames in which joints were exchanged.
    """
    result = keypoints.copy()
    changed: set[int] = set()
    for joints in map(list, SIDES):
        events = flips(keypoints, joints)
        position = 0
        while position < len(events):
            start = events[position]
            end = events[position + 1] if position + 1 < len(events) else len(keypoints)
            if end - start <= MAX_SWAP:
                position += 2
            elif position == 0 and start <= MAX_SWAP:  # swapped from the first frame
                start, end, position = 0, start, 1
            else:
                position += 1
                continue
            result[start:end, joints] = keypoints[start:end][:, [MIRROR[j] for j in joints]]
            if LEFT_WRIST in joints and keypoints.shape[1] > BODY.stop:
                result[start:end, HANDS] = keypoints[start:end][:, MIRRORED_HANDS]
            changed.update(range(start, end))
    return result, np.array(sorted(changed), np.int64)


def flips(keypoints: NDArray[np.float32], joints: list[int]) -> list[int]:
    """Frames of keypoints `[F, N, 3]` in which the sides of the joints change between this frame and the one before."""
    mirrored = [MIRROR[j] for j in joints]
    size = median_size(keypoints)
    found: list[int] = []
    last: NDArray[np.float32] | None = None
    for frame, body in enumerate(keypoints):
        if not (body[joints, 2] > 0).all():
            continue
        if last is not None:
            same = np.linalg.norm(body[joints, :2] - last[joints, :2], axis=1).mean()
            exchanged = np.linalg.norm(body[mirrored, :2] - last[joints, :2], axis=1).mean()
            if same > SWAP_DISTANCE * size and exchanged < SWAPPED * same:
                found.append(frame)
        last = body
    return found


def remove_outliers(keypoints: NDArray[np.float32]) -> NDArray[np.float32]:
    """Remove points of keypoints `[F, N, 3]` that jump away for one or two frames.

    A point is removed if its distance from its median position over 5 frames exceeds OUTLIER times the body size. A
    median of 5 follows continuous movement and is not affected by up to two outliers. At either end of the video, where
    the median has fewer frames, one or two frames are removed if the jump to the next frame exceeds this distance and
    three times the next four movements.
    """
    found = keypoints[..., 2] > 0
    positions = np.where(found[..., None], keypoints[..., :2], np.nan)
    windows = sliding_window_view(
        np.pad(positions, ((2, 2), (0, 0), (0, 0)), constant_values=np.nan), 5, axis=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all 5 are NaN if the joint is missing
        medians = np.nanmedian(windows, axis=-1)  # [F, N, 2]
        limit = OUTLIER * median_size(keypoints)
        outlier = np.linalg.norm(positions - medians, axis=-1) > limit
        for forward in (positions, positions[::-1]):
            steps = np.linalg.norm(np.diff(forward[:7], axis=0), axis=-1)  # [6, N]
            for count in (1, 2):
                if len(steps) < count + 4:
                    continue
                usual = np.nanmax(steps[count : count + 4], axis=0)
                jumps = steps[count - 1] > np.maximum(limit, 3 * usual)
                ends = slice(0, count) if forward is positions else slice(len(positions) - count, None)
                outlier[ends] |= jumps
                neighbor = count if forward is positions else len(positions) - 1 - count
                outlier[neighbor] &= ~jumps  # its median is affected by the outliers
    return np.where((found & ~outlier)[..., None], keypoints, 0).astype(np.float32)


def hold_ends(cleaned: NDArray[np.float32], detected: NDArray[np.float32]) -> NDArray[np.float32]:
    """Give joints that were removed in the first or last two frames the position of the nearest frame, relative to the
    neck; gaps there cannot be interpolated."""
    result = cleaned.copy()
    last = len(cleaned) - 1
    removed = (cleaned[..., 2] <= 0) & (detected[..., 2] > 0)
    for frame, neighbor in ((1, 2), (0, 1), (last - 1, last - 2), (last, last - 1)):
        if not (0 <= frame <= last and 0 <= neighbor <= last):
            continue
        shift = result[frame, NECK, :2] - result[neighbor, NECK, :2]
        if not (result[[frame, neighbor], NECK, 2] > 0).all():
            shift = np.zeros(2, np.float32)
        for joint in np.flatnonzero(removed[frame] & (result[neighbor, :, 2] > 0)):
            result[frame, joint] = result[neighbor, joint]
            result[frame, joint, :2] += shift
    return result


def smooth_poses(keypoints: NDArray[np.float32], frames: int) -> NDArray[np.float32]:
    """Smooth x and y of each point of keypoints `[F, N, 3]` with a window of `frames`, weighted by the scores.

    Each value becomes that of the parabola fitted to the window by weighted least squares; with equal scores, this is the
    filter of Savitzky and Golay (1964). Runs of consecutive frames with the joint are smoothed separately; runs shorter
    than `frames` stay.
    """
    result = keypoints.copy()
    for joint in range(keypoints.shape[1]):
        for run in _runs(np.flatnonzero(keypoints[:, joint, 2] > 0)):
            if len(run) >= frames:
                result[run, joint, :2] = _fit_parabolas(keypoints[run, joint].astype(np.float64), frames)
    return result


def _fit_parabolas(points: NDArray[np.float64], frames: int) -> NDArray[np.float64]:
    """Values `[F, 2]` at each frame of the parabola fitted to the window of points `[F, 3]` around it; frames near the
    ends use the first and the last window."""
    centers = np.arange(len(points))
    starts = (centers - frames // 2).clip(0, len(points) - frames)
    windows = points[starts[:, None] + np.arange(frames)]  # [F, frames, 3]
    times = (starts[:, None] + np.arange(frames)) - centers[:, None]
    powers = times[..., None] ** np.arange(SMOOTH_ORDER + 1)  # [F, frames, 3]
    roots = np.sqrt(windows[..., 2:])
    coefficients = np.linalg.pinv(powers * roots) @ (windows[..., :2] * roots)
    return coefficients[:, 0]


def estimate_necks(keypoints: NDArray[np.float32]) -> NDArray[np.float32]:
    """Add the neck to frames of keypoints `[F, N, 3]` that have at least MIN_JOINTS other joints.

    It is the neck of the nearest frame that has one, moved by the median movement of the joints that both have.
    """
    found = keypoints[:, BODY, 2] > 0
    with_neck = np.flatnonzero(found[:, NECK])
    result = keypoints.copy()
    for frame in np.flatnonzero(~found[:, NECK] & (found.sum(axis=1) >= MIN_JOINTS)):
        if not len(with_neck):
            break
        nearest = with_neck[np.abs(with_neck - frame).argmin()]
        both = found[frame] & found[nearest]
        if both.any():
            shift = np.median((keypoints[frame] - keypoints[nearest])[BODY][both, :2], axis=0)
            result[frame, NECK] = keypoints[nearest, NECK]
            result[frame, NECK, :2] += shift
    return result


def interpolate_missing_frames(
    keypoints: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Fill at most MAX_BRIDGE consecutive frames of keypoints `[F, N, 3]` that have no neck; one frame must have one.

    Between two valid frames, a joint that both have is interpolated linearly; other joints are copied from the nearer
    frame. Before the first and after the last valid frame, its pose is repeated. Longer stretches become all 0.

    Returns:
        The keypoints, and the indices of the frames without a neck.
    """
    has_neck = keypoints[:, NECK, 2] > 0
    seen, missing = np.flatnonzero(has_neck), np.flatnonzero(~has_neck)
    position = np.searchsorted(seen, missing)
    before, after = seen[(position - 1).clip(0)], seen[position.clip(max=len(seen) - 1)]
    weight = (missing - before) / np.maximum(after - before, 1)
    weight = weight.clip(0, 1).astype(np.float32)[:, None, None]
    first, last = keypoints[before], keypoints[after]
    both = (first[..., 2:] > 0) & (last[..., 2:] > 0)
    nearer = np.where(weight <= 0.5, first, last)
    result = keypoints.copy()
    result[missing] = np.where(both, first * (1 - weight) + last * weight, nearer).astype(np.float32)
    for run in _runs(missing):
        if len(run) > MAX_BRIDGE:
            result[run] = 0
    return result, missing


def median_size(keypoints: NDArray[np.float32]) -> float:
    """Median size in pixels of the poses `[F, N, 3]` that have joints; 0 if none has."""
    sizes = [body_size(body) for body in keypoints[:, BODY] if (body[:, 2] > 0).any()]
    return float(np.median(sizes)) if sizes else 0.0


def _runs(frames: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Runs of consecutive frames."""
    return np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1) if len(frames) else []
