"""What a stage of training will take of each GPU's memory, before any is bought.

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
    """Prints weights, gradients, optimizer and activations of a GPU, by ZeRO stage, GPUs and batch.

    Counted on modules of the real size that hold nothing: it takes a minute, and neither a GPU nor weights.

    Raises:
        UserError: fewer than one GPU; a folder of the pretrained without the part that it should hold.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be at least 1")
    train = config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    for number, settings in ((1, train.stage1), (2, train.stage2)):
        if stage not in ("all", str(number)):
            continue
        found = {}
        for checkpointing in (False, True):
            tcan = fake_tcan(lambda: networks(config.pretrained, train.lora_rank), dtype)
            if checkpointing:
                tcan.enable_gradient_checkpointing()
            found[checkpointing] = training_memory(tcan, number, 1, train.frames, config.size, config.size)
        sample = "image" if number == 1 else f"clip of {train.frames} frames"
        print(
            f"stage {number}: {sample} of {config.size} x {config.size}, {train.precision}, GiB", flush=True
        )
        print("\n".join(_activations(found) + _sums(found, settings.micro_batch, gpus)) + "\n", flush=True)
    print(
        "On top come DeepSpeed's buffers, at ZeRO 3 the weights of the layers at work, and the GPU's own context."
    )


def _activations(found: dict[bool, TrainingMemory]) -> list[str]:
    lines = ["  activations by batch of a GPU        " + "".join(f"{batch:>8}" for batch in BATCHES)]
    for checkpointing, name in ((False, "all kept"), (True, "train.gradient_checkpointing true")):
        values = (found[checkpointing].activations * batch / GIB for batch in BATCHES)
        lines.append(f"    {name:<35}" + "".join(f"{value:>8.2f}" for value in values))
    return lines


def _sums(found: dict[bool, TrainingMemory], batch: int, gpus: int) -> list[str]:
    lines = [
        f"  a GPU at batch {batch}",
        "    GPUs  ZeRO   weights  gradients  optimizer  activations       sum  with checkpointing",
    ]
    for count in sorted({1, gpus}):
        for zero in range(4):
            parts, saving = (
                found[checkpointing].per_device(zero, count, batch) for checkpointing in (False, True)
            )
            weights, gradients, optimizer, activations, total = (value / GIB for value in parts.values())
            lines.append(
                f"    {count:>4}  {zero:>4}{weights:>10.2f}{gradients:>11.2f}{optimizer:>11.2f}{activations:>13.2f}"
                f"{total:>10.2f}{saving['sum'] / GIB:>20.2f}"
            )
    return lines


def networks(pretrained: PretrainedConfig, lora_rank: int) -> dict[str, Any]:
    """What TCAN is built on, with the configurations of the pretrained where these are local folders, else with SD1.5's."""
    made = {
        part: network.from_config({**_config(part, pretrained), **more})
        for part, network, more in (
            ("unet", UNet2DConditionModel, {}),
            ("controlnet", ControlNetModel, {}),
            ("motion_adapter", MotionAdapter, {"use_motion_mid_block": False}),
        )
    }
    prompt = _config("text_encoder", pretrained)
    tokens, width = prompt["max_position_embeddings"], prompt["hidden_size"]
    return {**made, "empty_prompt": torch.zeros(1, tokens, width), "lora_rank": lora_rank}


def _config(part: str, pretrained: PretrainedConfig) -> dict[str, Any]:
    source = getattr(pretrained, part)
    local = source == "mini" or Path(source).expanduser().is_dir()
    folder = Path(locate(source, part)[0]) if local else SD15 / part
    return json.loads((folder / "config.json").read_text())
