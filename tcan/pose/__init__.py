"""Poses: found, followed, drawn, and carried over to another body.

Keypoints everywhere are float32 `[..., 18, 3]`: (x, y, score) in OpenPose's order (`skeleton.JOINTS`), x and y in pixels
of the image they belong to, score in [0, 1]. A joint not found is all 0.
"""

from tcan.pose.corrupt import PoseErrors
from tcan.pose.draw import draw_poses
from tcan.pose.files import PoseFile, read_poses, write_poses
from tcan.pose.openpose import OpenPose, PoseDetector, find_people
from tcan.pose.retarget import retarget
from tcan.pose.tracking import follow_main_person, one_body

__all__ = [
    "OpenPose",
    "PoseDetector",
    "PoseErrors",
    "PoseFile",
    "draw_poses",
    "find_people",
    "follow_main_person",
    "one_body",
    "read_poses",
    "retarget",
    "write_poses",
]
