"""TCAN as a training stage needs it, its loss on a batch, and the model folder it is saved to."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.staging import local_input
from pipelines.train.data import Batch
from pipelines.train.engine import ema_weights
from pipelines.train.task import Task, variant
from tcan.model import TCAN, diffusion_loss
from tcan.weights import PretrainedModels, load_model, portable_source, save_model


def build_model(task: Task, pretrained: PretrainedModels) -> TCAN:
    """The model of `task.from_model`, or a new one, in the stage's training mode and precision."""
    config = task.config.train
    torch.manual_seed(task.config.seed)  # for the initial weights of APPA
    if task.from_model:
        model = load_model(local_input(task.from_model), pretrained, config.temporal_controlnet)
    else:
        model = TCAN(
            pretrained.unet,
            pretrained.controlnet,
            pretrained.motion_adapter,
            pretrained.empty_prompt,
            config.lora_rank,
            config.lora_alpha,
            variant(config),
        )
    model.set_stage(task.stage)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    # Converts the buffers too; DeepSpeed converts only parameters.
    return model.to(torch.bfloat16 if config.precision == "bf16" else torch.float32).train()


def batch_loss(
    model: nn.Module,
    pretrained: PretrainedModels,
    batch: Batch,
    device: torch.device,
    snr_gamma: float | None = None,
) -> Tensor:
    """The diffusion loss of a batch, a scalar. model: a TCAN or the DeepSpeed engine around it."""
    inputs = batch.inputs(device)
    return diffusion_loss(
        model,
        pretrained.scheduler,
        inputs["latents"],
        inputs["noise"],
        inputs["timestep"],
        inputs["pose"],
        inputs["reference"],
        inputs["reference_mask"],
        snr_gamma,
    )


def save_trained_model(task: Task, engine: Any, pretrained: PretrainedModels, folder: Path) -> None:
    """Save the EMA weights (or the weights, without EMA) as a model folder. Called by all workers; rank 0 writes."""
    import deepspeed

    is_sharded = task.config.train.zero_stage == 3
    with (
        ema_weights(engine),
        deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=is_sharded),
    ):
        if dist.get_rank() == 0:
            pose = {"source": portable_source(task.config.pretrained.pose)}
            save_model(
                engine.module,
                folder,
                pretrained=pretrained.info | {"pose": pose},
                stage=task.stage,
                height=task.config.size,
                width=task.config.size,
                stick_width=task.config.train.stick_width,
                **task.model_info,
            )
