"""Small random pretrained models in float64, and TCAN models built from them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable

import pytest
import torch
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel
from torch import nn

from tcan.model import TCAN


@pytest.fixture(scope="session")
def pretrained() -> dict:
    """Arguments of `TCAN`: unet, controlnet, motion_adapter, empty_prompt."""
    torch.manual_seed(0)
    channels = (16, 32, 32, 32)
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=channels,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=64,
    ).double()
    controlnet = ControlNetModel.from_unet(unet).double()
    for parameter in controlnet.parameters():
        if not parameter.any():  # the output convolutions are initialized with zeros
            nn.init.normal_(parameter, std=0.1)
    adapter = MotionAdapter(
        block_out_channels=channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
        use_motion_mid_block=False,
    ).double()
    prompt = torch.randn(1, 4, 64, dtype=torch.float64)
    return {"unet": unet, "controlnet": controlnet, "motion_adapter": adapter, "empty_prompt": prompt}


@pytest.fixture
def fresh(pretrained: dict) -> TCAN:
    """A newly built, untrained TCAN."""
    torch.manual_seed(1)
    return TCAN(**pretrained)


@pytest.fixture
def model(fresh: TCAN) -> TCAN:
    """A TCAN without zero-initialized weights, as after training."""
    for name, parameter in fresh.named_parameters():
        if "lora_B" in name or ("motion_modules" in name and "proj_out" in name):
            nn.init.normal_(parameter, std=0.05)
    return fresh


@pytest.fixture
def batch() -> Callable[..., dict[str, torch.Tensor]]:
    """`batch(B, F)`: random float64 inputs of `TCAN.forward` with latents of 8 x 16."""

    def make(clips: int, frames: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(2)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        return {
            "noisy": randn(clips, frames, 4, 8, 16),
            "timestep": torch.randint(0, 1000, (clips,), generator=g),
            "pose": randn(clips, frames, 3, 64, 128).sigmoid(),
            "reference_latent": randn(clips, 4, 8, 16),
        }

    return make
