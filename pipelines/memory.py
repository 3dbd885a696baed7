"""`tcan memory`: estimate of the GPU memory that each job needs, and what fits into which GPU.

tcan memory --config sd15 --gpus 8
tcan memory --config sd15 --job animate
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, MotionAdapter, UNet2DConditionModel
from torch import nn

from pipelines.config import Config, PretrainedConfig
from tcan.crop import Size
from tcan.errors import UserError
from tcan.memory import (
    InferenceMemory,
    TrainingMemory,
    animation_memory,
    detection_memory,
    encoding_memory,
    fake_network,
    fake_tcan,
    training_memory,
)
from tcan.pose.hands import CROPS_PER_BATCH, FACE_SIDE, HAND_SIDES
from tcan.pose.onnx import OnnxPose
from tcan.pose.openpose_loading import open_pose_module
from tcan.weights.original import SD15
from tcan.weights.pretrained import locate

BATCHES = (1, 2, 4, 8)
GIB = 2**30
CARDS = (6, 8, 12, 16, 24, 40, 80)  # GiB
DETECTED_FRAMES = 16  # default batch of `tcan.pose.find_people`
RESERVED, MARGIN = 0.75, 1.05
"""GiB of the CUDA context with the libraries' workspaces, and factor of the allocator's fragmentation."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def memory(config: Config, gpus: int, stage: str = "all", job: str = "train") -> None:
    """Print the memory per GPU of a job, and the options with which it fits into GPUs of common sizes.

    The estimate runs full-size modules on fake tensors. It takes about a minute and needs neither a GPU nor weights.

    Raises:
        UserError: `gpus` is below 1, or a folder of a pretrained model lacks the expected part.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be at least 1; give the number of GPUs to train on")
    if job == "animate":
        _print_animation(config)
    elif job == "preprocess":
        _print_preprocess(config)
    else:
        for number in (1, 2):
            if stage in ("all", str(number)):
                _print_training(config, number, gpus)
    print(
        f"What fits: the sum x {MARGIN} (fragmentation) + {RESERVED} GiB (CUDA context, workspaces). Not included: "
        "DeepSpeed's buffers, and the gathered weights of the active layers at ZeRO 3."
    )


def fits(size: float, gibibytes: float) -> bool:
    """Whether `size` bytes fit into a GPU of `gibibytes`."""
    return size * MARGIN / GIB + RESERVED <= gibibytes


# --- training --------------------------------------------------------------------------------------------------------


def training_estimate(config: Config, stage: int, size: Size, checkpointing: bool) -> TrainingMemory:
    """The memory of a stage with one image or clip of this size per micro-batch, with the precision of the configuration."""
    train = config.train
    tcan = fake_tcan(lambda: networks(config.pretrained, train.lora_rank), DTYPES[train.precision])
    if checkpointing:
        tcan.enable_gradient_checkpointing()
    if train.clip_frames > tcan.max_frames:
        raise UserError(
            f"train.clip_frames = {train.clip_frames}: the motion modules of {config.pretrained.motion_adapter} have "
            f"{tcan.max_frames} positions; set at most {tcan.max_frames}"
        )
    return training_memory(tcan, stage, 1, train.clip_frames, *size)


def _largest(sizes: list[Size]) -> Size:
    return max(sizes, key=lambda size: size[0] * size[1])


def _print_training(config: Config, stage: int, gpus: int) -> None:
    train = config.train
    settings = train.stage1 if stage == 1 else train.stage2
    sizes = [(config.size, config.size)] if config.preprocess.buckets is None else config.buckets
    height, width = _largest(sizes)
    estimates = {
        checkpointing: training_estimate(config, stage, (height, width), checkpointing)
        for checkpointing in (False, True)
    }
    sample = "image" if stage == 1 else f"clip of {train.clip_frames} frames"
    lines = [
        f"stage {stage}: {sample} of {width} x {height}, {train.precision}, GiB",
        *_activations(estimates),
        *_sums(estimates, 1 if settings.micro_batch == "auto" else settings.micro_batch, gpus),
        "  fits into one GPU, with the fastest options first",
    ]
    for card in CARDS:
        lines.append(
            f"    {card:>2} GiB  {next(training_options(estimates, settings.batch_size, card), '-')}"
        )
    print("\n".join(lines) + "\n", flush=True)


def training_options(estimates: dict[bool, TrainingMemory], batch_size: int, card: float) -> Iterator[str]:
    """Options with which a stage fits into one GPU, the fastest first."""
    divisors = [n for n in range(batch_size, 0, -1) if batch_size % n == 0]
    for offload in (False, True):
        for checkpointing in (False, True):
            for batch in divisors:
                parts = estimates[checkpointing].per_device(2, 1, batch)
                if fits(parts["sum"] - offload * parts["optimizer"], card):
                    yield (
                        f"micro_batch {batch}"
                        + ", gradient_checkpointing" * checkpointing
                        + ", optimizer on the CPU (train.deepspeed)" * offload
                    )


def _activations(estimates: dict[bool, TrainingMemory]) -> list[str]:
    lines = ["  activations by batch size per GPU    " + "".join(f"{batch:>8}" for batch in BATCHES)]
    for checkpointing, name in (
        (False, "no gradient checkpointing"),
        (True, "train.gradient_checkpointing true"),
    ):
        values = (estimates[checkpointing].activations * batch / GIB for batch in BATCHES)
        lines.append(f"    {name:<35}" + "".join(f"{value:>8.2f}" for value in values))
    return lines


def _sums(estimates: dict[bool, TrainingMemory], batch: int, gpus: int) -> list[str]:
    lines = [
        f"  per GPU at batch size {batch}",
        "    GPUs  ZeRO   weights  gradients  optimizer  activations       sum  with checkpointing",
    ]
    for count in sorted({1, gpus}):
        for zero in range(4):
            parts, checkpointed = (
                estimates[checkpointing].per_device(zero, count, batch) for checkpointing in (False, True)
            )
            weights, gradients, optimizer, activations, total = (value / GIB for value in parts.values())
            lines.append(
                f"    {count:>4}  {zero:>4}{weights:>10.2f}{gradients:>11.2f}{optimizer:>11.2f}{activations:>13.2f}"
                f"{total:>10.2f}{checkpointed['sum'] / GIB:>20.2f}"
            )
    return lines


# --- animation and preprocessing -------------------------------------------------------------------------------------


def _print_animation(config: Config) -> None:
    animate, train = config.animate, config.train
    height, width = animate.height or config.size, animate.width or config.size
    dtype = DTYPES[animate.precision]
    tcan = fake_tcan(lambda: networks(config.pretrained, train.lora_rank), dtype)
    vae = fake_network(lambda: _vae(config.pretrained), dtype)
    guidance = animate.guidance_scale != 1
    batches = sorted({1, animate.decode_batch}, reverse=True)
    estimates = {
        batch: animation_memory(tcan, vae, animate.window, height, width, batch, guidance)
        for batch in batches
    }
    draw = config.draw
    detector = _detector_memory(config.pretrained.pose, DETECTED_FRAMES, height, width, draw.hands, draw.face)
    print(f"animate: window of {animate.window} frames of {width} x {height}, {animate.precision}, GiB")
    print("\n".join(_phases(estimates[batches[0]] | detector)))
    # Offloading leaves the pose detector on the CPU.
    options = {
        f"decode_batch {batch}, offload {offload}": (
            estimates[batch] | detector if offload == "none" else estimates[batch]
        ).peak(offload)
        for offload in ("none", "model", "sequential")
        for batch in batches
    }
    print("\n".join(_fitting(options)) + "\n", flush=True)


def _print_preprocess(config: Config) -> None:
    vae = fake_network(lambda: _vae(config.pretrained), torch.float32)
    height, width = _largest(config.buckets)
    source, parts = config.pretrained.pose, (config.preprocess.hands, config.preprocess.face)
    estimates = {
        batch: encoding_memory(vae, batch, height, width)
        | _detector_memory(source, batch, height, width, *parts)
        for batch in (64, 32, 16, 8, 4, 2, 1)
    }
    batch = config.preprocess.batch_frames
    print(f"preprocess: frames of {width} x {height}, fp32, GiB")
    print("\n".join(_phases(estimates.get(batch) or estimates[16])))
    options = {f"batch_frames {batch}": estimate.peak() for batch, estimate in estimates.items()}
    print("\n".join(_fitting(options)) + "\n", flush=True)


def _phases(estimate: InferenceMemory) -> list[str]:
    lines = ["  phase        weights    activations"]
    for phase, weights in estimate.weights.items():
        peak = estimate.activations.get(phase)
        text = "not estimated" if peak is None else f"{peak / GIB:.2f}"
        lines.append(f"  {phase:<10}{weights / GIB:>10.2f}{text:>15}")
    return lines


def _fitting(options: dict[str, int]) -> list[str]:
    """options: bytes by option, the fastest option first."""
    lines = ["  fits into one GPU, with the fastest options first"]
    for card in CARDS:
        fitting = (f"{name} ({size / GIB:.1f})" for name, size in options.items() if fits(size, card))
        lines.append(f"    {card:>2} GiB  {next(fitting, '-')}")
    return lines


# --- networks --------------------------------------------------------------------------------------------------------


def networks(pretrained: PretrainedConfig, lora_rank: int) -> dict[str, Any]:
    """Arguments of `TCAN`: networks built from the configurations of local model folders, else SD1.5's."""
    modules = {
        part: network.from_config({**_config(part, pretrained), **options})
        for part, network, options in (
            ("unet", UNet2DConditionModel, {}),
            ("controlnet", ControlNetModel, {}),
            ("motion_adapter", MotionAdapter, {"use_motion_mid_block": False}),
        )
    }
    prompt = _config("text_encoder", pretrained)
    tokens, width = prompt["max_position_embeddings"], prompt["hidden_size"]
    return {**modules, "empty_prompt": torch.zeros(1, tokens, width), "lora_rank": lora_rank}


