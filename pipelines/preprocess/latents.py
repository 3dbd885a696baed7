"""Stage 4, latents: frames -> what the VAE makes of them, mean and log-variance, so that training can sample anew."""

import numpy as np
import torch
from diffusers import AutoencoderKL


@torch.inference_mode()
def encode_frames(vae: AutoencoderKL, frames: np.ndarray, batch_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 RGB `[F, H, W, 3]` -> (mean, logvar), float16 `[F, 4, H/8, W/8]`, unscaled."""
    means, logvars = [], []
    for start in range(0, len(frames), batch_frames):
        images = torch.tensor(frames[start : start + batch_frames], device=vae.device)
        images = images.permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1  # [-1, 1]
        distribution = vae.encode(images).latent_dist
        means.append(distribution.mean.cpu().numpy().astype("<f2"))
        logvars.append(distribution.logvar.cpu().numpy().astype("<f2"))
    return np.concatenate(means), np.concatenate(logvars)
