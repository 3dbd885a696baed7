"""Metrics of a generated video that do not require a pretrained network."""

from tcan.metrics.background import background_mask, flicker
from tcan.metrics.frechet import frechet_distance
from tcan.metrics.image import image_metrics, psnr_uint8_overflow
from tcan.metrics.likeness import colour_distance, part_colours
from tcan.metrics.pose import joint_errors, mean_pose, pose_metrics
from tcan.metrics.temporal import warping_error

__all__ = [
    "background_mask",
    "colour_distance",
    "flicker",
    "frechet_distance",
    "image_metrics",
    "joint_errors",
    "mean_pose",
    "part_colours",
    "pose_metrics",
    "psnr_uint8_overflow",
    "warping_error",
]
