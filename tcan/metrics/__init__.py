"""Metrics of generated videos. `tcan.metrics.networks` loads the networks of those that require one."""

from tcan.metrics.background import background_mask, flicker
from tcan.metrics.frechet import frechet_distance
from tcan.metrics.image import image_metrics, l1_disco, psnr_uint8_overflow, ssim_disco
from tcan.metrics.likeness import colour_distance, part_colours
from tcan.metrics.pose import joint_errors, mean_pose, pose_metrics
from tcan.metrics.region_labels import labelled_region_metrics
from tcan.metrics.regions import region_metrics
from tcan.metrics.temporal import warping_error

__all__ = [
    "background_mask",
    "colour_distance",
    "flicker",
    "frechet_distance",
    "image_metrics",
    "joint_errors",
    "l1_disco",
    "labelled_region_metrics",
    "mean_pose",
    "part_colours",
    "pose_metrics",
    "psnr_uint8_overflow",
    "region_metrics",
    "ssim_disco",
    "warping_error",
]
