"""Animate one image with the motion of a driving video or of a file of poses.

tcan animate --image hero.png --driving dance.mp4 --model run/model --out hero-dances.mp4
tcan animate --image hero.png --poses dance.json --model run/model --out hero-dances.gif
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pipelines.config import Config
from pipelines.inference import (
    check_model,
    choose_device,
    create_folder,
    drawn_parts,
    driving_poses,
    load_detector,
    load_pipeline,
    memory_advice,
)
from pipelines.match import (
    Motion,
    check_character,
    clean_people,
    find_characters,
    match_motion,
    output_size,
    print_verdict,
    refuse_problems,
    report,
)
from tcan.errors import UserError
from tcan.pipeline import Callback, TCANPipeline
from tcan.pixels import to_uint8
from tcan.pose import PoseDetector, find_people, read_poses
from tcan.pose.cleaning import CleanPoses
from tcan.pose.parts import keep_parts
from tcan.pose.tracking import check_selection
from tcan.video import VideoFrames, check_target, is_image, read_image, write_video
from tcan.weights import read_model_info


@dataclass(frozen=True)
class Animation:
    """Input and output files of one animation; `driving` or `poses` is required."""

    image: Path
    out: Path
    """In the formats of `tcan.video.write_video`: .mp4, .webm, .gif, or a folder of PNG images."""
    driving: Path | None = None
    poses: Path | None = None
    """Replaces the poses detected in `driving`; in any format that `tcan.pose.read_poses` supports."""
    character: Path | None = None
    """Replaces the pose detected in `image`; same formats."""
    fps: float | None = None
    """Frames per second, to which a driving video is resampled; None: its rate, else that of the file of poses."""
    audio: bool = False
    side_by_side: bool = False
    person: str = "largest"
    """Person of the image, or several; see `tcan.pose.tracking.select_people`."""
    driving_person: str = "largest"
    """Person of the driving video, or as many as of the image, in the same order."""
    strict: bool = False
    """Refuse poses that do not match the image (see `tcan.pose.match`) instead of warning."""


@dataclass
class Inputs:
    """The input files of an animation, opened and checked as far as possible without a model."""

    image: np.ndarray  # uint8 [H, W, 3]
    fps: float
    video: VideoFrames | None
    drivers: list[CleanPoses] | None  # driving poses from a file
    size: tuple[int, int] | None  # height and width of the image that the driving poses refer to, if known
    characters: list[np.ndarray] | None  # poses of the characters from a file: [18, 3] in pixels of the image


def animate(animation: Animation, model: Path, config: Config, dry_run: bool = False) -> None:
    """Animate the person of the image with the motion of the driving video's main person, at its frame rate.

    The verdict on the poses is printed first. With `dry_run`, nothing else happens: the settings and the files are checked
    without reading pretrained weights, and OUT.preview.png shows the poses over the image.
    Frames are read and written one at a time; `TCANPipeline` documents the memory that grows with the video.

    Raises:
        UserError: a file that is missing, damaged, of the wrong type, or without a person; files that do not match; a
            model folder that is incomplete or does not match its pretrained models; a target that cannot be written.
    """
    inputs = read_inputs(animation, config)
    if dry_run:
        check_model(model, config)
        info = read_model_info(model)
        size = output_size(inputs.image, (info["height"], info["width"]), config)
        detector = load_detector(model, config, choose_device(config))
        motion = read_motion(detector, animation, inputs, config, size)
        motion.poses = keep_parts(motion.poses, **drawn_parts(info, config))
        report(motion, animation.out.with_suffix(".preview.png"))
        refuse_problems(motion, str(animation.out), animation.strict)
        return
    with memory_advice(config):
        pipe = load_pipeline(model, config)
        motion = prepare_motion(pipe, animation, inputs, config)
        print_verdict(motion)
        refuse_problems(motion, str(animation.out), animation.strict)
        count = render_animation(pipe, animation, inputs, motion, config)
    print(f"{animation.out}: {count} frames at {inputs.fps:g} frames/s", flush=True)


def read_inputs(animation: Animation, config: Config) -> Inputs:
    """Open and check the files of an animation.

    Raises:
        UserError: see `animate`.
    """
    _check_options(animation, config)
    image = read_image(animation.image)
    if animation.driving is not None and is_image(animation.driving):
        raise UserError(f"{animation.driving}: an image, not a video; pass a driving video with --driving")
    video = None if animation.driving is None else VideoFrames(animation.driving, animation.fps)
    size = None if video is None else (video.height, video.width)
    drivers, fps = None, animation.fps or (video and video.fps)
    if animation.poses is not None:
        file = read_poses(animation.poses)
        if file.height and file.width:
            size = file.height, file.width
        fps = fps or file.fps
        if video is not None and (count := sum(1 for _ in video)) != len(file.people):
            raise UserError(
                f"{animation.poses}: {len(file.people)} frames, but {animation.driving} has {count}; "
                "pass the poses of this video, or omit --driving"
            )
        points = np.concatenate(file.people)
        extent = float(points[..., 1].max(initial=1)), float(points[..., 0].max(initial=1))
        height, width = size or extent
        drivers = clean_people(
            file.people, height, width, animation.driving_person, str(animation.poses), config
        )
    if not fps:
        raise UserError(f"{animation.poses}: no frame rate; pass --fps, or the video with --driving")
    if size is None and config.animate.retarget == "none":
        raise UserError(
            f"{animation.poses}: no height and width of the image, required without retargeting; add both to the "
            "file, or pass the video with --driving"
        )
    return Inputs(image, fps, video, drivers, size, _read_characters(animation, image, config))


def _check_options(animation: Animation, config: Config) -> None:
    check_target(animation.out, animation.audio)
    check_people(animation.person, animation.driving_person, "--", config)
    if animation.driving is None and animation.poses is None:
        raise UserError(
            f"{animation.out}: no driving motion; pass a video with --driving or poses with --poses"
        )
    if animation.audio and animation.driving is None:
        raise UserError("--audio copies the audio of the driving video; pass one with --driving")
    if animation.character is not None and config.animate.retarget == "none":
        raise UserError(
            "--character has no effect without retargeting; omit it, or set animate.retarget to robust"
        )
    if animation.fps is not None and not 0.1 <= animation.fps <= 1000:
        raise UserError(f"--fps {animation.fps:g}: must be from 0.1 to 1000; pass frames per second")


def check_people(person: str, driving_person: str, prefix: str, config: Config) -> None:
    """Check the selections of people before anything runs.

    Args:
        prefix: start of the names of both selections in error messages.

    Raises:
        UserError: an invalid selection, or different numbers of people.
    """
    check_selection(person, f"{prefix}person")
    check_selection(driving_person, f"{prefix}driving_person")
    first, second = (len(selection.split("+")) for selection in (person, driving_person))
    if first != second and config.animate.retarget != "none":
        raise UserError(
            f"{prefix}person {person}: {first} of the image, but {prefix}driving_person {driving_person} are {second}; select "
            "the same number of people"
        )


def _read_characters(animation: Animation, image: np.ndarray, config: Config) -> list[np.ndarray] | None:
    """The selected people of the file's first frame, `[18, 3]` each in pixels of the image."""
    path = animation.character
    if path is None:
        return None
    file = read_poses(path)
    height, width = image.shape[:2]
    people = file.people[0].copy()
    if file.height and file.width:  # drawn on a copy of the image of another size
        people[..., :2] *= width / file.width, height / file.height
    selected = clean_people([people], height, width, animation.person, str(path), config)
    return [check_character(clean.poses[0], path) for clean in selected]


