"""Pretrained models and a clip dataset of small trainings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tcan.fingerprint import fingerprint
from tests.training import SIZE, changed_clips, write_dataset


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """Pretrained models with random weights, smaller than the shipped `mini` models."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    channels = (16, 32, 32, 32)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5,
    ).save_pretrained(folder / "vae")  # fmt: skip
    unet = UNet2DConditionModel(
        layers_per_block=1,
        block_out_channels=channels,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=16,
    )
    unet.save_pretrained(folder / "unet")
    controlnet = ControlNetModel.from_unet(unet)
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    controlnet.save_pretrained(folder / "controlnet")
    MotionAdapter(
        block_out_channels=channels, motion_layers_per_block=1, motion_num_attention_heads=4, motion_norm_num_groups=8,
        use_motion_mid_block=False,
    ).save_pretrained(folder / "motion_adapter")  # fmt: skip
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=4,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory, pretrained) -> Path:
    vae = fingerprint(AutoencoderKL.from_pretrained(pretrained / "vae"))
    folder = tmp_path_factory.mktemp("clips") / "dataset"
    write_dataset(folder, {name: [(0, 16), (16, 16)] for name in "abcdefgh"}, SIZE, SIZE, vae)
    rng = np.random.default_rng(0)
    for row in changed_clips(folder):
        row["split"] = "validation" if row["video_id"] in "gh" else "train"
        row["latent_mean"] = rng.normal(0, 2, (16, 4, 8, 8)).astype("<f2").tobytes()
        row["latent_logvar"] = rng.normal(-3, 1, (16, 4, 8, 8)).astype("<f2").tobytes()
        row["reference_latent_mean"] = rng.normal(0, 2, (4, 8, 8)).astype("<f2").tobytes()
    return folder
