"""Cost of the temporal ControlNet: operations at SD1.5 size, counted on fake tensors, and the time of mini on this machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config import PretrainedConfig
from pipelines.memory import networks
from tcan.memory import fake_tcan
from tcan.model import TCAN
from tcan.variant import Variant

FRAMES = 16
SD15_SIZE, MINI_SIZE = 512, 128
ROUNDS = 5
LORA_RANK = 16
TERA = 1e12


def cost() -> dict[str, float]:
    """Cost of one guided denoising step of a window of 16 frames, with and without temporal layers in the ControlNet.

    Operations are the multiplications and additions of matrix products, convolutions and attention, of SD1.5's networks at
    512 x 512. Times are medians of the CPU time of 5 rounds of mini's networks at 128 x 128.

    Returns:
        For "on" and "off": controlnet_tflop_{on,off} and step_tflop_{on,off} in 10^12 operations,
        controlnet_parameters_{on,off}, mini_controlnet_seconds_{on,off}.
    """
    values = {}
    for name, temporal in (("on", True), ("off", False)):
        tcan = fake_model("sd15", temporal)
        controlnet, step = operations(tcan, SD15_SIZE)
        values[f"controlnet_tflop_{name}"] = controlnet / TERA
        values[f"step_tflop_{name}"] = step / TERA
        values[f"controlnet_parameters_{name}"] = float(
            sum(parameter.numel() for parameter in tcan.controlnet.parameters())
        )
    seconds = _seconds()
    return values | {f"mini_controlnet_seconds_{name}": value for name, value in seconds.items()}


def operations(tcan: TCAN, size: int) -> tuple[int, int]:
    """Operations of the ControlNet and of a complete guided step, of a `fake_model`."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        noisy, timestep, _ = _inputs(tcan, size)
        features = tcan.appearance(noisy[:, 0], timestep)
        residuals = tcan.pose_residuals(*_inputs(tcan, size))
        appearance = _count(lambda: tcan.appearance(noisy[:, 0], timestep))
        denoiser = _count(lambda: tcan.denoise(noisy, timestep, residuals, features, [False, True]))
    controlnet = controlnet_operations(tcan, size)
    return controlnet, controlnet + appearance + denoiser


def controlnet_operations(tcan: TCAN, size: int) -> int:
    """Operations of the ControlNet of a `fake_model` for a window, images of `size` x `size` pixels."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = _inputs(tcan, size)
        return _count(lambda: tcan.pose_residuals(*inputs))


def fake_model(source: str, temporal: bool) -> TCAN:
    """A model on fake tensors, of the architecture mini or sd15, with or without temporal layers in the ControlNet."""
    variant = Variant(temporal_controlnet=temporal)
    return fake_tcan(lambda: {**networks(_sources(source), LORA_RANK), "variant": variant}, torch.float32)


def _seconds() -> dict[str, float]:
    """Median CPU time of mini's ControlNet for a window; the rounds of both variants alternate."""
    models = {
        name: TCAN(**networks(_sources("mini"), LORA_RANK), variant=Variant(temporal_controlnet=temporal))
        for name, temporal in (("on", True), ("off", False))
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            for name, tcan in models.items():
                noisy, timestep, pose = _inputs(tcan, MINI_SIZE)
                began = time.process_time()
                tcan.pose_residuals(noisy, timestep, pose)
                times[name].append(time.process_time() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first is a warm-up


def _inputs(tcan: TCAN, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    channels, latent = tcan.denoiser.config.in_channels, size // 8
    noisy, pose = torch.zeros(1, FRAMES, channels, latent, latent), torch.zeros(1, FRAMES, 3, size, size)
    return noisy, torch.zeros(1, dtype=torch.int64), pose


def _count(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _sources(source: str) -> PretrainedConfig:
    """mini's networks, or SD1.5's architecture without weights."""
    return PretrainedConfig(*(source for _ in range(7)))
