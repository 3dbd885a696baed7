"""Animate one image with the motion of a driving video or of a file of poses.

tcan animate --image hero.png --driving dance.mp4 --model run/model --out hero-dances.mp4
tcan animate --image hero.png --poses dance.json --model run/model --out hero-dances.gif
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipelines.config import Config
from pipelines.inference import create_folder, driving_poses, load_pipeline, memory_advice
from tcan.crop import fit_image
from tcan.errors import UserError
from tcan.person_box import person_box
from tcan.pipeline import TCANPipeline
from tcan.pixels import to_uint8
from tcan.pose import main_person_poses, read_poses, track_main_person
from tcan.pose.skeleton import NECK, NOSE
from tcan.video import VideoFrames, check_target, is_image, read_image, write_video


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


@dataclass
class Inputs:
    """The input files of an animation, opened and checked as far as possible without a model."""

    image: np.ndarray  # uint8 [H, W, 3]
    fps: float
    video: VideoFrames | None
    poses: np.ndarray | None  # driving poses from a file: [F, 18, 3]
    size: tuple[int, int] | None  # height and width of the image that the driving poses refer to, if known
    character: np.ndarray | None  # pose of the character from a file: [18, 3] in pixels of the image


def animate(animation: Animation, model: Path, config: Config) -> None:
    """Animate the person of the image with the motion of the driving video's main person, at its frame rate.

    Frames are read and written one at a time; `TCANPipeline` documents the memory that grows with the video.

    Raises:
        UserError: a file that is missing, damaged, of the wrong type, or without a person; files that do not match; a
            model folder that is incomplete or does not match its pretrained models; a target that cannot be written.
    """
    inputs = read_inputs(animation, config)
    with memory_advice(config):
        count = render_animation(load_pipeline(model, config), animation, inputs, config)
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
    poses, fps = None, animation.fps or (video and video.fps)
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
        poses = main_person_poses(
            file.people, height, width, str(animation.poses), config.animate.smoothing_window
        )
    if not fps:
        raise UserError(f"{animation.poses}: no frame rate; pass --fps, or the video with --driving")
    if size is None and config.animate.retarget == "none":
        raise UserError(
            f"{animation.poses}: no height and width of the image, required without retargeting; add both to the "
            "file, or pass the video with --driving"
        )
    return Inputs(image, fps, video, poses, size, _read_character(animation.character, image))


def _check_options(animation: Animation, config: Config) -> None:
    check_target(animation.out, animation.audio)
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


def _read_character(path: Path | None, image: np.ndarray) -> np.ndarray | None:
    """The main person of the file's first frame, `[18, 3]` in pixels of the image."""
    if path is None:
        return None
    file = read_poses(path)
    height, width = image.shape[:2]
    character = track_main_person(file.people[:1], height, width)[0]
    if file.height and file.width:  # drawn on a copy of the image of another size
        character[:, :2] *= width / file.width, height / file.height
    return _check_character(character, path)


def _check_character(character: np.ndarray, path: Path) -> np.ndarray:
    if not (character[[NECK, NOSE], 2] > 0).all():
        raise UserError(
            f"{path}: no person found with visible neck and nose; use an image that shows a person from the front, or "
            "pass keypoints with --character"
        )
    return character


def render_animation(pipe: TCANPipeline, animation: Animation, inputs: Inputs, config: Config) -> int:
    """Animate, and write frames while they are decoded. Returns the number of frames.

    Raises:
        UserError: see `animate`.
    """
    image, poses, options = inputs.image, inputs.poses, config.animate
    height, width = options.height or pipe.height, options.width or pipe.width
    if poses is None:
        assert inputs.video is not None
        poses = pipe.detect_poses(inputs.video, str(animation.driving), options.smoothing_window)
    pose_height = inputs.size[0] if inputs.size else round(float(poses[..., 1].max(initial=1)))
    poses = driving_poses(poses, pose_height, config)
    character = inputs.character
    if options.retarget == "none":
        assert inputs.size is not None
        poses = pipe.scale_poses(poses, *inputs.size, height, width)
    elif character is None:
        character = pipe.detect_poses([image], str(animation.image))[0]
        character = _check_character(character, animation.image)
    create_folder(animation.out.parent)
    latents, poses = pipe(
        image,
        poses,
        sampling=options,
        character=character,
        retarget=options.retarget,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="latent",
        return_dict=False,
    )
    frames: Iterator[np.ndarray] = (
        frame for batch in pipe.decode(latents, options.decode_batch) for frame in to_uint8(batch)
    )
    if animation.side_by_side:
        drawn = (pipe.draw(pose[None], height, width)[0] for pose in poses)
        box = (
            None
            if character is None
            else person_box(character, image.shape[0], image.shape[1], height, width)
        )
        frames = side_by_side(fit_image(image, height, width, box), drawn, frames)
    write_video(frames, animation.out, inputs.fps, animation.driving if animation.audio else None)
    return len(poses)


def side_by_side(
    reference: np.ndarray, poses: Iterable[np.ndarray], frames: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """Concatenate reference `[H, W, 3]`, F drawn poses and F frames `[H, W, 3]` each to F frames `[H, 3 W, 3]`."""
    return (
        np.concatenate([reference, pose, frame], axis=1) for pose, frame in zip(poses, frames, strict=True)
    )
