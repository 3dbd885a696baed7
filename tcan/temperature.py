"""Pose-driven temperature map (PTM): temperature of the temporal attention per spatial position of a window."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor


def temperature_map(poses: Tensor, strength: float = 1.0) -> Tensor:
    """Return tau of a window: 1 on the skeleton, increasing with the distance from it, shared by all frames.

    Method "Pose-driven temperature map": M(p) = 1 where all images are black; D is the Euclidean distance transform of
    M; d = D / sqrt((H/2)^2 + (W/2)^2); tau = 3 strength d + 1. If no image contains a pose, tau is 1 everywhere.

    Args:
        poses: pose images on a black background, `[F, 3, H, W]`, uint8 or float.
        strength: factor of the distance term; 1 in the paper.

    Returns:
        float32 `[H, W]` on the device of `poses`.
    """
    skeleton = poses.ne(0).flatten(0, 1).any(0)
    if not skeleton.any():
        return torch.ones(skeleton.shape, device=poses.device)
    distance = torch.from_numpy(distance_transform_edt(~skeleton.cpu().numpy()).astype(np.float32))
    height, width = skeleton.shape
    half_diagonal = ((height / 2) ** 2 + (width / 2) ** 2) ** 0.5
    return (3 * strength * distance / half_diagonal + 1).to(poses.device)


def resize_temperature(temperature: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Resize tau `[H, W]` or `[B, H, W]` to a layer's grid with nearest-neighbor interpolation.

    Returns:
        `[batch * height * width]`, ordered by clip, row, column. If `batch` is a multiple of B, the B clips repeat.
    """
    maps = temperature.reshape(-1, 1, *temperature.shape[-2:])
    resized = F.interpolate(maps, (height, width), mode="nearest").flatten()
    return resized.repeat(batch // len(maps))
