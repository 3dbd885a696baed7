"""Functions shared by the jobs that run a trained model: animate, animate_pairs, pose, evaluate."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, SchedulerMixin

from pipelines.config import Config
from tcan.acceleration import compile_tcan, compile_vae, is_compiled, use_fast_formats
from tcan.errors import UserError
from tcan.lora import read_lora
from tcan.pipeline import TCANPipeline
from tcan.pipeline_input import check_window, set_timesteps
from tcan.pose import PoseDetector, corrupt_poses
from tcan.schedule import noise_schedule, sampler
from tcan.weights import MINI_MODEL, load_pose_detector, read_model_info
from tcan.weights.model_folder import read_parts, untrained_model
from tcan.weights.pretrained import NETWORKS, check_source, load_scheduler, motion_positions

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_model(model: str, config: Config) -> Path:
    """Resolve `--model` to a folder: "mini" is the trained model in this package, others as in `local_model`.

    Raises:
        UserError: "mini" with the pretrained models of another preset; MLflow does not have the model.
    """
    if model != "mini":
        from pipelines.tracking import local_model

        return local_model(model, config.tracking)
    if config.pretrained.unet != "mini":
        raise UserError(
            f"--model mini: the model in this package belongs to the preset mini, not to {config.pretrained.unet}; pass "
            "a model trained on it with --model"
        )
    print(
        "model: mini, the one in this package, trained on rendered puppets at 128 x 128; use your own with --model",
        flush=True,
    )
    return MINI_MODEL


def load_pipeline(model: Path, config: Config) -> TCANPipeline:
    """Load a model folder with the pretrained models, precision, device and scheduler of `config.animate`.

    Raises:
        UserError: see `TCANPipeline.from_pretrained` and `choose_device`.
    """
    device = choose_device(config)
    load_device = device if config.animate.offload == "none" else "cpu"
    pretrained = {} if config.animate.pretrained == "model" else dataclasses.asdict(config.pretrained)
    detector = load_detector(model, config, load_device)
    pipe = TCANPipeline.from_pretrained(
        model,
        torch_dtype=PRECISIONS[config.animate.precision],
        device=load_device,
        **pretrained | {"pose": None},
    )
    pipe.register_modules(pose_detector=detector)
    pipe.model_info["draw"] = drawn_parts(pipe.model_info, config)
    pipe.scheduler = _chosen_scheduler(pipe.scheduler, pipe.tcan.max_frames, config)
    use_fast_formats(torch.device(device), pipe.tcan, pipe.vae)
    if config.animate.lora is not None:
        pipe.load_lora_weights(config.animate.lora)
        pipe.fuse_lora(config.animate.lora_scale)
    # Offloading moves weights between the steps; CUDA graphs need them at fixed addresses.
    if config.animate.offload == "none" and is_compiled(config.animate.compile, pipe.device):
        print("compiling the networks: the first step of a size takes minutes", flush=True)
        compile_tcan(pipe.tcan, cuda_graphs=True)
        compile_vae(pipe.vae, cuda_graphs=True)
    if config.animate.vae_tiling:
        pipe.enable_vae_tiling()
    if config.animate.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif config.animate.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    pipe.set_progress_bar_config(desc="denoising", disable=None)  # None: shown only on a terminal
    return pipe


def check_model(model: Path, config: Config) -> None:
    """Refuse what `load_pipeline` refuses, without reading pretrained weights, whose fingerprints are therefore not compared.

    Raises:
        UserError: see `load_pipeline`.
    """
    info = read_model_info(model)
    tcan = untrained_model(model, info)
    read_parts(model, info, tcan)
    sources = {part: entry["source"] for part, entry in info["pretrained"].items()}
    if config.animate.pretrained == "config":
        sources |= dataclasses.asdict(config.pretrained)
    for part in NETWORKS:
        check_source(part, sources[part])
    schedule = noise_schedule(load_scheduler(sources["scheduler"]), **info.get("schedule", {}))
    _chosen_scheduler(schedule, motion_positions(sources["motion_adapter"]), config)
    if config.animate.lora is not None:
        read_lora(config.animate.lora, tcan.denoiser)


def _chosen_scheduler(schedule: DDIMScheduler, positions: int, config: Config) -> SchedulerMixin:
    """The scheduler of the configuration, with the noise schedule of a model whose motion modules have these positions.

    Raises:
        UserError: the window is longer; an unknown scheduler, or one that does not support the schedule or the steps.
    """
    check_window(config.animate, positions)
    chosen = sampler(schedule, config.animate.scheduler)
    set_timesteps(chosen, config.animate.steps)
    return chosen


def drawn_parts(model_info: Mapping[str, Any], config: Config) -> dict[str, bool]:
    """Parts of the pose images next to the body: those of the model's training and those of `config.draw`, `{"hands", "face"}`."""
    trained = model_info.get("draw", {})
    return {part: on or trained.get(part, False) for part, on in dataclasses.asdict(config.draw).items()}


def load_detector(model: Path, config: Config, device: str) -> PoseDetector:
    """The pose network of a model folder, or of the configuration, with the parts to draw; the other networks are not loaded."""
    info = read_model_info(model)
    use_model = config.animate.pretrained == "model" and "pose" in info["pretrained"]
    source = info["pretrained"]["pose"]["source"] if use_model else config.pretrained.pose
    return load_pose_detector(source, device, **drawn_parts(info, config))


@contextmanager
def memory_advice(config: Config) -> Iterator[None]:
    """Context in which exhausted GPU memory is an error with the settings to change.

    Raises:
        UserError: out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        options = config.animate
        advice = [
            f"lower animate.decode_batch ({options.decode_batch})" if options.decode_batch > 1 else "",
            "set animate.precision to fp16" if options.precision == "fp32" else "",
            "lower animate.height and animate.width",
        ]
        raise UserError(
            f"animate: out of GPU memory; {', or '.join(filter(None, advice))}; see tcan memory --job animate"
        ) from None


def choose_device(config: Config) -> str:
    """Resolve `config.animate.device`; "auto" is the GPU if there is one, else the CPU.

    Raises:
        UserError: a GPU on a machine without one.
    """
    device = config.animate.device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"animate.device = {device}: no GPU available; use auto or cpu")
    return device


def driving_poses(poses: np.ndarray, height: int, config: Config, video: int = 0) -> np.ndarray:
    """Keypoints `[F, N, 3]` in an image of this height with the errors of `config.animate.pose_errors`.

    Args:
        video: number of the video in an evaluation, whose videos have independent errors.
    """
    errors = config.animate.pose_errors
    return corrupt_poses(poses, errors.kind, errors.share, errors.size, height, (errors.seed, video))


def create_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        UserError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot create this folder ({error.strerror}); choose another one"
        ) from None
