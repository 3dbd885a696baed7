"""The baseline: the common way to implement such a model, without this project's savings of time and memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from tcan.appearance import install_appearance
from tcan.memory_efficient import Convolution, GatedLinear, NormSiLU, SiLULinear
from tcan.model import TCAN
from tcan.pipeline import TCANPipeline
from tcan.temperature import temperature_map
from tcan.temporal import temporal_layers


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, tau: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) / tau) V for `[B, heads, N, d]` and tau `[B]`, with the full attention matrix in memory."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if tau is not None:
        logits = logits / tau[:, None, None, None].to(logits.dtype)
    return logits.softmax(-1) @ v


class ExplicitTemporalAttention:
    """`tcan.attention.TemperatureAttention` with an explicit softmax."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        q, k, v = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        return attn.to_out[0](explicit_attention(q, k, v, temperature).transpose(1, 2).flatten(2))


def with_explicit_softmax(tcan: TCAN) -> TCAN:
    """A copy with shared weights whose temporal attention computes an explicit softmax."""
    tcan = copy.deepcopy(tcan, {id(weight): weight for weight in tcan.parameters()})
    for network in (tcan.denoiser, tcan.controlnet):
        for layer in temporal_layers(network).values():
            for block in layer.transformer_blocks:
                block.attn1.set_processor(ExplicitTemporalAttention())
                block.attn2.set_processor(ExplicitTemporalAttention())
    return tcan


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Replace fused attention by explicit attention everywhere, also in the networks of diffusers."""
    fused = F.scaled_dot_product_attention

    def explicit(q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, **defaults: object) -> Tensor:
        assert attn_mask is None
        return explicit_attention(q, k, v)

    F.scaled_dot_product_attention = explicit
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


@torch.no_grad()
def denoise(
    pipe: TCANPipeline,
    image: np.ndarray,
    pose_images: np.ndarray,
    *,
    steps: int,
    guidance_scale: float,
    window: int,
    overlap: int,
    seed: int,
) -> Tensor:
    """Latents `[F, C, h, w]` for pose images, uint8 `[F, H, W, 3]`.

    For each window and step: two complete passes, each with the ControlNet and its pose encoder, and one pass of the
    appearance UNet.

    Args:
        pipe: a pipeline whose `tcan` comes from `with_explicit_softmax`.
    """
    tcan, device = pipe.tcan, pipe.device
    reference = pipe.encode(image)
    starts = [0]
    while starts[-1] + window < len(pose_images):
        starts.append(starts[-1] + window - overlap)
    total = starts[-1] + window
    frame_of = torch.arange(total).clamp(max=len(pose_images) - 1)
    poses = torch.from_numpy(pose_images).permute(0, 3, 1, 2)[frame_of]
    noise = torch.randn(window, *reference.shape[1:], generator=torch.Generator().manual_seed(seed))
    latents = noise[torch.arange(total) % window]
    pipe.scheduler.set_timesteps(steps)
    for timestep in pipe.scheduler.timesteps:
        t = timestep.to(device)[None]
        summed, count = torch.zeros_like(latents), torch.zeros(total)
        for start in starts:
            part = slice(start, start + window)
            noisy = latents[None, part].to(device, reference.dtype)
            pose = (poses[None, part].to(device) / 255).to(reference.dtype)
            tau = temperature_map(poses[part]).to(device)
            without = tcan.denoise(noisy, t, tcan.pose_residuals(noisy, t, pose), None, temperature=tau)
            features = tcan.appearance(reference, t)
            with_reference = tcan.denoise(
                noisy, t, tcan.pose_residuals(noisy, t, pose), features, temperature=tau
            )
            guided = without + guidance_scale * (with_reference - without)
            summed[part] += guided[0].float().cpu()
            count[part] += 1
        latents = pipe.scheduler.step(summed / count.view(-1, 1, 1, 1), timestep, latents).prev_sample
    return latents[: len(pose_images)]


def decode(pipe: TCANPipeline, latents: Tensor) -> np.ndarray:
    """Frames `[F, H, W, 3]` in [0, 1], decoded one at a time."""
    frames = [pipe.decode(latent[None]) for latent in latents]
    return np.concatenate([image for decoded in frames for image in decoded])


def with_full_appearance_unet(tcan: TCAN, unet: UNet2DConditionModel) -> TCAN:
    """Replace the appearance UNet by the complete UNet, including the layers after the last feature, and the
    memory-efficient modules by torch's and diffusers' own. In place."""
    tcan.appearance_unet = copy.deepcopy(unet)
    install_appearance(tcan.appearance_unet)
    for module in tcan.modules():
        if type(module) in (Convolution, GatedLinear, NormSiLU, SiLULinear):
            module.__class__ = type(module).__base__
        elif type(module) is ResnetBlock2D:
            module.nonlinearity = torch.nn.SiLU()
    return tcan
