"""The poses of a video or image, in a file that can be corrected by hand, and a preview of them.

tcan pose dance.mp4 --out dance.json    # and dance.preview.mp4
tcan pose hero.png --out hero.json      # and hero.preview.png
tcan animate --image hero.png --character hero.json --poses dance.json --model run/model --out hero-dances.mp4
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipelines.animate import find_device, make_folder
from pipelines.config import Config
from tcan.errors import UserError
from tcan.pose import draw_poses, find_people, one_body, write_poses
from tcan.video import VideoFrames, is_image, read_image, write_image, write_video
from tcan.weights import load_pose_detector


def pose(source: Path, out: Path, config: Config) -> None:
    """Writes what would drive an animation: the main person, followed, joints filled in, missing stretches bridged.

    Beside OUT.json, OUT.preview.mp4 (or .png) shows the poses over the darkened frames.

    Raises:
        UserError: no such file, neither video nor image, nobody in it, a file that can't be written.
    """
    if out.suffix.lower() != ".json":
        raise UserError(f"{out}: the poses are written as JSON; name it .json")
    fps: float | None = None
    frames: Iterable[np.ndarray]
    if is_image(source):
        frames = [read_image(source)]
    else:
        frames = video = VideoFrames(source)
        fps = video.fps
    detector = load_pose_detector(config.pretrained.pose, find_device(config))
    people, height, width = find_people(detector, frames)
    poses = one_body(people, height, width, str(source), config.animate.smooth)
    make_folder(out.parent)
    write_poses(poses, out, height, width, fps)
    preview = out.with_suffix(".preview.png" if fps is None else ".preview.mp4")
    shown = (overlay(frame, body) for frame, body in zip(frames, poses, strict=True))
    if fps is None:
        write_image(next(shown), preview)
    else:
        write_video(shown, preview, fps)
    print(f"{out}: {len(poses)} frames; {preview} shows them", flush=True)


def overlay(frame: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """A darkened frame, uint8 RGB `[H, W, 3]`, with a pose `[18, 3]` drawn over it."""
    height, width = frame.shape[:2]
    strokes = draw_poses(pose[None], height, width, max(1, round(min(height, width) / 128)))[0]
    return np.where(strokes.any(axis=-1, keepdims=True), strokes, frame // 2)
