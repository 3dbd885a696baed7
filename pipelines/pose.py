"""Detect the poses of a video or image: write them to a file for manual correction, and a preview.

tcan pose dance.mp4 --out dance.json    # and dance.preview.mp4
tcan pose hero.png --out hero.json      # and hero.preview.png
tcan animate --image hero.png --character hero.json --poses dance.json --model run/model --out hero-dances.mp4
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

from pipelines.config import Config
from pipelines.inference import choose_device, create_folder
from pipelines.match import clean_people, find_characters, match_motion, output_size, report
from tcan.errors import UserError
from tcan.pose import PoseDetector, draw_poses, find_people, write_poses
from tcan.pose.parts import BODY
from tcan.pose.tracking import People, check_selection, numbered_people
from tcan.video import VideoFrames, is_image, read_image, write_image, write_video
from tcan.weights import load_pose_detector


def pose(source: Path, out: Path, config: Config, person: str = "largest") -> None:
    """Write the poses that would drive an animation: one tracked person, with gaps filled in.

    OUT.preview.mp4 (or .png), next to OUT.json, shows the poses over the darkened frames. If several people are
    visible, it shows their numbers.

    Raises:
        UserError: a missing file, neither video nor image, no person found, a file that cannot be written.
    """
    check_selection(person, "--person")
    if "+" in person:
        raise UserError(f"--person {person}: several people; select one")
    if out.suffix.lower() != ".json":
        raise UserError(f"{out}: poses are written as JSON; use a name that ends in .json")
    fps: float | None = None
    frames: Iterable[np.ndarray]
    if is_image(source):
        frames = [read_image(source)]
    else:
        frames = video = VideoFrames(source)
        fps = video.fps
    detector = _load_detector(config)
    people, height, width = find_people(detector, frames)
    poses = clean_people(people, height, width, person, str(source), config)[0].poses
    create_folder(out.parent)
    write_poses(poses, out, height, width, fps)
    preview = out.with_suffix(".preview.png" if fps is None else ".preview.mp4")
    labels = number_labels(people, height, width)
    overlays = (overlay(frame, pose, label) for frame, pose, label in zip(frames, poses, labels, strict=True))
    if fps is None:
        write_image(next(overlays), preview)
    else:
        write_video(overlays, preview, fps)
    print(f"{out}: {len(poses)} frames; preview: {preview}", flush=True)


def match(source: Path, image: Path, preview: Path, config: Config, person: str, driving_person: str) -> None:
    """Check whether the poses of a video match an image; print the findings, write a preview.

    Raises:
        UserError: a missing file, neither video nor image, no person found, a file that cannot be written.
    """
    check_selection(person, "--person")
    check_selection(driving_person, "--driving_person")
    reference = read_image(image)
    frames: Iterable[np.ndarray] = [read_image(source)] if is_image(source) else VideoFrames(source)
    detector = _load_detector(config)
    people, height, width = find_people(detector, frames)
    drivers = clean_people(people, height, width, driving_person, str(source), config)
    characters: list[np.ndarray] = []
    if config.animate.retarget != "none":
        characters = find_characters(detector, reference, person, str(image), config)
    size = output_size(reference, (config.size, config.size), config)
    report(match_motion(reference, drivers, characters, (height, width), config, size, str(image)), preview)


def _load_detector(config: Config) -> PoseDetector:
    return load_pose_detector(
        config.pretrained.pose, choose_device(config), config.draw.hands, config.draw.face
    )


Labels = Sequence[tuple[int, tuple[float, float]]]
"""Number and position of each person in a frame."""


def number_labels(people: People, height: int, width: int) -> Sequence[Labels]:
    """Labels of each frame; empty if there is only one person."""
    labels: list[list[tuple[int, tuple[float, float]]]] = [[] for _ in people]
    tracks = numbered_people(people, height, width)
    for number, track in enumerate(tracks, start=1):
        for frame in np.flatnonzero(track >= 0).tolist() if len(tracks) > 1 else ():
            body = people[frame][track[frame], BODY]
            found = body[body[:, 2] > 0]
            labels[frame].append((number, (float(found[:, 0].mean()), float(found[:, 1].min()))))
    return labels


def overlay(frame: np.ndarray, pose: np.ndarray, labels: Labels = ()) -> np.ndarray:
    """Draw a pose `[N, 3]`, or poses `[P, N, 3]`, and the numbers of people over a darkened frame, uint8 RGB `[H, W, 3]`."""
    height, width = frame.shape[:2]
    strokes = draw_poses(pose[None], height, width, max(1, round(min(height, width) / 128)))[0]
    image = np.where(strokes.any(axis=-1, keepdims=True), strokes, frame // 2)
    scale = max(min(height, width) / 300, 0.4)
    for number, (x, y) in labels:
        place = int(x - 8 * scale), max(int(y - 10 * scale), int(24 * scale))
        for color, thickness in (((0, 0, 0), 4), ((255, 255, 255), 2)):
            cv2.putText(
                image,
                str(number),
                place,
                cv2.FONT_HERSHEY_SIMPLEX,
                scale,
                color,
                round(thickness * scale) or 1,
            )
    return image
