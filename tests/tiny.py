"""The smallest networks with every kind of layer of TCAN, because tracing time grows with the number of layers."""

from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, MotionAdapter, UNet2DConditionModel
from torch import Tensor, nn

from tcan.model import TCAN

CHANNELS = (8, 8, 16)
LATENT = 8
"""Side of the latents."""


def tiny_networks() -> dict[str, Any]:
    """Arguments of `TCAN`: three resolutions, one layer each, spatial attention at the first one and in the middle."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=LATENT, layers_per_block=1, block_out_channels=CHANNELS, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    adapter = MotionAdapter(
        block_out_channels=CHANNELS, motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4,
        use_motion_mid_block=False,
    )  # fmt: skip
    return {
        "unet": unet,
        "controlnet": controlnet,
        "motion_adapter": adapter,
        "empty_prompt": torch.randn(1, 4, 8),
    }


def tiny_tcan() -> TCAN:
    """A TCAN of `tiny_networks` without zero-initialized weights, as after training."""
    tcan = TCAN(**tiny_networks(), lora_rank=2, lora_alpha=2)
    torch.manual_seed(1)
    for parameter in tcan.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return tcan


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip


def tiny_batch(clips: int, frames: int, seed: int = 0) -> dict[str, Tensor]:
    """Latents, noise, timestep, pose and reference latent, as arguments of `tcan.model.diffusion_loss`."""
    g = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(clips, frames, 4, LATENT, LATENT, generator=g) for _ in range(2))
    return {
        "latents": latents,
        "noise": noise,
        "timestep": torch.randint(0, 1000, (clips,), generator=g),
        "pose": torch.rand(clips, frames, 3, 8 * LATENT, 8 * LATENT, generator=g),
        "reference_latent": latents[:, 0].clone(),
    }
