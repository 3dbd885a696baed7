"""Estimated training memory compared with the measurements of torch's allocator and optimizer."""

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel

from tcan.memory import TrainingMemory, fake_tcan, training_memory
from tcan.model import TCAN, diffusion_loss

SIZE = 64


def build(pretrained: dict) -> dict:
    """Return new arguments of `TCAN` with the architecture of `pretrained`."""
    return {
        "unet": UNet2DConditionModel.from_config(pretrained["unet"].config),
        "controlnet": ControlNetModel.from_config(pretrained["controlnet"].config),
        "motion_adapter": MotionAdapter.from_config(pretrained["motion_adapter"].config),
        "empty_prompt": torch.zeros(1, 4, 64),
    }


def measured(tcan: TCAN, stage: int, batch: int, frames: int) -> tuple[int, int, int]:
    """Measure the bytes of a training step: peak activations (profiled allocations), gradients, and AdamW's state."""
    tcan.set_stage(stage)
    trained = [parameter for parameter in tcan.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    latents = torch.randn(batch, frames, 4, SIZE // 8, SIZE // 8)
    inputs = (
        torch.randn_like(latents),
        torch.zeros(batch, dtype=torch.int64),
        torch.rand(batch, frames, 3, SIZE, SIZE),
        latents[:, 0].clone(),
    )
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        diffusion_loss(tcan, DDIMScheduler(), latents, *inputs).backward()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    optimizer.step()
    state = sum(
        value.nbytes for values in optimizer.state.values() for value in values.values() if value.numel() > 1
    )
    return peak, sum(parameter.grad.nbytes for parameter in trained), state


@pytest.mark.parametrize("stage,batch,frames", [(1, 2, 1), (2, 1, 3)])
def test_estimate_matches_the_measured_training_step(
    pretrained: dict, stage: int, batch: int, frames: int
) -> None:
    real = TCAN(**build(pretrained))
    peak, gradients, state = measured(real, stage, batch, frames)
    estimate = training_memory(
        fake_tcan(lambda: build(pretrained), torch.float32), stage, batch, frames, SIZE, SIZE
    )
    assert abs(estimate.activations / peak - 1) < 0.05
    parts = estimate.per_device(zero_stage=0, devices=1)
    assert parts["weights"] == sum(t.nbytes for t in [*real.parameters(), *real.buffers()])
    assert parts["gradients"] == gradients
    # The estimate excludes scalars, such as AdamW's step counter.
    assert abs(parts["optimizer"] / state - 1) < 1e-3


def test_activations_scale_with_the_batch_and_shrink_with_checkpointing(pretrained: dict) -> None:
    tcan = TCAN(**build(pretrained))
    batch_1, batch_3 = (training_memory(tcan, 2, batch, 2, SIZE, SIZE).activations for batch in (1, 3))
    assert abs(batch_3 / (3 * batch_1) - 1) < 0.02
    tcan.enable_gradient_checkpointing()
    assert training_memory(tcan, 2, 3, 2, SIZE, SIZE).activations < 0.8 * batch_3


def test_zero_stages_partition_optimizer_then_gradients_then_weights() -> None:
    """10 bf16 weights (20 bytes), 4 of them trainable: 8 bytes of gradients, 12 bytes of optimizer state per trainable weight."""
    memory = TrainingMemory(weights=20, trained=8, trained_parameters=4, mixed=True, activations=100)
    assert [memory.per_device(zero, 2)["sum"] for zero in range(4)] == [
        20 + 8 + 48 + 100,
        20 + 8 + 24 + 100,
        20 + 4 + 24 + 100,
        10 + 4 + 24 + 100,
    ]
    full = TrainingMemory(weights=40, trained=16, trained_parameters=4, mixed=False, activations=0)
    assert full.per_device(0, 1)["optimizer"] == 32
    assert memory.per_device(0, 1, batches=3)["activations"] == 300
