"""SD1.5 size with random weights: counted operations, one step of each kind on a CPU, and all benchmarks on an NVIDIA GPU."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.preprocess.latents import EncodedFrames
from tcan.model import TCAN
from tcan.pose import OpenPose
from tcan.weights import PretrainedModels
from tests.benchmarks import animation, training
from tests.benchmarks.timing import Row, peak_bytes, seconds, tensor_bytes
from tests.benchmarks.training import Batch, Trainer

STEPS, FRAMES, WINDOWS = 25, 28, 2  # 28 frames are two windows of 16
CPU_SIZE = 192


def random_pretrained(device: str, dtype: torch.dtype, size: int = 512) -> PretrainedModels:
    """Randomly initialized models for images of `size` x `size`; the size changes only the default sample size."""
    with torch.device(device):
        networks: dict[str, Any] = {
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=4,
            ),
            "unet": UNet2DConditionModel(sample_size=size // 8, cross_attention_dim=768),
            "controlnet": ControlNetModel(cross_attention_dim=768),
            "motion_adapter": MotionAdapter(use_motion_mid_block=False),
        }
        networks = {name: network.to(dtype).requires_grad_(False) for name, network in networks.items()}
        prompt = torch.zeros(1, 77, 768, dtype=dtype)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )  # fmt: skip
    return PretrainedModels(**networks, empty_prompt=prompt, scheduler=scheduler, info={})


def openpose() -> nn.Module:
    """OpenPose's body network from controlnet_aux, with random weights."""
    from controlnet_aux.open_pose.model import bodypose_model

    return bodypose_model()


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@torch.no_grad()
def operation_ratio() -> list[Row]:
    """Operations of the baseline relative to this implementation for one clip, counted on the meta device:
    multiplications and additions of matrix products, convolutions and attention."""
    pretrained = random_pretrained("meta", torch.bfloat16)
    with torch.device("meta"):
        tcan = TCAN(
            pretrained.unet, pretrained.controlnet, pretrained.motion_adapter, pretrained.empty_prompt
        ).bfloat16()
        noisy, pose = torch.empty(1, 16, 4, 64, 64), torch.empty(1, 16, 3, 512, 512)
        timestep, reference = torch.empty(1, dtype=torch.int64), torch.empty(1, 4, 64, 64)
    features, residuals = tcan.appearance(reference, timestep), tcan.pose_residuals(noisy, timestep, pose)
    appearance = flops(lambda: tcan.appearance(reference, timestep))
    pose_encoder = flops(lambda: tcan.embed_pose(pose))
    controlnet = flops(lambda: tcan.pose_residuals(noisy, timestep, pose))
    without = flops(lambda: tcan.denoise(noisy, timestep, residuals, None))
    with_reference = flops(lambda: tcan.denoise(noisy, timestep, residuals, features))
    both = flops(lambda: tcan.denoise(noisy, timestep, residuals, features, [False, True]))
    baseline = STEPS * WINDOWS * (2 * controlnet + appearance + without + with_reference)
    ours = STEPS * (WINDOWS * (controlnet - pose_encoder + both) + appearance) + pose_encoder * FRAMES / 16
    return [
        Row(
            f"SD1.5 size, {FRAMES} frames of 512 x 512 in {STEPS} steps: operations of the baseline relative to ours",
            f"{baseline / ours:.2f}",
            f"counted, not timed; {ours / 1e12 / FRAMES:.0f} against {baseline / 1e12 / FRAMES:.0f} TFLOP per frame",
        )
    ]


def cpu_benchmarks() -> list[Row]:
    """One step of each kind at SD1.5 size on a CPU, on small images, one round."""
    pretrained = random_pretrained("cpu", torch.bfloat16, CPU_SIZE)
    rows = [*animation.temperature(pretrained, rounds=1), *animation.denoising(pretrained, rounds=1)]
    for stage, frames in ((1, 1), (2, 16)):
        rows += training.sequential(pretrained, stage, 1, frames)
    where = f"SD1.5 size on a CPU, {CPU_SIZE} x {CPU_SIZE}: "
    return [dataclasses.replace(row, what=where + row.what) for row in rows]


def gpu_benchmarks(
    pretrained: PretrainedModels,
    pose_network: nn.Module,
    steps: int = STEPS,
    sizes: tuple[tuple[int, int], ...] = ((2, 1), (1, 16)),
) -> list[Row]:
    """Step time, frames/s and peak memory of all jobs on the device of the pretrained models.

    Args:
        sizes: clips and frames of a training step, for stage 1 and stage 2.
    """
    device, size = pretrained.unet.device, 8 * pretrained.unet.config.sample_size
    peak_flops = peak_matmul_flops(device, pretrained.unet.dtype)
    rows = [Row("peak matmul", f"{peak_flops / 1e12:.0f} TFLOP/s", "measured; reference of MFU")]
    for stage, (batch, frames) in enumerate(sizes, 1):
        for checkpointing in (False, True):
            trainer, data = (
                Trainer(pretrained, stage, checkpointing=checkpointing),
                Batch(pretrained, batch, frames),
            )
            rows.append(_training(trainer, data, peak_flops, f"stage {stage}, {batch} x {frames} frames" + ", gradient checkpointing" * checkpointing))  # fmt: skip
    rows += _animation(pretrained, size, steps, peak_flops)

    images = np.random.default_rng(0).integers(0, 256, (16, size, size, 3), np.uint8)
    detector = OpenPose(pose_network, device=device)
    latents = torch.randn(16, pretrained.vae.config.latent_channels, size // 8, size // 8)
    pipe = animation.pipeline(pretrained, animation.trained_like(pretrained))
    for what, run in (
        ("OpenPose", lambda: detector.detect(images)),
        ("VAE encoding", lambda: EncodedFrames(pretrained.vae, images, 8).numpy()),
        ("VAE decoding", lambda: list(pipe.decode(latents))),
    ):
        with torch.no_grad():
            run()
            rows.append(
                Row(what, f"{len(images) / seconds(run, device.type):.1f} frames/s", "random weights")
            )
    return rows


def peak_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of the product of two square matrices."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device.type) for _ in range(10))


def _training(trainer: Trainer, data: Batch, peak_flops: float, what: str) -> Row:
    def step() -> None:
        trainer.step(*data.latents())

    operations = flops(step)  # also creates the optimizer states
    time = min(seconds(step, trainer.device) for _ in range(3))
    total = tensor_bytes(trainer.tcan, trainer.optimizer) + peak_bytes(step, trainer.device)
    note = f"MFU {operations / time / peak_flops:.0%}; AdamW states in the precision of the weights"
    return Row(what, f"{time:.2f} s per step, {total / 2**30:.1f} GiB", note)


@torch.no_grad()
def _animation(pretrained: PretrainedModels, size: int, steps: int, peak_flops: float) -> list[Row]:
    pipe = animation.pipeline(pretrained, animation.trained_like(pretrained))
    image, poses = animation.image(size), animation.walk(FRAMES, size)

    def animate(steps: int) -> None:
        list(pipe.decode(pipe.denoise(image, poses, steps=steps)))

    operations = flops(lambda: animate(1)) * steps  # overcounts the few operations outside the steps
    time = seconds(lambda: animate(steps), pipe.device.type)
    peak = tensor_bytes(pipe.tcan, pipe.vae) + peak_bytes(lambda: animate(1), pipe.device.type)
    return [
        Row(
            f"animation, {steps} steps, guidance, {size} x {size}",
            f"{time / FRAMES:.2f} s per frame, {peak / 2**30:.1f} GiB",
            f"MFU {operations / time / peak_flops:.0%}",
        )
    ]
