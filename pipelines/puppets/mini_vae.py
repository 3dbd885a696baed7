"""The mini preset's VAE: an `AutoencoderKL` of 1.3 million parameters, eight times smaller images, 16 channels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from pipelines.puppets.corpus import SIZE, Corpus, Rendered, render_held_out
from pipelines.puppets.fit import fit

LATENT_CHANNELS = 16
"""Four times Stable Diffusion 1.5's: at 128 px a cell of 8 x 8 pixels holds as much of a puppet as one of 32 x 32 would
at 512. 500 steps from nothing, 16 channels stood 0.8 dB above 8, on a somewhat shorter schedule."""
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
    """Residual branches that start at zero: without it the VAE learns brightness and never colour."""
    for child in module.modules():
        if type(child).__name__ == "ResnetBlock2D":
            nn.init.zeros_(child.conv2.weight)
            nn.init.zeros_(child.conv2.bias)


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 `[B, H, W, 3]` -> float `[B, 3, H, W]` in [-1, 1]."""
    return torch.tensor(frames).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def luma_and_chroma(rgb: Tensor) -> tuple[Tensor, Tensor]:
    luma = rgb.mean(1, keepdim=True)
    return luma, rgb - luma


def image_loss(
    output: Tensor, target: Tensor, weight: Tensor, gradient_weight: float, squared_weight: float
) -> Tensor:
    """L1 and MSE on brightness and on colour apart, and L1 on gradients; `weight` `[B, 1, H, W]` favours the puppet."""
    loss = output.new_zeros(())
    parts = zip(luma_and_chroma(output), luma_and_chroma(target), (1.0, 1.5), strict=True)
    for output_part, target_part, share in parts:
        difference = output_part - target_part
        loss = loss + share * (weight * (difference.abs() + squared_weight * difference.square())).mean()
    if gradient_weight:
        for dim in (2, 3):
            loss = loss + gradient_weight * (output.diff(dim=dim) - target.diff(dim=dim)).abs().mean()
    return loss


def train_vae(corpus: Corpus, work: Path) -> AutoencoderKL:
    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([1, step])
        whole = step % 3 == 0
        frames, _, masks = corpus.random_images(rng, 6 if whole else 24)
        if not whole:  # crops of a quarter of the image: four times the variety at the same cost
            top, left = rng.integers(0, SIZE // 2, 2)
            frames = frames[:, top : top + SIZE // 2, left : left + SIZE // 2]
            masks = masks[:, top : top + SIZE // 2, left : left + SIZE // 2]
        target = to_pixels(frames).contiguous(memory_format=torch.channels_last)
        weight = 1 + 2 * torch.from_numpy(masks).float()[:, None]
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
        # Little noise at first lets the latents find their axes; later the learnt variance is sampled.
        latents = posterior.mean + min(1.0, step / 400) * posterior.std * noise
        output = vae.decode(latents).sample
        kl = posterior.kl().mean() / latents[0].numel()
        # Sharper errors count for more once the image stands.
        squared_weight = 4.0 if step < 1400 else 20.0
        return image_loss(output, target, weight, min(0.5, step / 1400), squared_weight) + 1e-4 * kl

    vae = new_vae().to(memory_format=torch.channels_last)
    vae = fit("vae", vae, loss_at, steps=STEPS, lr=LEARNING_RATE, work=work, look=look_at_held_out())
    with torch.no_grad():
        frames, _, _ = corpus.random_images(np.random.default_rng(0), 256)
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in to_pixels(frames).split(32)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


def look_at_held_out() -> Callable[[int, AutoencoderKL], str]:
    held_out = {name: render_held_out(name, 12) for name in ("dance", "bizarre")}

    def look(step: int, average: AutoencoderKL) -> str:
        return ", ".join(
            "{} {:.2f} dB, {:.2f} dB inside the puppet".format(name, *vae_psnr(average, rendered))
            for name, rendered in held_out.items()
        )

    return look


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, rendered: Rendered) -> tuple[float, float]:
    """PSNR in dB of decode(encode(frames)): over all pixels, and over the puppet's."""
    frames, masks = rendered.frames.reshape(-1, SIZE, SIZE, 3), rendered.masks.reshape(-1, SIZE, SIZE)
    target = to_pixels(frames)
    output = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in target.split(16)])
    squared = (output.clamp(-1, 1) - target).square().mean(1)
    inside = squared[torch.from_numpy(masks)]
    whole, puppet = (float(10 * torch.log10(4 / part.mean())) for part in (squared, inside))
    return whole, puppet


@torch.no_grad()
def encode(vae: AutoencoderKL, frames: np.ndarray, cache: Path) -> Tensor:
    """Latents of frames `[..., H, W, 3]`, scaled, `[..., C, H/8, W/8]` fp16; computed once into `cache`."""
    if not cache.exists():
        flat = frames.reshape(-1, *frames.shape[-3:])
        latents = [
            vae.encode(to_pixels(flat[i : i + 32])).latent_dist.mean * vae.config.scaling_factor
            for i in range(0, len(flat), 32)
        ]
        encoded = torch.cat(latents).half()
        torch.save(encoded.view(*frames.shape[:-3], *encoded.shape[1:]), cache)
    return torch.load(cache, weights_only=True)
