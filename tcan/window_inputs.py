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
"""Windows whose pose embeddings are cached in host memory (2.5 MiB per frame at 512 x 512 in half precision). Those of
further windows are recomputed at each step."""


class WindowInputs:
    """Pose embedding and temperature map of each window of a clip.

    Args:
        draw: keypoints `[F, 18, 3]` -> pose images, uint8 RGB `[F, H, W, 3]`.
        poses: keypoints `[F, 18, 3]` in pixels of the output.
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
        self._tcan, self._draw_poses, self._device = tcan, draw, device
        self.windows = Windows(len(poses), sampling.window, sampling.overlap, sampling.loop)
        self._padded = poses[self.windows.source.numpy()]
        self._embeddings: dict[int, Tensor] = {}
        self._temperatures = [
            temperature_map(self._draw(frames).movedim(-1, -3), sampling.ptm_strength)
            if sampling.ptm
            else None
            for frames in self.windows.indices
        ]

    @property
    def num_padded_frames(self) -> int:
        return len(self._padded)

    def _draw(self, frames: Tensor) -> Tensor:
        """Pose images uint8 `[F, H, W, 3]`, drawn on demand: for all windows they would need far more memory than the
        latents."""
        return torch.from_numpy(self._draw_poses(self._padded[frames.numpy()]))

    def pose_embedding(self, index: int) -> Tensor:
        """The ControlNet's embedding of a window's pose images, `[1, F, C_0, h, w]`."""
        if index in self._embeddings:
            return self._embeddings[index].to(self._device)
        drawn = self._draw(self.windows.indices[index])[None].to(self._device)
        embedding = self._tcan.embed_pose(to_controlnet_input(drawn))
        if index < CACHED_WINDOWS:
            self._embeddings[index] = embedding.cpu()
        return embedding

    def temperature(self, index: int) -> Tensor | None:
        """The temperature map of a window, `[H, W]`; None if disabled."""
        temperature = self._temperatures[index]
        return None if temperature is None else temperature.to(self._device)
