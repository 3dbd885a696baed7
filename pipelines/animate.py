"""A picture, a driving video, a model folder -> the animated video.

tcan animate --image hero.png --driving dance.mp4 --model run/model --out hero-dances.mp4
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.config import Config
from tcan.errors import UserError
from tcan.pipeline import TCANPipeline
from tcan.pose.skeleton import NECK, NOSE
from tcan.schedule import sampler
from tcan.video import fit_picture, read_picture, read_video, write_video
from tcan.weights import read_model_info

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def animate(
    image: Path, driving: Path, model: Path, out: Path, config: Config, side_by_side: bool = False
) -> None:
    """Writes an mp4 of the picture's person with the motion of the driving video's main person, at its frame rate.

    side_by_side: picture, driving pose and result beside each other, rather than the result alone.

    Raises:
        UserError: a file that is missing, damaged, of another kind, or without a person; a model folder that isn't
            whole or doesn't fit its bases; a target that can't be written.
    """
    out = Path(out)
    if out.suffix.lower() != ".mp4":
        raise UserError(f"{out}: the result is an mp4; name it so")
    picture = read_picture(image)
    frames, fps = read_video(driving)
    pipe = load_pipeline(model, config)
    poses = pipe.detect_poses(frames, str(driving))
    if not config.animate.retarget:
        poses = pipe.place_poses(poses, *frames.shape[1:3])
    character = pipe.detect_poses(picture[None], str(image))[0] if config.animate.retarget else None
    if character is not None and not (character[[NECK, NOSE], 2] > 0).all():
        raise UserError(
            f"{image}: no person found with neck and nose in sight; give a picture that shows one from the front"
        )
    del frames
    make_folder(out.parent)
    latents, poses = pipe(
        picture,
        poses,
        character=character,
        retarget=config.animate.retarget,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="latent",
        return_dict=False,
        **sampling(config),
    )
    result: Iterator[np.ndarray] = (
        frame for batch in pipe.decode(latents, config.animate.decode_batch) for frame in to_uint8(batch)
    )
    if side_by_side:
        result = beside(fit_picture(picture, pipe.height, pipe.width), pipe.draw(poses), result)
    write_video(result, out, fps)
    print(f"{out}: {len(poses)} frames, {fps:g} a second", flush=True)


def load_pipeline(model: Path, config: Config) -> TCANPipeline:
    """The model folder as `config.animate` wants it loaded: bases, precision, device."""
    device = config.animate.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"animate.device = {device}: no GPU is at hand; use auto or cpu")
    bases = dataclasses.asdict(config.bases)
    if config.animate.bases == "model":
        bases = {} if "pose" in read_model_info(model)["bases"] else {"pose": bases["pose"]}
    pipe = TCANPipeline.from_pretrained(
        model, torch_dtype=PRECISIONS[config.animate.precision], device=device, **bases
    )
    pipe.scheduler = sampler(pipe.scheduler, config.animate.scheduler)
    pipe.set_progress_bar_config(desc="denoising", disable=None)  # None: only where a terminal shows it
    return pipe


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
    }


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """RGB in [0, 1] -> uint8, of any shape."""
    return (frames * 255).round().astype(np.uint8)


def beside(reference: np.ndarray, poses: np.ndarray, result: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """reference `[H, W, 3]`, poses `[F, H, W, 3]`, F frames `[H, W, 3]` -> F frames `[H, 3 W, 3]`."""
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
