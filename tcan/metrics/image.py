"""Per-frame image metrics: L1, PSNR, SSIM."""

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def image_metrics(result: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compute L1, PSNR and SSIM per frame on values in [0, 1] and average them over the frames.

    Args:
        result, truth: uint8 RGB `[F, H, W, 3]`, corresponding frames; H and W at least 11 (SSIM's Gaussian window).

    Returns:
        l1: mean absolute difference;
        psnr: 10 log10(1 / MSE) in dB, infinite for an identical frame;
        ssim: Wang et al. 2004, Gaussian window with sigma 1.5.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != truth.shape:
        raise ValueError(f"result {result.shape} and truth {truth.shape} must have the same shape")
    l1, psnr, ssim = [], [], []
    for a, b in zip(result, truth, strict=True):
        # Convert to float first: uint8 differences wrap around, which results in a PSNR near 29.
        pair = [torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255 for frame in (a, b)]
        l1.append((pair[0] - pair[1]).abs().mean().item())
        psnr.append(peak_signal_noise_ratio(*pair, data_range=1.0).item())
        ssim.append(structural_similarity_index_measure(*pair, data_range=1.0).item())
    return {"l1": float(np.mean(l1)), "psnr": float(np.mean(psnr)), "ssim": float(np.mean(ssim))}
