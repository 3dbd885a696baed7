"""A image, a driving video or its poses, a model folder -> the animated video.

tcan animate --image hero.png --driving dance.mp4 --model run/model --out hero-dances.mp4
tcan animate --image hero.png --poses dance.json --model run/model --out hero-dances.gif
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.config import Config
from tcan.errors import UserError
from tcan.pipeline import TCANPipeline
from tcan.pose import follow_main_person, one_body, read_poses
from tcan.pose.skeleton import NECK, NOSE
from tcan.schedule import sampler
from tcan.video import VideoFrames, check_target, fit_image, is_image, read_image, write_video
from tcan.weights import read_model_info

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Animation:
    """One result, and the files it is made from; `driving` or `poses` must be given."""

    image: Path
    out: Path
    """As `tcan.video.write_video` takes it: .mp4, .webm, .gif, or a folder of PNG."""
    driving: Path | None = None
    poses: Path | None = None
    """Takes the place of the poses found in `driving`; any form that `tcan.pose.read_poses` reads."""
    character: Path | None = None
    """The same for the image."""
    fps: float | None = None
    """Frames a second; None: the driving video's, or as the file of poses says."""
    audio: bool = False
    side_by_side: bool = False


@dataclass
class Inputs:
    """The files of an animation, opened and found good as far as that is known without a model."""

    image: np.ndarray  # uint8 [H, W, 3]
    fps: float
    video: VideoFrames | None
    poses: np.ndarray | None  # the driver's, given by hand: [F, 18, 3]
    size: (
        tuple[int, int] | None
    )  # height and width that the driver's poses are in pixels of, where they are known
    character: np.ndarray | None  # given by hand: [18, 3] in pixels of the image


def animate(animation: Animation, model: Path, config: Config) -> None:
    """Writes the image's person with the motion of the driving video's main person, at its frame rate.

    Memory holds a few frames, and of the whole video what `TCANPipeline` says.

    Raises:
        UserError: a file that is missing, damaged, of another kind, or without a person; files that don't go together;
            a model folder that isn't whole or doesn't fit its pretrained; a target that can't be written.
    """
    inputs = read_inputs(animation, config)
    count = make(load_pipeline(model, config), animation, inputs, config)
    print(f"{animation.out}: {count} frames, {inputs.fps:g} a second", flush=True)


def read_inputs(animation: Animation, config: Config) -> Inputs:
    """Opens an animation's files.

    Raises:
        UserError: as `animate`.
    """
    check_target(animation.out, animation.audio)
    if animation.driving is None and animation.poses is None:
        raise UserError(f"{animation.out}: needs a motion; give a video with --driving or poses with --poses")
    if animation.audio and animation.driving is None:
        raise UserError("--audio copies the sound of the driving video; give one with --driving")
    if animation.character is not None and not config.animate.retarget:
        raise UserError("--character is for fitting the poses to it; leave it out, or animate.retarget on")
    if animation.fps is not None and not animation.fps > 0:
        raise UserError(f"--fps {animation.fps:g}: must be more than 0 frames a second")
    image = read_image(animation.image)
    if animation.driving is not None and is_image(animation.driving):
        raise UserError(f"{animation.driving}: is a image; give a video that moves it with --driving")
    video = None if animation.driving is None else VideoFrames(animation.driving)
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
                "give poses of this video, or leave it out"
            )
        points = np.concatenate(file.people)
        extent = float(points[..., 1].max(initial=1)), float(points[..., 0].max(initial=1))
        height, width = size or extent
        poses = one_body(file.people, height, width, str(animation.poses), config.animate.smooth)
    if not fps:
        raise UserError(
            f"{animation.poses}: holds no frame rate; give it with --fps, or the video with --driving"
        )
    if size is None and not config.animate.retarget:
        raise UserError(
            f"{animation.poses}: doesn't say of which height and width its image is, which poses that aren't "
            "retargeted need; add both to the file, or give the video with --driving"
        )
    return Inputs(image, fps, video, poses, size, _given_character(animation.character, image))


