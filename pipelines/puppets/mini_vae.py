"""Training of the mini preset's VAE: an `AutoencoderKL` with 1.3 M parameters, downsampling factor 8, 16 channels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from pipelines.puppets.corpus import SIZE, Rendered, render_held_out
from pipelines.puppets.fit import RECIPE, Batch, Setting, fit
from tcan.atomic_write import atomic_write
from tcan.pixels import to_vae_input

DOWNSAMPLING = 8
LATENT_CHANNELS = 16
"""Four times the channels of SD1.5: at 128 px, 8 x 8 pixels show as much of a puppet as 32 x 32 pixels at 512 px.

After 500 steps from scratch on a slightly shorter schedule, 16 channels were 0.8 dB better than 8."""
HELD_OUT_CHARACTERS = 12
STEPS = 3800
LEARNING_RATE = 3e-3


def new_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIZE,
    )
    zero_last_convolutions(vae)
    return vae


def zero_last_convolutions(module: nn.Module) -> None:
    """Initialize residual branches to zero. Without it, the VAE learns brightness but not colour."""
    for child in module.modules():
        if type(child).__name__ == "ResnetBlock2D":
            nn.init.zeros_(child.conv2.weight)
            nn.init.zeros_(child.conv2.bias)


def luma_and_chroma(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Split `[B, 3, H, W]` into brightness `[B, 1, H, W]` and colour `[B, 3, H, W]`."""
    luma = rgb.mean(1, keepdim=True)
    return luma, rgb - luma


def image_loss(
    output: Tensor, target: Tensor, weight: Tensor, gradient_weight: float, squared_weight: float
) -> Tensor:
    """Loss of L1 and MSE on brightness and colour separately, and L1 on gradients.

    Args:
        output, target: `[B, 3, H, W]` in [-1, 1].
        weight: pixel weights `[B, 1, H, W]`, higher on the puppet.
        gradient_weight, squared_weight: weights of the gradient term and of the MSE terms.
    """
    loss = output.new_zeros(())
    parts = zip(luma_and_chroma(output), luma_and_chroma(target), (1.0, 1.5), strict=True)
    for output_part, target_part, part_weight in parts:
        difference = output_part - target_part
        loss = (
            loss + part_weight * (weight * (difference.abs() + squared_weight * difference.square())).mean()
        )
    if gradient_weight:
        for dim in (2, 3):
            loss = loss + gradient_weight * (output.diff(dim=dim) - target.diff(dim=dim)).abs().mean()
    return loss


def train_vae(images: Rendered, work: Path, setting: Setting = RECIPE) -> AutoencoderKL:
    def batch_at(step: int) -> Batch:
        rng = np.random.default_rng([1, step])
        full_frame = step % 3 == 0
        frames, _, masks = images.sample(rng, setting.batch * (6 if full_frame else 24))
        if not full_frame:  # crops of 25 % of the area: four times as many images at the same cost
            top, left = rng.integers(0, SIZE // 2, 2)
            frames = frames[:, top : top + SIZE // 2, left : left + SIZE // 2]
            masks = masks[:, top : top + SIZE // 2, left : left + SIZE // 2]
        cells = [side // DOWNSAMPLING for side in frames.shape[1:3]]
        generator = torch.Generator().manual_seed(step)
        return {
            "frames": torch.tensor(frames),
            "masks": torch.tensor(masks),
            "noise": torch.randn(len(frames), LATENT_CHANNELS, *cells, generator=generator),
        }

    def loss_of(step: int, batch: Batch) -> Tensor:
        target = to_vae_input(batch["frames"], torch.float32).contiguous(memory_format=torch.channels_last)
        weight = 1 + 2 * batch["masks"].float()[:, None]
        posterior = vae.encode(target).latent_dist
        # The weights of the loss take the same course in a longer or shorter training.
        recipe_step = step * STEPS / batch["steps"]
        # Start with little noise, so that the latents become informative; later sample with the learned variance.
        latents = posterior.mean + min(1.0, recipe_step / 400) * posterior.std * batch["noise"]
        output = vae.decode(latents).sample
        kl = posterior.kl().mean() / latents[0].numel()
        # Weight squared errors more once the coarse image is learned.
        squared_weight = 4.0 if recipe_step < 1400 else 20.0
        return image_loss(output, target, weight, min(0.5, recipe_step / 1400), squared_weight) + 1e-4 * kl

    vae = new_vae().to(memory_format=torch.channels_last)
    vae = fit(
        "vae",
        vae,
        batch_at,
        loss_of,
        steps=STEPS,
        lr=LEARNING_RATE,
        work=work,
        setting=setting,
        evaluate=held_out_evaluation(),
    )
    with torch.no_grad():
        frames, _, _ = images.sample(np.random.default_rng(0), min(256, len(images.frames)))
        latents = torch.cat(
            [
                vae.encode(part).latent_dist.mean
                for part in to_vae_input(torch.tensor(frames, device=vae.device), torch.float32).split(32)
            ]
        )
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


def held_out_evaluation() -> Callable[[int, AutoencoderKL], str]:
    """Return the `evaluate` argument of `fit`: PSNR on held-out characters."""
    held_out = {name: render_held_out(name, HELD_OUT_CHARACTERS) for name in ("dance", "bizarre")}

    def evaluate(step: int, average: AutoencoderKL) -> str:
        return ", ".join(
            "{} {:.2f} dB, {:.2f} dB inside the puppet".format(name, *vae_psnr(average, rendered))
            for name, rendered in held_out.items()
        )

    return evaluate


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, rendered: Rendered) -> tuple[float, float]:
    """PSNR of decode(encode(frames)) in dB, over all pixels and over the pixels of the puppet."""
    frames, masks = rendered.frames.reshape(-1, SIZE, SIZE, 3), rendered.masks.reshape(-1, SIZE, SIZE)
    target = to_vae_input(torch.tensor(frames, device=vae.device), torch.float32)
    output = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in target.split(16)])
    squared = (output.clamp(-1, 1) - target).square().mean(1)
    inside = squared[torch.tensor(masks, device=vae.device)]
    full_frame, puppet = (float(10 * torch.log10(4 / part.mean())) for part in (squared, inside))
    return full_frame, puppet


@torch.no_grad()
def encode(vae: AutoencoderKL, frames: np.ndarray, cache: Path) -> Tensor:
    """Encode frames uint8 `[..., H, W, 3]` to scaled latents fp16 `[..., C, H/8, W/8]`, cached in the file `cache`."""
    if not cache.exists():
        flat = frames.reshape(-1, *frames.shape[-3:])
        latents = [
            vae.encode(
                to_vae_input(torch.tensor(flat[i : i + 32], device=vae.device), torch.float32)
            ).latent_dist.mean.cpu()
            * vae.config.scaling_factor
            for i in range(0, len(flat), 32)
        ]
        encoded = torch.cat(latents).half()
        with atomic_write(cache) as partial:
            torch.save(encoded.view(*frames.shape[:-3], *encoded.shape[1:]), partial)
    return torch.load(cache, weights_only=True)
