"""Pose accuracy: fraction of joints detected near their position in the driving pose."""

from collections.abc import Sequence

import numpy as np

from tcan.pose.skeleton import JOINTS

JOINT_GROUPS = {
    f"{joint}s": [i for i, name in enumerate(JOINTS) if name.endswith(joint)]
    for joint in ("wrist", "elbow", "ankle")
}
"""Joints with the largest motion, reported separately because an average over all joints hides their errors."""


def joint_errors(found: np.ndarray, truth: np.ndarray, height: int) -> np.ndarray:
    """Return the distance between each detected and true joint as a fraction of the image height.

    Args:
        found, truth: detected and true keypoints `[F, 18, 3]` of the same frames, in pixels.
        height: of the image in pixels.

    Returns:
        `[F, 18]`: infinite where the joint was not detected, NaN where the joint is missing in the truth.
    """
    errors = np.linalg.norm(found[..., :2] - truth[..., :2], axis=-1) / height
    errors = np.where(found[..., 2] > 0, errors, np.inf)
    return np.where(truth[..., 2] > 0, errors, np.nan)


def pose_metrics(found: np.ndarray, truth: np.ndarray, height: int) -> dict[str, float]:
    """Return the fractions of true joints detected within 5 % and 10 % of the image height, in [0, 1].

    Arguments are those of `joint_errors`. Undetected joints count as errors; joints missing in the truth are ignored.

    Returns:
        pose_5, pose_10: for all joints;
        pose_5_wrists, pose_10_wrists, ...: for each group in `JOINT_GROUPS`;
        pose_error: mean distance of the detected joints as a fraction of the height.
        NaN where there is no joint.
    """
    errors = joint_errors(found, truth, height)
    metrics = {"pose_5": _fraction_within(errors, 0.05), "pose_10": _fraction_within(errors, 0.10)}
    for group, joints in JOINT_GROUPS.items():
        metrics[f"pose_5_{group}"] = _fraction_within(errors[:, joints], 0.05)
        metrics[f"pose_10_{group}"] = _fraction_within(errors[:, joints], 0.10)
    detected = errors[np.isfinite(errors)]
    metrics["pose_error"] = float(detected.mean()) if detected.size else float("nan")
    return metrics


def mean_pose(poses: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean position `[18, 3]` of each joint over the frames of all videos `[F, 18, 3]` where it was detected.

    This pose is the control for all pose metrics: the best output of a model that ignores the driving pose.
    """
    frames = np.concatenate(list(poses)).astype(np.float64)
    seen = frames[..., 2:] > 0
    count = seen.sum(axis=0)
    mean = np.where(seen, frames, 0).sum(axis=0) / np.maximum(count, 1)
    return mean.astype(np.float32)


def _fraction_within(errors: np.ndarray, threshold: float) -> float:
    counted = errors[~np.isnan(errors)]
    return float((counted <= threshold).mean()) if counted.size else float("nan")
