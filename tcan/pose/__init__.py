"""Poses: found, followed, drawn, and carried over to another body.

Keypoints everywhere are float32 `[..., 18, 3]`: (x, y, score) in OpenPose's order (`skeleton.JOINTS`), x and y in pixels
of the picture they belong to, score in [0, 1]. A joint not found is all 0.
"""

from tcan.pose.draw import draw_poses
from tcan.pose.follow import fill_gaps, follow_main_person
from tcan.pose.openpose import OpenPose, PoseDetector
from tcan.pose.retarget import retarget

__all__ = [
    "OpenPose",
    "PoseDetector",
    "draw_poses",
    "fill_gaps",
    "follow_main_person",
    "retarget",
]
