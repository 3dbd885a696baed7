"""Tracking of the main person through a video, with gap filling, outlier removal and smoothing."""

import logging
import warnings
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.signal import savgol_filter

from tcan.errors import UserError
from tcan.pose.keypoints import add_missing_necks
from tcan.pose.skeleton import NECK

MAX_JUMP = 0.15
"""Maximum movement of the tracked person between consecutive frames, as a fraction of the image diagonal."""
OUTLIER = 0.1
"""Minimum distance of an outlier from its joint's median over 5 frames, as a fraction of the body size."""
SMOOTH_ORDER = 2
"""Polynomial order of the Savitzky-Golay filter; order 2 preserves the turning points of a swing."""

logger = logging.getLogger(__name__)


def main_person_poses(
    people: Sequence[NDArray[np.float32]], height: float, width: float, source: str, smoothing_window: int = 0
) -> NDArray[np.float32]:
    """Pose of the main person in every frame, `[F, 18, 3]`, from all people `[P, 18, 3]` of each frame.

    The main person is tracked. A missing neck is the midpoint of the shoulders; joints that are missing for a few frames
    are interpolated. Frames without a person (without a neck) are interpolated from the neighboring frames; one warning
    of this module's logger lists them.

    Args:
        people: keypoints `[P, 18, 3]` of each frame, in pixels.
        height, width: frame size in pixels.
        source: name of the input in messages.
        smoothing_window: smoothing window in frames (odd, >= 5), after outlier removal. 0 disables both.

    Raises:
        UserError: no frame has a person.
    """
    poses = add_missing_necks(track_main_person(people, height, width))
    if smoothing_window:
        poses = smooth_poses(fill_gaps(remove_outliers(poses)), smoothing_window)
    else:
        poses = fill_gaps(poses)
    if not (poses[:, NECK, 2] > 0).any():
        raise UserError(f"{source}: no person found; give an image or a video that shows the full body")
    poses, missing = interpolate_missing_frames(poses)
    if len(missing):
        runs = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1)
        ranges = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
        more = f" and {len(ranges) - 8} more ranges" if len(ranges) > 8 else ""
        logger.warning(
            "%s: no person found in frames %s%s of 0-%d; interpolated from the neighboring frames",
            *(source, ", ".join(ranges[:8]), more, len(poses) - 1),
        )
    return poses


def track_main_person(
    people: Sequence[NDArray[np.float32]], height: float, width: float
) -> NDArray[np.float32]:
    """Track one person, `[F, 18, 3]`, through all people `[P, 18, 3]` of each frame; all 0 where the person is missing.

    The person is the largest one in the first frame with people, then in each frame the nearest to the last detection.
    The maximum distance is MAX_JUMP of the image diagonal per frame since that detection. Therefore, a bystander does
    not replace a dancer who is missed in one frame, but does replace one who left the scene, after some frames.
    """
    track = np.zeros((len(people), 18, 3), np.float32)
    max_distance = MAX_JUMP * float(np.hypot(height, width))
    last: NDArray[np.float32] | None = None
    frames_since = 1
    for frame, bodies in enumerate(people):
        bodies = bodies[(bodies[..., 2] > 0).any(axis=1)]
        if len(bodies):
            distances = np.array([0.0 if last is None else _distance(body, last) for body in bodies])
            # Equal distances: the larger one. Before the first detection all distances are 0, so this is the largest.
            best = min(range(len(bodies)), key=lambda i: (distances[i], -_size(bodies[i])))
            if distances[best] <= max_distance * frames_since:
                track[frame] = last = bodies[best]
                frames_since = 1
                continue
        frames_since += 1
    return track


def fill_gaps(keypoints: NDArray[np.float32], max_gap: int = 4) -> NDArray[np.float32]:
    """Interpolate joints of keypoints `[F, 18, 3]` that are missing for at most `max_gap` consecutive frames.

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


def remove_outliers(keypoints: NDArray[np.float32]) -> NDArray[np.float32]:
    """Remove joints of keypoints `[F, 18, 3]` that jump away for one or two frames.

    A joint is removed if its distance from its median position over 5 frames exceeds OUTLIER times the body size. A
    median of 5 follows continuous movement and is not affected by up to two outliers.
    """
    found = keypoints[..., 2] > 0
    positions = np.where(found[..., None], keypoints[..., :2], np.nan)
    windows = sliding_window_view(
        np.pad(positions, ((2, 2), (0, 0), (0, 0)), constant_values=np.nan), 5, axis=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all 5 are NaN if the joint is missing
        medians = np.nanmedian(windows, axis=-1)  # [F, 18, 2]
    sizes = [_size(body) for body in keypoints if (body[:, 2] > 0).any()]
    outlier = np.linalg.norm(positions - medians, axis=-1) > OUTLIER * np.median(sizes or [0.0])
    return np.where((found & ~outlier)[..., None], keypoints, 0).astype(np.float32)


def smooth_poses(keypoints: NDArray[np.float32], frames: int) -> NDArray[np.float32]:
    """Smooth x and y of each joint of keypoints `[F, 18, 3]` with a window of `frames` (Savitzky and Golay, 1964).

    Each value becomes that of the parabola fitted to the window. Runs of consecutive frames with the joint are smoothed
    separately; runs shorter than `frames` stay.
    """
    result = keypoints.copy()
    for joint in range(keypoints.shape[1]):
        seen = np.flatnonzero(keypoints[:, joint, 2] > 0)
        for run in np.split(seen, np.flatnonzero(np.diff(seen) > 1) + 1):
            if len(run) >= frames:
                result[run, joint, :2] = savgol_filter(
                    keypoints[run, joint, :2].astype(np.float64), frames, SMOOTH_ORDER, axis=0
                )
    return result


def interpolate_missing_frames(
    keypoints: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Fill frames of keypoints `[F, 18, 3]` that have no neck; at least one frame must have one.

    Between two valid frames, a joint that both have is interpolated linearly; other joints are copied from the nearer
    frame. Before the first and after the last valid frame, its pose is repeated.

    Returns:
        The keypoints, and the indices of the filled frames.
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
    return result, missing


def _size(body: NDArray[np.float32]) -> float:
    """Diagonal of the bounding box of a body's joints; unlike the area, it is not small for a narrow pose."""
    joints = body[body[:, 2] > 0, :2]
    return float(np.linalg.norm(np.ptp(joints, axis=0)))


def _distance(body: NDArray[np.float32], last: NDArray[np.float32]) -> float:
    """Mean distance in pixels over the joints that both have; without such joints, the distance of their centroids."""
    both = (body[:, 2] > 0) & (last[:, 2] > 0)
    if both.any():
        return float(np.linalg.norm(body[both, :2] - last[both, :2], axis=1).mean())
    return float(np.linalg.norm(body[body[:, 2] > 0, :2].mean(0) - last[last[:, 2] > 0, :2].mean(0)))
