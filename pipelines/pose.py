"""Detect the poses of a video or image: write them to a file for manual correction, and a preview.

tcan pose dance.mp4 --out dance.json    # and dance.preview.mp4
tcan pose hero.png --out hero.json      # and hero.preview.png
tcan animate --image hero.png --character hero.json --poses dance.json --model run/model --out hero-dances.mp4
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipelines.config import Config
from pipelines.inference import choose_device, create_folder
from tcan.errors import UserError
from tcan.pose import draw_poses, find_people, main_person_poses, write_poses
from tcan.video import VideoFrames, is_image, read_image, write_image, write_video
from tcan.weights import load_pose_detector


def pose(source: Path, out: Path, config: Config) -> None:
    """Write the poses that would drive an animation: the tracked main person, with gaps filled in.

    OUT.preview.mp4 (or .png), next to OUT.json, shows the poses over the darkened frames.

    Raises:
        UserError: a missing file, neither video nor image, no person found, a file that cannot be written.
    """
    if out.suffix.lower() != ".json":
        raise UserError(f"{out}: poses are written as JSON; use a name that ends in .json")
    fps: float | None = None
    frames: Iterable[np.ndarray]
    if is_image(source):
        frames = [read_image(source)]
    else:
        frames = video = VideoFrames(source)
        fps = video.fps
    detector = load_pose_detector(config.pretrained.pose, choose_device(config))
    people, height, width = find_people(detector, frames)
    poses = main_person_poses(people, height, width, str(source), config.animate.smoothing_window)
    create_folder(out.parent)
    write_poses(poses, out, height, width, fps)
    preview = out.with_suffix(".preview.png" if fps is None else ".preview.mp4")
    overlays = (overlay(frame, pose) for frame, pose in zip(frames, poses, strict=True))
    if fps is None:
        write_image(next(overlays), preview)
    else:
        write_video(overlays, preview, fps)
    print(f"{out}: {len(poses)} frames; preview: {preview}", flush=True)


def overlay(frame: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Draw a pose `[18, 3]` over a darkened frame, uint8 RGB `[H, W, 3]`."""
    height, width = frame.shape[:2]
    strokes = draw_poses(pose[None], height, width, max(1, round(min(height, width) / 128)))[0]
    return np.where(strokes.any(axis=-1, keepdims=True), strokes, frame // 2)
