"""Measures of a generated video that need no outside network."""

from tcan.metrics.background import background_mask, flicker
from tcan.metrics.likeness import colour_distance, part_colours
from tcan.metrics.picture import picture_measures
from tcan.metrics.pose import joint_errors, mean_pose, pose_measures

__all__ = [
    "background_mask",
    "colour_distance",
    "flicker",
    "joint_errors",
    "mean_pose",
    "part_colours",
    "picture_measures",
    "pose_measures",
]
