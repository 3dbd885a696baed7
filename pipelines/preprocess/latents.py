"""Encoding of frames with the VAE. Mean and log-variance are stored, so that training can sample from the posterior."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tcan.pixels import to_vae_input
from tcan.transfer import HostCopy, upload


class EncodedFrames:
    """Latents of frames, which the device computes while the host does something else.

    Args:
        frames: uint8 RGB `[F, H, W, 3]`.
        batch_frames: frames per forward pass.
    """

    @torch.inference_mode()
    def __init__(self, vae: AutoencoderKL, frames: np.ndarray, batch_frames: int):
        starts = range(0, len(frames), batch_frames)
        batches = [frames[start : start + batch_frames] for start in starts]
        latents = [encode_batch(vae, upload(batch, vae.device)) for batch in batches]
        self._copy = HostCopy(torch.cat(latents, dim=1))

    def numpy(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, logvar), float16 `[F, 4, H/8, W/8]`, not scaled. Waits for the device."""
        mean, logvar = self._copy.numpy()
        return mean, logvar


def encode_batch(vae: AutoencoderKL, frames: Tensor) -> Tensor:
    """uint8 RGB `[B, H, W, 3]` on the VAE's device -> mean and logvar float16 `[2, B, 4, H/8, W/8]`, without a host
    synchronization.
    """
    distribution = vae.encode(to_vae_input(frames, vae.dtype)).latent_dist
    # Converted on the device: half the bytes to copy, and NumPy has no bfloat16.
    return torch.stack([distribution.mean, distribution.logvar]).half()
