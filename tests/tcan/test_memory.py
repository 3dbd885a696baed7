"""Estimated training memory compared with the measurements of torch's allocator and optimizer."""

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel

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
from tcan.model import TCAN, diffusion_loss
from tcan.pixels import from_vae_output, to_vae_input
from tcan.pose.network import BodyPoseNetwork
from tests.benchmarks.timing import peak_bytes
from tests.tiny import tiny_vae

SIZE = 64
MAX_SCRATCH = 0.4
"""Scratch of the CPU's convolutions that the estimates exclude, as a fraction of the estimate: at these sizes up to 0.35 with
oneDNN, and more with other implementations. Only the lower bound is therefore strict."""


def build(pretrained: dict) -> dict:
    """Return new arguments of `TCAN` with the architecture of `pretrained` and the widths of mini.

    The scratch of convolutions is too large a fraction at the smaller widths of `pretrained`.
    """
    widths = {"block_out_channels": (48, 96, 128, 128)}
    groups = {"norm_num_groups": 16}
    return {
        "unet": UNet2DConditionModel.from_config({**pretrained["unet"].config, **widths, **groups}),
        "controlnet": ControlNetModel.from_config({**pretrained["controlnet"].config, **widths, **groups}),
        "motion_adapter": MotionAdapter.from_config(
            {**pretrained["motion_adapter"].config, **widths, "motion_norm_num_groups": 16}
        ),
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


@torch.no_grad()
def test_inference_estimates_match_the_measured_peaks(pretrained: dict) -> None:
    """Measured by the profiler of torch's allocations, on the calls of the pipeline and of the preprocessing actor."""
    real, vae, network = TCAN(**build(pretrained)), tiny_vae().eval(), BodyPoseNetwork().eval()
    frames, side = 3, SIZE // 8
    estimate = animation_memory(
        fake_tcan(lambda: build(pretrained), torch.float32),
        fake_network(tiny_vae, torch.float32),
        frames,
        SIZE,
        SIZE,
        4,
    )
    assert estimate.weights["denoising"] == sum(t.nbytes for t in [*real.parameters(), *real.buffers()])

    def denoise() -> None:
        noisy, timestep = torch.randn(1, frames, 4, side, side), torch.zeros(1, dtype=torch.int64)
        features = real.appearance(noisy[:, 0], timestep)
        embedding = real.embed_pose(torch.rand(1, frames, 3, SIZE, SIZE))
        residuals = real.pose_residuals(noisy, timestep, embedding)
        real.denoise(noisy, timestep, residuals, features, [False, True], torch.ones(SIZE, SIZE))

    def decode() -> None:
        from_vae_output(vae.decode(torch.randn(4, 4, side, side)).sample)

    def encode() -> None:
        vae.encode(to_vae_input(torch.zeros(4, SIZE, SIZE, 3, dtype=torch.uint8), torch.float32))

    body = fake_network(BodyPoseNetwork, torch.float32)
    actor = encoding_memory(fake_network(tiny_vae, torch.float32), 4, SIZE, SIZE) | detection_memory(
        "pose", body, 4, SIZE, SIZE, 64
    )
    for name, estimated, run in (
        ("denoising", estimate.activations["denoising"], denoise),
        ("decoding", estimate.activations["decoding"], decode),
        ("VAE", actor.activations["VAE"], encode),
        ("pose", actor.activations["pose"], lambda: network(torch.zeros(4, 3, 64, 64))),
    ):
        ratio = peak_bytes(run) / estimated
        assert 0.95 <= ratio <= 1 + MAX_SCRATCH, f"{name}: {ratio:.3f} of the estimate"


def test_offloading_keeps_the_weights_of_one_phase_or_layer_on_the_device() -> None:
    memory = InferenceMemory(
        weights={"denoising": 50, "decoding": 10}, activations={"denoising": 20, "decoding": 70}
    )
    assert [memory.peak(offload) for offload in ("none", "model", "sequential")] == [130, 80, 70]


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
