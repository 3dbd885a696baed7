"""Check of training: 20 steps of both stages lower the loss on one batch, with the engine and the settings of `tcan train`."""

import atexit
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from pipelines.config import StageConfig
from pipelines.doctor.finding import Finding, grade
from pipelines.doctor.subject import Subject, seeded_noise
from pipelines.train.engine import create_engine, optimizer_step, read_settings
from tcan.model import TCAN, diffusion_loss
from tcan.schedule import noise_schedule

STEPS = 20
FRAMES = {1: 1, 2: 2}
"""Number of frames of the clip, by stage."""
TIMESTEP = 500
OK = 0.98
PARTS = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")


def stage1(subject: Subject) -> Finding:
    """Steps of stage 1 on the noised sample."""
    return _train(subject, 1, subject.config.train.stage1)


def stage2(subject: Subject) -> Finding:
    """Steps of stage 2 on a static clip of the noised sample."""
    return _train(subject, 2, subject.config.train.stage2)


def _train(subject: Subject, stage: int, settings: StageConfig) -> Finding:
    losses = _losses(subject, stage, settings)
    first, last = losses[0], losses[-1]
    return Finding(
        f"training, stage {stage}",
        grade(last <= OK * first, last < first),
        f"loss {first:.4f} before, {last:.4f} after {STEPS} steps on one batch ({subject.config.train.precision}, learning rate "
        f"{settings.lr:g})",
        f"at most {OK:g} times the loss before: a batch that is repeated is easy to learn",
        "if another check is not OK, fix it first; else check train.precision and the learning rate",
    )


def _losses(subject: Subject, stage: int, settings: StageConfig) -> list[float]:
    """Losses of the steps, each before its update."""
    config, device = subject.config.train, subject.device
    timestep = torch.tensor([TIMESTEP], device=device)
    latent = subject.latent()
    latents = latent.expand(FRAMES[stage], -1, -1, -1)[None]
    noise = seeded_noise(*latents.shape).to(device)
    pose = subject.pose_image().expand(FRAMES[stage], -1, -1, -1)[None]
    schedule = noise_schedule(subject.networks["scheduler"], config.prediction_type, config.zero_terminal_snr)
    torch.manual_seed(subject.config.seed)  # for the initial weights of APPA
    model = TCAN(
        subject.networks["unet"],
        subject.networks["controlnet"],
        subject.networks["motion_adapter"],
        subject.prompt().cpu(),
        config.lora_rank,
        config.lora_alpha,
    )
    model.set_stage(stage)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model = model.to(device, torch.bfloat16 if config.precision == "bf16" else torch.float32).train()
    settings = dataclasses.replace(settings, batch_size=1, micro_batch=1)
    config = dataclasses.replace(config, zero_stage=min(config.zero_stage, 2))
    with _distributed(device):
        engine = create_engine(model, config, settings, 1, read_settings(config.deepspeed))
    losses = []
    for _ in range(STEPS):
        loss = diffusion_loss(engine, schedule, latents, noise, timestep, pose, latent)
        engine.backward(loss)
        optimizer_step(engine, torch.zeros((), dtype=torch.bool, device=device))
        losses.append(loss.item())
    engine.destroy()
    return losses


@contextmanager
def _distributed(device: torch.device) -> Iterator[None]:
    """Context in which DeepSpeed finds a process group of this process alone, as a worker of `tcan train` has one.

    The group remains until the process ends, because DeepSpeed cannot be initialized twice.
    """
    variables = {"RANK": "0", "LOCAL_RANK": str(device.index or 0), "WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    os.environ["DS_ACCELERATOR"] = device.type
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
