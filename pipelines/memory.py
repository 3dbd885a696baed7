"""`tcan memory`: estimate of the GPU memory that each training stage needs.

tcan memory --config sd15 --gpus 8
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel

from pipelines.config import Config, PretrainedConfig
from tcan.errors import UserError
from tcan.memory import TrainingMemory, fake_tcan, training_memory
from tcan.weights.original import SD15
from tcan.weights.pretrained import locate

BATCHES = (1, 2, 4, 8)
GIB = 2**30


def memory(config: Config, gpus: int, stage: str = "all") -> None:
    """Print the memory per GPU of weights, gradients, optimizer states and activations, by ZeRO stage, GPUs and batch size.

    The estimate runs full-size modules on fake tensors. It takes about a minute and needs neither a GPU nor weights.

    Raises:
        UserError: `gpus` is below 1, or a folder of a pretrained model lacks the expected part.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be at least 1; give the number of GPUs to train on")
    train = config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    for number, settings in ((1, train.stage1), (2, train.stage2)):
        if stage not in ("all", str(number)):
            continue
        estimates = {}
        for checkpointing in (False, True):
            tcan = fake_tcan(lambda: networks(config.pretrained, train.lora_rank), dtype)
            if checkpointing:
                tcan.enable_gradient_checkpointing()
            if train.clip_frames > tcan.max_frames:
                raise UserError(
                    f"train.clip_frames = {train.clip_frames}: the motion modules of {config.pretrained.motion_adapter} have "
                    f"{tcan.max_frames} positions; set at most {tcan.max_frames}"
                )
            estimates[checkpointing] = training_memory(
                tcan, number, 1, train.clip_frames, config.size, config.size
            )
        sample = "image" if number == 1 else f"clip of {train.clip_frames} frames"
        print(
            f"stage {number}: {sample} of {config.size} x {config.size}, {train.precision}, GiB", flush=True
        )
        print(
            "\n".join(_activations(estimates) + _sums(estimates, settings.micro_batch, gpus)) + "\n",
            flush=True,
        )
    print(
        "Not included: DeepSpeed's buffers, the gathered weights of the active layers at ZeRO 3, and the CUDA context."
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


def _config(part: str, pretrained: PretrainedConfig) -> dict[str, Any]:
    source = getattr(pretrained, part)
    local = source == "mini" or Path(source).expanduser().is_dir()
    folder = Path(locate(source, part)[0]) if local else SD15 / part
    return json.loads((folder / "config.json").read_text())
