"""Found pose against driving pose: the share of joints that are where they should be."""

from collections.abc import Sequence

import numpy as np

from tcan.pose.skeleton import JOINTS

JOINT_GROUPS = {
    f"{joint}s": [i for i, name in enumerate(JOINTS) if name.endswith(joint)]
    for joint in ("wrist", "elbow", "ankle")
}
"""The joints that move most, which a whole-body share would hide."""


def joint_errors(found: np.ndarray, truth: np.ndarray, height: int) -> np.ndarray:
    """Distance of each found joint from the true one, as a share of the image's height.

    Args:
        found, truth: keypoints `[F, 18, 3]` of the same frames, in pixels of one image of `height`.

    Returns:
        `[F, 18]`: infinite where the joint was not found, NaN where the truth has no such joint.
    """
    errors = np.linalg.norm(found[..., :2] - truth[..., :2], axis=-1) / height
    errors = np.where(found[..., 2] > 0, errors, np.inf)
    return np.where(truth[..., 2] > 0, errors, np.nan)


def pose_metrics(found: np.ndarray, truth: np.ndarray, height: int) -> dict[str, float]:
    """Shares, in [0, 1], of the true joints that are found within 5 % and 10 % of the image's height.

    Arguments as `joint_errors`. A joint that is not found counts as missed; one that the truth lacks isn't counted.

    Returns:
        pose_5, pose_10: of all joints; pose_5_wrists, pose_10_wrists, ... of each of JOINT_GROUPS;
        pose_error: mean distance of the joints found, as a share of the height. NaN where no joint counts.
    """
    errors = joint_errors(found, truth, height)
    metrics = {"pose_5": _share(errors, 0.05), "pose_10": _share(errors, 0.10)}
    for group, joints in JOINT_GROUPS.items():
        metrics[f"pose_5_{group}"] = _share(errors[:, joints], 0.05)
        metrics[f"pose_10_{group}"] = _share(errors[:, joints], 0.10)
    both = errors[np.isfinite(errors)]
    metrics["pose_error"] = float(both.mean()) if both.size else float("nan")
    return metrics


def mean_pose(poses: Sequence[np.ndarray]) -> np.ndarray:
    """The mean place `[18, 3]` of each joint over all frames of some videos `[F, 18, 3]` where it was found.

    What a model that ignores the driving pose could at best be right about: the control of every pose measure.
    """
    frames = np.concatenate(list(poses)).astype(np.float64)
    seen = frames[..., 2:] > 0
    count = seen.sum(axis=0)
    mean = np.where(seen, frames, 0).sum(axis=0) / np.maximum(count, 1)
    return mean.astype(np.float32)


def _share(errors: np.ndarray, within: float) -> float:
    counted = errors[~np.isnan(errors)]
    return float((counted <= within).mean()) if counted.size else float("nan")
