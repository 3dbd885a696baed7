"""Small pretrained models with random weights and the architecture of the mini preset, for tests."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tcan.pose.network import BodyPoseNetwork

CHANNELS = (16, 32, 32, 32)


def write_random_pretrained(folder: Path) -> None:
    """Write a folder of pretrained models in diffusers' layout; the weights are deterministic."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=128,
        scaling_factor=0.5,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=CHANNELS,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=64,
    )
    motion_adapter = MotionAdapter(
        block_out_channels=CHANNELS,
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
        motion_max_seq_length=32,
        use_motion_mid_block=False,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=3,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {
        "vae": vae,
        "unet": unet,
        "controlnet": ControlNetModel.from_unet(unet),
        "motion_adapter": motion_adapter,
        "text_encoder": text_encoder,
        "scheduler": scheduler,
        "pose": BodyPoseNetwork(),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
