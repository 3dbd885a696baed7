"""Pose detection, tracking, drawing and retargeting.

Keypoints are float32 `[..., 18, 3]`: (x, y, score) in OpenPose's order (`skeleton.JOINTS`), with x and y in pixels of
the image and score in [0, 1]. A joint that was not found is all 0.
"""

from tcan.pose.cleaning import main_person_poses
from tcan.pose.corrupt import PoseErrors, corrupt_poses
from tcan.pose.draw import draw_poses
from tcan.pose.files import PoseFile, read_poses, write_poses
from tcan.pose.openpose import OpenPose, PoseDetector, find_people
from tcan.pose.retarget import retarget
from tcan.pose.tracking import track_main_person

__all__ = [
    "OpenPose",
    "PoseDetector",
    "PoseErrors",
    "PoseFile",
    "corrupt_poses",
    "draw_poses",
    "find_people",
    "main_person_poses",
    "read_poses",
    "retarget",
    "track_main_person",
    "write_poses",
]
