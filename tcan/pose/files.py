"""Pose files in OpenPose's JSON format: a frame is `{"people": [{"pose_keypoints_2d": [x, y, score, ...]}, ...]}`.

`read_poses` accepts three layouts:

- one file per video, `{"fps", "height", "width", "frames": [frame, ...]}`, as `write_poses` writes it;
- one file with a list of frames or a single frame, as ControlNet pose editors write it, with canvas_height and
  canvas_width in each frame;
- a folder with one file per frame, as OpenPose writes it, in the order of the file names.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcan.atomic_write import atomic_write
from tcan.errors import UserError
from tcan.pose.keypoints import add_missing_necks, are_normalized

BODY_25 = (*range(8), *range(9, 19))
"""Indices of the 18 joints in OpenPose's 25-point model, which adds the mid hip (8) and the feet (19 to 24)."""
MIN_FPS, MAX_FPS = 0.1, 1000
"""Range of frame rates that can be written to a video."""


@dataclass
class PoseFile:
    """Contents of a pose file."""

    people: list[NDArray[np.float32]]
    """Keypoints `[P, 18, 3]` of each frame; P may be 0."""

    height: int | None
    width: int | None
    """Image size in pixels; None if the file does not contain it, which is the case for OpenPose's own files."""

    fps: float | None
    """Frames per second; None if the file does not contain it."""


def read_poses(path: str | os.PathLike) -> PoseFile:
    """Read a pose file or folder, with 18 points per person (COCO) or 25 (BODY_25, OpenPose's default).

    A missing neck is set to the midpoint of the shoulders.

    Raises:
        UserError: the path does not exist or has another format; the message names the invalid frame.
    """
    path = Path(path)
    if path.is_dir():
        content: Any = _read_folder(path)
    else:
        content = _read_json(path)
    if isinstance(content, dict) and "people" in content:
        content = [content]
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        content = {
            "frames": content,
            "height": first.get("canvas_height"),
            "width": first.get("canvas_width"),
        }
    if not isinstance(content, dict) or not isinstance(content.get("frames"), list) or not content["frames"]:
        raise UserError(f"{path}: no frames with poses; create the file with tcan pose")
    people = [
        _parse_frame(frame, f"{path}: frame {number}") for number, frame in enumerate(content["frames"])
    ]
    sizes = {name: content.get(name) for name in ("height", "width", "fps")}
    for name, value in sizes.items():
        if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise UserError(f"{path}: {name} = {value}: must be a number > 0; correct the value")
    fps = sizes["fps"]
    if fps is not None and not MIN_FPS <= fps <= MAX_FPS:
        raise UserError(f"{path}: fps = {fps}: must be from {MIN_FPS} to {MAX_FPS}; correct the value")
    if are_normalized(np.concatenate(people)):
        raise UserError(
            f"{path}: keypoints from 0 to 1; multiply x by the width and y by the height of the image"
        )
    return PoseFile(people, **sizes)


def write_poses(
    poses: NDArray[np.float32], path: str | os.PathLike, height: int, width: int, fps: float | None = None
) -> None:
    """Write one person's keypoints `[F, 18, 3]` in pixels of an image of `height` x `width`.

    The file has one line per frame, so that poses can be corrected in a text editor. A joint with score 0 means "not
    found"; `"people": []` means that the frame has no person.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    values = {"version": 1.3, "fps": fps, "height": height, "width": width}
    head = json.dumps({name: value for name, value in values.items() if value is not None})
    points = np.asarray(poses, np.float64).reshape(len(poses), -1).round(2).tolist()
    frames = [json.dumps({"people": [{"pose_keypoints_2d": frame}]}) for frame in points]
    try:
        with atomic_write(path) as partial:
            partial.write_text(f'{head[:-1]}, "frames": [\n' + ",\n".join(frames) + "\n]}\n")
    except OSError as error:
        raise UserError(f"{path}: cannot write the poses ({error.strerror}); check the folder") from None


def _read_folder(path: Path) -> list[Any]:
    files = sorted(path.glob("*.json"))
    if not files:
        raise UserError(
            f"{path}: no .json files in this folder; give OpenPose's keypoint files or one pose file"
        )
    frames = [_read_json(file) for file in files]
    if not all(isinstance(frame, dict) and "people" in frame for frame in frames):
        raise UserError(
            f"{path}: not every .json file is one frame in OpenPose's format; give the path of the pose file"
        )
    return frames


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read the poses ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):  # ValueError includes UnicodeDecodeError
        raise UserError(f"{path}: not JSON; give keypoints in the format of OpenPose or tcan pose") from None


def _parse_frame(frame: Any, where: str) -> NDArray[np.float32]:
    """The people `[P, 18, 3]` of a frame; people with only hand or face keypoints are ignored."""
    bodies: list[NDArray[np.float32]] = []
    people = frame.get("people") if isinstance(frame, dict) else None
    if not isinstance(people, list) or not all(isinstance(person, dict) for person in people):
        raise UserError(f'{where}: no list of "people"; give keypoints in OpenPose\'s format')
    for values in (person.get("pose_keypoints_2d") for person in people):
        if values:
            bodies.append(_parse_body(values, where))
    return np.stack(bodies) if bodies else np.zeros((0, 18, 3), np.float32)


def _parse_body(values: Sequence[Any], where: str) -> NDArray[np.float32]:
    try:
        numbers = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        numbers = np.full(1, np.nan, np.float32)
    if not np.isfinite(numbers).all() or numbers.shape not in ((54,), (75,)):
        if numbers.shape == (51,):
            raise UserError(
                f"{where}: 17 points (COCO-17); convert them to OpenPose's 18 points, with a neck"
            )
        raise UserError(
            f"{where}: invalid pose_keypoints_2d; give x, y, score of 18 points (54 numbers) or of BODY_25 (75 numbers)"
        )
    body = numbers.reshape(-1, 3)
    if len(body) == 25:
        body = body[list(BODY_25)]
    body[:, 2] = body[:, 2].clip(0, 1)
    return add_missing_necks(np.where(body[:, 2:] > 0, body, 0).astype(np.float32))
