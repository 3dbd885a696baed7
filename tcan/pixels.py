"""Conversion between uint8 frames and the tensors that the networks take.

diffusers' `VaeImageProcessor` converts float images in [0, 1] on the CPU. Here frames stay uint8 until they are on the
device, which moves 25 % of the bytes.
"""

import numpy as np
import torch
from torch import Tensor


def to_vae_input(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 RGB `[N, H, W, 3]` -> `[N, 3, H, W]` in [-1, 1], the VAE's input, on the same device."""
    return frames.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1


def from_vae_output(images: Tensor) -> Tensor:
    """`[N, 3, H, W]` in [-1, 1] -> float32 RGB `[N, H, W, 3]` in [0, 1], on the same device."""
    return (images / 2 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1)


def to_controlnet_input(drawn: Tensor) -> Tensor:
    """Drawn poses, uint8 RGB `[..., H, W, 3]` -> float32 `[..., 3, H, W]` in [0, 1], on the same device."""
    return drawn.movedim(-1, -3).float() / 255


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Float RGB in [0, 1] -> uint8, of any shape."""
    return (frames * 255).round().astype(np.uint8)
