"""Poses on disk, in OpenPose's own JSON: a frame is `{"people": [{"pose_keypoints_2d": [x, y, score, ...]}, ...]}`.

Three forms are read: one file of a whole video, `{"fps", "height", "width", "frames": [frame, ...]}`, which
`write_poses` writes; one file of a bare list of frames, or of a single frame (editors of ControlNet's poses write
these, with canvas_height and canvas_width in each); and a folder as OpenPose itself writes it, a file a frame in
the order of their names.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcan.errors import UserError

BODY_25 = (*range(8), *range(9, 19))
"""Where OpenPose's model of 25 points has the 18: it adds the middle of the hips, and the feet at the end."""


@dataclass
class PoseFile:
    """What a file holds."""

    people: list[NDArray[np.float32]]
    """Of each frame its people `[P, 18, 3]`, P may be 0."""

    height: int | None
    width: int | None
    """Of the image whose pixels the keypoints are in; None where the file doesn't say, as OpenPose's own don't."""

    fps: float | None
    """Frames a second, where the file says."""


def read_poses(path: str | os.PathLike) -> PoseFile:
    """Reads any of the three forms, with 18 points a person (COCO) or 25 (BODY_25, OpenPose's default).

    Raises:
        UserError: the file is missing or isn't one of these, naming the frame that is wrong.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise UserError(f"{path}: no .json in this folder; give OpenPose's keypoint files, or one file")
        whole: Any = [_read_json(file) for file in files]
        if not all(isinstance(frame, dict) and "people" in frame for frame in whole):
            raise UserError(
                f"{path}: not each .json here is one frame as OpenPose writes it; name the file of poses itself"
            )
    else:
        whole = _read_json(path)
    if isinstance(whole, dict) and "people" in whole:
        whole = [whole]
    if isinstance(whole, list):
        first = whole[0] if whole and isinstance(whole[0], dict) else {}
        whole = {"frames": whole, "height": first.get("canvas_height"), "width": first.get("canvas_width")}
    if not isinstance(whole, dict) or not isinstance(whole.get("frames"), list) or not whole["frames"]:
        raise UserError(f"{path}: holds no frames of poses; see tcan pose, which writes such a file")
    people = [_people(frame, f"{path}: frame {number}") for number, frame in enumerate(whole["frames"])]
    sizes = {name: whole.get(name) for name in ("height", "width", "fps")}
    for name, value in sizes.items():
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise UserError(f"{path}: {name} = {value}: must be a number above 0")
    return PoseFile(people, **sizes)


def write_poses(
    poses: NDArray[np.float32], path: str | os.PathLike, height: int, width: int, fps: float | None = None
) -> None:
    """Writes one person's keypoints `[F, 18, 3]` in pixels of `[height, width]`, a line a frame, so that an editor of
    text will do to correct them; a joint of score 0 counts as not found, and `"people": []` as nobody.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    values = {"version": 1.3, "fps": fps, "height": height, "width": width}
    head = json.dumps({name: value for name, value in values.items() if value is not None})
    points = np.asarray(poses, np.float64).reshape(len(poses), -1).round(2).tolist()
    frames = [json.dumps({"people": [{"pose_keypoints_2d": frame}]}) for frame in points]
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(f'{head[:-1]}, "frames": [\n' + ",\n".join(frames) + "\n]}\n")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the poses ({error.strerror}); check the folder") from None
    finally:
        partial.unlink(missing_ok=True)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read these poses ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):  # of bytes that are no text, too
        raise UserError(f"{path}: not JSON; give keypoints as OpenPose or tcan pose writes them") from None


def _people(frame: Any, where: str) -> NDArray[np.float32]:
    """The people of a frame `[P, 18, 3]`; those of whom only hands or face are given are left out."""
    bodies: list[NDArray[np.float32]] = []
    people = frame.get("people") if isinstance(frame, dict) else None
    if not isinstance(people, list) or not all(isinstance(person, dict) for person in people):
        raise UserError(f'{where}: no list of "people"; give keypoints as OpenPose writes them')
    for values in (person.get("pose_keypoints_2d") for person in people):
        if values:
            bodies.append(_body(values, where))
    return np.stack(bodies) if bodies else np.zeros((0, 18, 3), np.float32)


def _body(values: Sequence[Any], where: str) -> NDArray[np.float32]:
    try:
        numbers = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        numbers = np.full(1, np.nan, np.float32)
    if not np.isfinite(numbers).all() or numbers.shape not in ((54,), (75,)):
        raise UserError(
            f"{where}: pose_keypoints_2d must be x, y, score of 18 points (54 numbers) or of BODY_25 (75)"
        )
    body = numbers.reshape(-1, 3)
    if len(body) == 25:
        body = body[list(BODY_25)]
    body[:, 2] = body[:, 2].clip(0, 1)
    return np.where(body[:, 2:] > 0, body, 0).astype(np.float32)
