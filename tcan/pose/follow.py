"""From everyone in every frame to one body through time."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MAX_JUMP = 0.15
"""How far the followed person may move from frame to frame, as a share of the picture's diagonal."""


def follow_main_person(people: Sequence[NDArray[np.float32]], height: int, width: int) -> NDArray[np.float32]:
    """people: for each frame everyone's keypoints [P, 18, 3] -> one person's [F, 18, 3], zeros where they aren't seen.

    The person is the largest one of the first frame that has any, and then the nearest to where they were last. Someone
    further away than 0.15 of the picture's diagonal for each frame since is somebody else: so a dancer missed
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
