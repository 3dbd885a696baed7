"""From everyone in every frame to one body through time."""

import logging
import warnings
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.signal import savgol_filter

from tcan.errors import UserError
from tcan.pose.skeleton import NECK

MAX_JUMP = 0.15
"""How far the followed person may move from frame to frame, as a share of the image's diagonal."""
OUTLIER = 0.1
"""How far a joint may lie from its median over 5 frames before it counts as mistaken, as a share of the body's size."""
SMOOTH_ORDER = 2
"""Of the Savitzky-Golay filter's polynomial: a parabola keeps the turning points of a swing."""

logger = logging.getLogger(__name__)


def one_body(
    people: Sequence[NDArray[np.float32]], height: float, width: float, what: str, smooth: int = 0
) -> NDArray[np.float32]:
    """Everyone in every frame, `[P, 18, 3]` each -> the main person's pose in each frame, `[F, 18, 3]`.

    The main person is followed, joints lost for a few frames are filled in, and where nobody was found (a body hangs on
    its neck: without one it was none) the poses around are bridged, which is reported in one line of this module's
    logger, naming `what`. smooth: with a number of frames (odd, 5 or more) mistaken joints are taken out first, and the
    movement is smoothed over as many; 0: neither.

    Raises:
        UserError: nobody in any frame, naming `what`.
    """
    poses = follow_main_person(people, height, width)
    if smooth:
        poses = smoothed(fill_gaps(without_outliers(poses)), smooth)
    else:
        poses = fill_gaps(poses)
    if not (poses[:, NECK, 2] > 0).any():
        raise UserError(f"{what}: no person found; give one that shows a whole person")
    poses, lost = bridged(poses)
    if len(lost):
        runs = np.split(lost, np.flatnonzero(np.diff(lost) > 1) + 1)
        spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
        more = f" and {len(spans) - 8} more stretches" if len(spans) > 8 else ""
        logger.warning(
            "%s: nobody found in frames %s%s of 0-%d; bridged from the frames around",
            *(what, ", ".join(spans[:8]), more, len(poses) - 1),
        )
    return poses


def follow_main_person(
    people: Sequence[NDArray[np.float32]], height: float, width: float
) -> NDArray[np.float32]:
    """people: for each frame everyone's keypoints [P, 18, 3] -> one person's [F, 18, 3], zeros where they aren't seen.

    The person is the largest one of the first frame that has any, and then the nearest to where they were last. Someone
    further away than 0.15 of the image's diagonal for each frame since is somebody else: so a dancer missed
    in one frame is not exchanged for a bystander, and one who has left is, after a while.
    """
    followed = np.zeros((len(people), 18, 3), np.float32)
    reach = MAX_JUMP * float(np.hypot(height, width))
    last: NDArray[np.float32] | None = None
    unseen = 1
    for frame, bodies in enumerate(people):
        bodies = bodies[(bodies[..., 2] > 0).any(axis=1)]
        if len(bodies):
            distances = np.array([0.0 if last is None else _distance(body, last) for body in bodies])
            # The larger of two as near; before anyone has been seen, the largest of all.
            best = min(range(len(bodies)), key=lambda i: (distances[i], -_size(bodies[i])))
            if distances[best] <= reach * unseen:
                followed[frame] = last = bodies[best]
                unseen = 1
                continue
        unseen += 1
    return followed


def fill_gaps(keypoints: NDArray[np.float32], max_gap: int = 4) -> NDArray[np.float32]:
    """keypoints [F, 18, 3] -> the same, with joints lost for at most `max_gap` frames in a row filled in.

    x, y and score go straight from the frame before the gap to the frame after it. Longer gaps, and those at either
    end, stay: there is nothing to measure them by.
    """
    filled = keypoints.copy()
    for joint in range(keypoints.shape[1]):
        seen = np.flatnonzero(keypoints[:, joint, 2] > 0)
        for before, after in pairwise(seen):
            if 1 < after - before <= max_gap + 1:
                share = np.linspace(0, 1, after - before + 1, dtype=np.float32)[1:-1, None]
                filled[before + 1 : after, joint] = (
                    keypoints[before, joint] * (1 - share) + keypoints[after, joint] * share
                )
    return filled


def without_outliers(keypoints: NDArray[np.float32]) -> NDArray[np.float32]:
    """keypoints [F, 18, 3] -> the same, without the joints that jump away for a frame or two.

    A joint further than a tenth of the body's size from the median of its places in 5 frames is taken for a mistake of
    the detector: a median of 5 follows any movement, but neither of two strays.
    """
    found = keypoints[..., 2] > 0
    places = np.where(found[..., None], keypoints[..., :2], np.nan)
    around = sliding_window_view(np.pad(places, ((2, 2), (0, 0), (0, 0)), constant_values=np.nan), 5, axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a joint found in none of the 5
        medians = np.nanmedian(around, axis=-1)  # [F, 18, 2]
    sizes = [_size(body) for body in keypoints if (body[:, 2] > 0).any()]
    stray = np.linalg.norm(places - medians, axis=-1) > OUTLIER * np.median(sizes or [0.0])
    return np.where((found & ~stray)[..., None], keypoints, 0).astype(np.float32)


def smoothed(keypoints: NDArray[np.float32], frames: int) -> NDArray[np.float32]:
    """keypoints [F, 18, 3] -> the same with x and y of every joint smoothed over `frames` frames (Savitzky and Golay,
    1964: each point is that of the parabola fitted to the points around it).

    A joint is smoothed over stretches in which it is always found; one shorter than `frames` stays.
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


def bridged(keypoints: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """keypoints [F, 18, 3] -> the same with a body in every frame, and the numbers of the frames that had none.

    Between two frames with a body, a joint that both have goes straight from one to the other; any other is as in the
    nearer one. Before the first and after the last, the pose stands still. At least one frame must have a neck.
    """
    here = keypoints[:, NECK, 2] > 0
    seen, lost = np.flatnonzero(here), np.flatnonzero(~here)
    place = np.searchsorted(seen, lost)
    before, after = seen[(place - 1).clip(0)], seen[place.clip(max=len(seen) - 1)]
    share = ((lost - before) / np.maximum(after - before, 1)).clip(0, 1).astype(np.float32)[:, None, None]
    first, last = keypoints[before], keypoints[after]
    both = (first[..., 2:] > 0) & (last[..., 2:] > 0)
    result = keypoints.copy()
    result[lost] = np.where(
        both, first * (1 - share) + last * share, np.where(share <= 0.5, first, last)
    ).astype(np.float32)
    return result, lost


def _size(body: NDArray[np.float32]) -> float:
    """Diagonal of the box around a body's joints: unlike its area, not small for arms at the sides."""
    joints = body[body[:, 2] > 0, :2]
    return float(np.linalg.norm(np.ptp(joints, axis=0)))


def _distance(body: NDArray[np.float32], last: NDArray[np.float32]) -> float:
    """Mean distance in pixels of the joints that both have; of their means if they share none."""
    both = (body[:, 2] > 0) & (last[:, 2] > 0)
    if both.any():
        return float(np.linalg.norm(body[both, :2] - last[both, :2], axis=1).mean())
    return float(np.linalg.norm(body[body[:, 2] > 0, :2].mean(0) - last[last[:, 2] > 0, :2].mean(0)))