def _given_character(path: Path | None, image: np.ndarray) -> np.ndarray | None:
    """The body of the file's first frame `[18, 3]`, in pixels of the image."""
    if path is None:
        return None
    file = read_poses(path)
    height, width = image.shape[:2]
    character = follow_main_person(file.people[:1], height, width)[0]
    if file.height and file.width:  # drawn by hand on a larger or smaller copy
        character[:, :2] *= width / file.width, height / file.height
    return _checked_character(character, path)


def _checked_character(character: np.ndarray, path: Path) -> np.ndarray:
    if not (character[[NECK, NOSE], 2] > 0).all():
        raise UserError(
            f"{path}: no person found with neck and nose in sight; give a image that shows one from the front, or "
            "keypoints with --character"
        )
    return character


def make(pipe: TCANPipeline, animation: Animation, inputs: Inputs, config: Config) -> int:
    """Animates, and writes the result as it is decoded; returns its number of frames.

    Raises:
        UserError: as `animate`.
    """
    image, poses, settings = inputs.image, inputs.poses, config.animate
    height, width = settings.height or pipe.height, settings.width or pipe.width
    if poses is None:
        assert inputs.video is not None
        poses = pipe.detect_poses(inputs.video, str(animation.driving), settings.smooth)
    character = inputs.character
    if not settings.retarget:
        assert inputs.size is not None
        poses = pipe.scale_poses(poses, *inputs.size, height, width)
    elif character is None:
        character = pipe.detect_poses([image], str(animation.image))[0]
        character = _checked_character(character, animation.image)
    make_folder(animation.out.parent)
    latents, poses = pipe(
        image,
        poses,
        character=character,
        retarget=settings.retarget,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="latent",
        return_dict=False,
        **sampling(config),
    )
    result: Iterator[np.ndarray] = (
        frame for batch in pipe.decode(latents, settings.decode_batch) for frame in to_uint8(batch)
    )
    if animation.side_by_side:
        drawn = (pipe.draw(pose[None], height, width)[0] for pose in poses)
        result = beside(fit_image(image, height, width), drawn, result)
    write_video(result, animation.out, inputs.fps, animation.driving if animation.audio else None)
    return len(poses)


def load_pipeline(model: Path, config: Config) -> TCANPipeline:
    """The model folder as `config.animate` wants it loaded: pretrained, precision, device."""
    device = find_device(config)
    pretrained = dataclasses.asdict(config.pretrained)
    if config.animate.pretrained == "model":
        pretrained = {} if "pose" in read_model_info(model)["pretrained"] else {"pose": pretrained["pose"]}
    pipe = TCANPipeline.from_pretrained(
        model, torch_dtype=PRECISIONS[config.animate.precision], device=device, **pretrained
    )
    pipe.scheduler = sampler(pipe.scheduler, config.animate.scheduler)
    pipe.set_progress_bar_config(desc="denoising", disable=None)  # None: only where a terminal shows it
    return pipe


def find_device(config: Config) -> str:
    """The device that `config.animate.device` means here.

    Raises:
        UserError: no such device, or a GPU where there is none.
    """
    device = config.animate.device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"animate.device = {device}: no such device; use auto, cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"animate.device = {device}: no GPU is at hand; use auto or cpu")
    return device


def sampling(config: Config) -> dict[str, Any]:
    """What `config.animate` says of a call of the pipeline."""
    animate = config.animate
    return {
        "num_inference_steps": animate.steps,
        "guidance_scale": animate.guidance_scale,
        "window": animate.window,
        "overlap": animate.overlap,
        "loop": animate.loop,
        "ptm": animate.ptm,
        "ptm_strength": animate.ptm_strength,
        "ptm_limit": animate.ptm_limit,
        "controlnet_scale": animate.controlnet_scale,
        "start_from_reference": animate.start_from_reference,
    }


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """RGB in [0, 1] -> uint8, of any shape."""
    return (frames * 255).round().astype(np.uint8)


def beside(
    reference: np.ndarray, poses: Iterable[np.ndarray], result: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """reference `[H, W, 3]`, F drawn poses and F frames `[H, W, 3]` each -> F frames `[H, 3 W, 3]`."""
    return (
        np.concatenate([reference, pose, frame], axis=1) for pose, frame in zip(poses, result, strict=True)
    )


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        UserError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make this folder ({error.strerror}); name another one") from None
