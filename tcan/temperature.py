"""The pose-driven temperature map (PTM): poses of a window -> temperature of temporal attention at a place."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor


def temperature_map(poses: Tensor, strength: float = 1.0) -> Tensor:
    """tau of a window: 1 on the skeleton, larger further away, the same for all its frames.

    poses: pose images on black, `[F, 3, H, W]`, uint8 or float. Returns float32 `[H, W]` on the poses'
    device.

    method "Pose-driven temperature map": M(p) = 1 where all images are black; D the Euclidean distance transform
    of M; d = D / sqrt((H/2)^2 + (W/2)^2); tau = 3 strength d + 1, strength 1 in the paper. Without any pose tau is 1
    everywhere.
    """
    skeleton = poses.ne(0).flatten(0, 1).any(0)
    if not skeleton.any():
        return torch.ones(skeleton.shape, device=poses.device)
    distance = torch.from_numpy(distance_transform_edt(~skeleton.cpu().numpy()).astype(np.float32))
    height, width = skeleton.shape
    half_diagonal = ((height / 2) ** 2 + (width / 2) ** 2) ** 0.5
    return (3 * strength * distance / half_diagonal + 1).to(poses.device)


def temperature_of_places(temperature: Tensor, batch: int, height: int, width: int) -> Tensor:
    """tau nearest-resized to a layer's grid: `[H, W]` or `[B, H, W]` -> `[batch * h * w]`, clip after clip, and where
    `batch` is a multiple of B, all of them again.
    """
    maps = temperature.reshape(-1, 1, *temperature.shape[-2:])
    places = F.interpolate(maps, (height, width), mode="nearest").flatten()
    return places.repeat(batch // len(maps))
