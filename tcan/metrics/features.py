"""Metrics with networks: LPIPS, image similarity, and the features of FID, FID-VID and FVD."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tcan.metrics.networks import FVDI3D, LPIPS, FIDInception, FIDVIDResNet, ImageEmbedding

WINDOW = 16
"""Frames per window of FID-VID and FVD. The windows of a video start at each of its frames (stride 1), as in DisCo's scripts."""

IMAGE_BATCH = 16
WINDOW_BATCH = 4


def lpips(network: LPIPS, result: np.ndarray, truth: np.ndarray, *, unscaled: bool = False) -> float:
    """Return LPIPS, averaged over the frames.

    Args:
        result, truth: uint8 RGB `[F, H, W, 3]`, corresponding frames.
        unscaled: see `LPIPS.forward`.
    """
    device = _device(network)
    pairs = zip(
        _batches(_channels_first(result), IMAGE_BATCH),
        _batches(_channels_first(truth), IMAGE_BATCH),
        strict=True,
    )
    values = [network(a.to(device) / 255, b.to(device) / 255, unscaled=unscaled).cpu() for a, b in pairs]
    return float(torch.cat(values).double().mean())


def fid_features(network: FIDInception, frames: np.ndarray) -> np.ndarray:
    """Return the features `[F, 2048]` of uint8 RGB frames `[F, H, W, 3]`."""
    return _run(network, _channels_first(frames), IMAGE_BATCH)


def fid_vid_features(network: FIDVIDResNet, frames: np.ndarray) -> np.ndarray:
    """Return the features `[W, 2048]` of all windows of uint8 RGB frames `[F, H, W, 3]`; W = max(0, F - 15)."""
    return _run_windows(network, network.preprocess(frames), 2048)


def fvd_features(network: FVDI3D, frames: np.ndarray) -> np.ndarray:
    """Return the features `[W, 400]` of all windows of uint8 RGB frames `[F, H, W, 3]`; W = max(0, F - 15)."""
    return _run_windows(network, _channels_first(frames), 400)


def embeddings(network: ImageEmbedding, frames: np.ndarray) -> np.ndarray:
    """Return the embeddings `[F, D]`, of length 1, of uint8 RGB frames `[F, H, W, 3]`. A product is a cosine similarity."""
    parts = [network(frames[i : i + IMAGE_BATCH]).cpu().numpy() for i in range(0, len(frames), IMAGE_BATCH)]
    return np.concatenate(parts)


def _run_windows(network: torch.nn.Module, frames: Tensor, features: int) -> np.ndarray:
    """Features of the windows of frames `[F, 3, H, W]`."""
    if len(frames) < WINDOW:
        return np.empty((0, features), np.float32)
    windows = frames.unfold(0, WINDOW, 1).movedim(-1, 1)  # [W, 16, 3, H, W], a view
    return _run(network, windows, WINDOW_BATCH)


def _run(network: torch.nn.Module, inputs: Tensor, batch: int) -> np.ndarray:
    device = _device(network)
    return torch.cat([network(part.to(device)).float().cpu() for part in _batches(inputs, batch)]).numpy()


def _batches(inputs: Tensor, size: int) -> Iterator[Tensor]:
    return (inputs[i : i + size] for i in range(0, len(inputs), size))


def _channels_first(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(frames, -1, 1)))


def _device(network: torch.nn.Module) -> torch.device:
    return next(iter(network.state_dict().values())).device
