"""Encoding of frames with the VAE. Mean and log-variance are stored, so that training can sample from the posterior."""

import numpy as np
import torch
from diffusers import AutoencoderKL

from tcan.pixels import to_vae_input


@torch.inference_mode()
def encode_frames(vae: AutoencoderKL, frames: np.ndarray, batch_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 RGB `[F, H, W, 3]` -> (mean, logvar), float16 `[F, 4, H/8, W/8]`, not scaled."""
    means, logvars = [], []
    for start in range(0, len(frames), batch_frames):
        batch = torch.tensor(frames[start : start + batch_frames], device=vae.device)
        distribution = vae.encode(to_vae_input(batch, vae.dtype)).latent_dist
        # Converted on the device: half the bytes to copy, and NumPy has no bfloat16.
        means.append(distribution.mean.half().cpu().numpy())
        logvars.append(distribution.logvar.half().cpu().numpy())
    return np.concatenate(means), np.concatenate(logvars)
