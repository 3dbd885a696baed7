"""Inputs of the networks that differ between windows and not between denoising steps."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tcan.model import TCAN
from tcan.pixels import to_controlnet_input
from tcan.sampling import SamplingConfig
from tcan.temperature import temperature_map
from tcan.windows import Windows

CACHED_WINDOWS = 64
"""Windows whose pose embeddings (2.5 MiB per frame at 512 x 512 in half precision) and temperature maps (1 MiB per window) are
cached in host memory. Those of further windows are recomputed at each step."""


class WindowInputs:
    """Pose embedding and temperature map of each window of a clip.

    Args:
        draw: keypoints `[F, N, 3]` -> pose images, uint8 RGB `[F, H, W, 3]`.
        poses: keypoints `[F, N, 3]` in pixels of the output.
        device: of the embeddings and the maps.
    """

    def __init__(
        self,
        tcan: TCAN,
        draw: Callable[[np.ndarray], np.ndarray],
        poses: np.ndarray,
        sampling: SamplingConfig,
        device: torch.device,
    ) -> None:
        self._tcan, self._draw_poses, self._sampling, self._device = tcan, draw, sampling, device
        self.windows = Windows(len(poses), sampling.window, sampling.overlap, sampling.loop)
        self._padded = poses[self.windows.source.numpy()]
        self._embeddings: dict[int, Tensor] = {}
        self._temperatures: dict[int, Tensor] = {}

    @property
    def num_padded_frames(self) -> int:
        return len(self._padded)

    def _draw(self, index: int) -> Tensor:
        """Pose images of a window, uint8 `[F, H, W, 3]`, drawn on demand: for all windows they would need far more memory
        than the latents."""
        return torch.from_numpy(self._draw_poses(self._padded[self.windows.indices[index].numpy()]))

    def _cached(self, cache: dict[int, Tensor], index: int, compute: Callable[[int], Tensor]) -> Tensor:
        """A value of a window on the device: from the cache, else computed."""
        if index in cache:
            return cache[index].to(self._device, non_blocking=True)
        value = compute(index)
        if index < CACHED_WINDOWS:
            host = value.cpu()
            cache[index] = host.pin_memory() if self._device.type == "cuda" else host
        return value.to(self._device)

    def pose_embedding(self, index: int) -> Tensor:
        """The ControlNet's embedding of a window's pose images, `[1, F, C_0, h, w]`."""
        return self._cached(self._embeddings, index, self._embed)

    def _embed(self, index: int) -> Tensor:
        drawn = self._draw(index)[None].to(self._device)
        return self._tcan.embed_pose(to_controlnet_input(drawn))

    def temperature(self, index: int) -> Tensor | None:
        """The temperature map of a window, `[H, W]`; None if disabled."""
        return self._cached(self._temperatures, index, self._map) if self._sampling.ptm else None

    def _map(self, index: int) -> Tensor:
        return temperature_map(self._draw(index).movedim(-1, -3), self._sampling.ptm_strength)