def read_motion(
    detector: PoseDetector | None,
    animation: Animation,
    inputs: Inputs,
    config: Config,
    size: tuple[int, int],
) -> Motion:
    """Detect the poses that no file gives, and fit them to the output of height and width `size`.

    Raises:
        UserError: see `animate`.
    """
    drivers, characters = inputs.drivers, inputs.characters or []
    if drivers is None:
        assert inputs.video is not None and detector is not None
        people, height, width = find_people(detector, inputs.video)
        drivers = clean_people(
            people, height, width, animation.driving_person, str(animation.driving), config
        )
    extent = max(float(driver.poses[..., 1].max(initial=1)) for driver in drivers)
    pose_height = inputs.size[0] if inputs.size else round(extent)
    drivers = [replace(d, poses=driving_poses(d.poses, pose_height, config)) for d in drivers]
    if not characters and config.animate.retarget != "none":
        assert detector is not None
        characters = find_characters(detector, inputs.image, animation.person, str(animation.image), config)
    return match_motion(inputs.image, drivers, characters, inputs.size, config, size, str(animation.image))


def prepare_motion(pipe: TCANPipeline, animation: Animation, inputs: Inputs, config: Config) -> Motion:
    """The poses of an animation, fitted to its output; see `read_motion`."""
    size = output_size(inputs.image, (pipe.height, pipe.width), config)
    return read_motion(pipe.pose_detector, animation, inputs, config, size)


def render_animation(
    pipe: TCANPipeline, animation: Animation, inputs: Inputs, motion: Motion, config: Config
) -> int:
    """Animate, and write frames while they are decoded. Returns the number of frames.

    Raises:
        UserError: see `animate`.
    """
    create_folder(animation.out.parent)
    frames = generate_frames(pipe, motion, config)
    if animation.side_by_side:
        height, width = motion.image.shape[:2]
        drawn = (pipe.draw(pose[None], height, width)[0] for pose in motion.poses)
        frames = side_by_side(motion.image, drawn, frames)
    write_video(frames, animation.out, inputs.fps, animation.driving if animation.audio else None)
    return len(motion.poses)


def generate_frames(
    pipe: TCANPipeline, motion: Motion, config: Config, callback: Callback | None = None
) -> Iterator[np.ndarray]:
    """Denoise all frames, then decode them while they are consumed: uint8 `[H, W, 3]` each.

    Args:
        callback: called after each denoising step; see `TCANPipeline.__call__`.
    """
    latents = pipe.denoise(
        motion.image,
        motion.poses,
        sampling=config.animate,
        generator=torch.Generator().manual_seed(config.seed),
        callback_on_step_end=callback,
    )
    return (frame for batch in pipe.decode(latents, config.animate.decode_batch) for frame in to_uint8(batch))


def side_by_side(
    reference: np.ndarray, poses: Iterable[np.ndarray], frames: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """Concatenate reference `[H, W, 3]`, F drawn poses and F frames `[H, W, 3]` each to F frames `[H, 3 W, 3]`."""
    return (
        np.concatenate([reference, pose, frame], axis=1) for pose, frame in zip(poses, frames, strict=True)
    )