def _vae(pretrained: PretrainedConfig) -> AutoencoderKL:
    return AutoencoderKL.from_config(_config("vae", pretrained))


def _detector_memory(
    source: str, batch: int, height: int, width: int, hands: bool, face: bool
) -> InferenceMemory:
    """Memory of the networks of `load_pose_detector` for frames of this size. ONNX files: their size, without activations."""
    folder = Path(source).expanduser()
    folder = folder / "pose" if (folder / "pose").is_dir() else folder
    if source != "mini" and OnnxPose.is_in(folder):
        return InferenceMemory({"ONNX": sum(file.stat().st_size for file in folder.glob("*.onnx"))}, {})
    network, input_height = _pose_network(source)
    memory = detection_memory("pose", network, batch, height, width, input_height)
    for on, name, module, network_class, side in (
        (hands, "hands", "model", "handpose_model", max(HAND_SIDES)),
        (face, "face", "face", "FaceNet", FACE_SIDE),
    ):
        if on:
            part = fake_network(getattr(open_pose_module(module), network_class), torch.float32)
            memory |= detection_memory(name, part, CROPS_PER_BATCH, side, side, side)
    return memory


def _pose_network(source: str) -> tuple[nn.Module, float]:
    """The pose network on fake tensors and its input height: of a local `BodyPoseNetwork` folder, else OpenPose's."""
    folder = Path(locate(source, "pose")[0]) if source == "mini" else Path(source).expanduser()
    if (folder / "config.json").is_file():
        from tcan.pose.network import BodyPoseNetwork

        config = json.loads((folder / "config.json").read_text())
        return fake_network(lambda: BodyPoseNetwork.from_config(config), torch.float32), config[
            "input_height"
        ]
    return fake_network(open_pose_module("model").bodypose_model, torch.float32), 184.0


def _config(part: str, pretrained: PretrainedConfig) -> dict[str, Any]:
    source = getattr(pretrained, part)
    local = source == "mini" or Path(source).expanduser().is_dir()
    folder = Path(locate(source, part)[0]) if local else SD15 / part
    return json.loads((folder / "config.json").read_text())
