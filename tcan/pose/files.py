"""Pose files in OpenPose's JSON format: a frame is `{"people": [{"pose_keypoints_2d": [x, y, score, ...]}, ...]}`. A person may
have hand_left_keypoints_2d, hand_right_keypoints_2d (21 points each) and face_keypoints_2d (70 points), too.

`read_poses` accepts three layouts:

- one file per video, `{"fps", "height", "width", "frames": [frame, ...]}`, as `write_poses` writes it;
- one file with a list of frames or a single frame, as ControlNet pose editors write it, with canvas_height and
  canvas_width in each frame;
- a folder with one file per frame, as OpenPose writes it, in the order of the file names; numbers in them are compared as
  numbers.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcan.atomic_write import atomic_write
from tcan.errors import UserError
from tcan.impostor import impostor
from tcan.pose.keypoints import add_missing_necks, are_normalized
from tcan.pose.parts import BODY, FACE, LEFT_HAND, NUM_POINTS, RIGHT_HAND

BODY_25 = (*range(8), *range(9, 19))
"""Indices of the 18 joints in OpenPose's 25-point model, which adds the mid hip (8) and the feet (19 to 24)."""
PARTS = {
    "hand_left_keypoints_2d": LEFT_HAND,
    "hand_right_keypoints_2d": RIGHT_HAND,
    "face_keypoints_2d": FACE,
}
MIN_FPS, MAX_FPS = 0.1, 1000
"""Range of frame rates that can be written to a video."""


@dataclass
class PoseFile:
    """Contents of a pose file."""

    people: list[NDArray[np.float32]]
    """Keypoints `[P, 18, 3]` of each frame, or `[P, 130, 3]` if the file has hands or faces; P may be 0."""

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
    if not any(found[:, BODY.stop :].any() for found in people):
        people = [found[:, BODY] for found in people]
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
    """Write one person's keypoints `[F, 18, 3]`, or `[F, 130, 3]` with hands and face, in pixels of an image of `height` x
    `width`.

    The file has one line per frame, so that poses can be corrected in a text editor. A joint with score 0 means "not
    found"; `"people": []` means that the frame has no person.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    values = {"version": 1.3, "fps": fps, "height": height, "width": width}
    head = json.dumps({name: value for name, value in values.items() if value is not None})
    parts = {"pose_keypoints_2d": BODY} | (PARTS if poses.shape[1] == NUM_POINTS else {})
    points = np.asarray(poses, np.float64).round(2)
    people = ({name: frame[part].ravel().tolist() for name, part in parts.items()} for frame in points)
    frames = [json.dumps({"people": [person]}) for person in people]
    try:
        with atomic_write(path) as partial:
            partial.write_text(f'{head[:-1]}, "frames": [\n' + ",\n".join(frames) + "\n]}\n")
    except OSError as error:
        raise UserError(f"{path}: cannot write the poses ({error.strerror}); check the folder") from None


def _read_folder(path: Path) -> list[Any]:
    files = sorted(path.glob("*.json"), key=_by_number)
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


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts frame_2 before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # programs on Windows write a byte order mark
    except OSError as error:
        raise UserError(f"{path}: cannot read the poses ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):  # ValueError includes UnicodeDecodeError
        found = impostor(path, "JSON")
        raise UserError(
            f"{path}: {found or 'not JSON; give keypoints in the format of OpenPose or tcan pose'}"
        ) from None


def _parse_frame(frame: Any, where: str) -> NDArray[np.float32]:
    """The people `[P, 130, 3]` of a frame; people with only hand or face keypoints are ignored."""
    bodies: list[NDArray[np.float32]] = []
    people = frame.get("people") if isinstance(frame, dict) else None
    if not isinstance(people, list) or not all(isinstance(person, dict) for person in people):
        raise UserError(f'{where}: no list of "people"; give keypoints in OpenPose\'s format')
    for person in people:
        if values := person.get("pose_keypoints_2d"):
            points = np.zeros((NUM_POINTS, 3), np.float32)
            points[BODY] = _parse_body(values, where)
            for name, part in PARTS.items():
                if values := person.get(name):
                    points[part] = _parse_part(values, part.stop - part.start, f"{where}: invalid {name}")
            bodies.append(points)
    return np.stack(bodies) if bodies else np.zeros((0, NUM_POINTS, 3), np.float32)


def _numbers(values: Sequence[Any]) -> NDArray[np.float32]:
    """The values as an array; NaN if they are not numbers."""
    try:
        return np.asarray(values, np.float32)
    except (TypeError, ValueError):
        return np.full(1, np.nan, np.float32)


def _found(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Points `[N, 3]` with scores of at most 1; all 0 where not found."""
    points[:, 2] = points[:, 2].clip(0, 1)
    return np.where(points[:, 2:] > 0, points, 0).astype(np.float32)


def _parse_part(values: Sequence[Any], count: int, where: str) -> NDArray[np.float32]:
    numbers = _numbers(values)
    if not np.isfinite(numbers).all() or numbers.shape != (3 * count,):
        raise UserError(f"{where}; give x, y, score of {count} points ({3 * count} numbers), or omit it")
    return _found(numbers.reshape(-1, 3))


def _parse_body(values: Sequence[Any], where: str) -> NDArray[np.float32]:
    numbers = _numbers(values)
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
    return add_missing_necks(_found(body))
