"""Per-frame image metrics: L1, PSNR and SSIM, and the same three in the conventions of DisCo's evaluation scripts.

Most papers on human image animation since DisCo (Wang et al., CVPR 2024) use its scripts.
"""

import cv2
import numpy as np
import torch
from skimage.metrics import structural_similarity
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


def psnr_uint8_overflow(result: np.ndarray, truth: np.ndarray) -> float:
    """Compute the PSNR of evaluation scripts that subtract and square in uint8, averaged over the frames.

    Both operations wrap around at 256: a difference of 16 grey levels, or a multiple of it, has the square 0. Most results
    are between 27 and 32 dB, however different the images are. Only use it to compare with numbers that were published with
    this error. Use `image_metrics` for the correct PSNR.

    Args:
        result, truth: uint8 RGB `[F, H, W, 3]`, corresponding frames.

    Returns:
        20 log10(255 / RMSE) in dB; 100 for a frame with an overflowed MSE of 0, as in those scripts.

    Raises:
        ValueError: the shapes differ, or an array is not uint8.
    """
    if result.shape != truth.shape:
        raise ValueError(f"result {result.shape} and truth {truth.shape} must have the same shape")
    if result.dtype != np.uint8 or truth.dtype != np.uint8:
        raise ValueError(f"result {result.dtype} and truth {truth.dtype} must be uint8")
    squares = np.square(result - truth, dtype=np.uint8)
    mse = squares.mean(axis=(1, 2, 3), dtype=np.float64)
    return float(np.mean([20 * np.log10(255 / np.sqrt(value)) if value else 100.0 for value in mse]))


def l1_disco(result: np.ndarray, truth: np.ndarray) -> float:
    """Return the L1 of DisCo's scripts: the mean absolute difference in 0..255, divided by the number of pixels H W.

    Papers give it in units of 1e-4. It depends on the size: the same difference is 4 times smaller at twice the height and
    width. At 256 x 256, it is 255 / 65536 times the L1 of `image_metrics`.

    Args:
        result, truth: uint8 RGB `[F, H, W, 3]`, corresponding frames.
    """
    height, width = truth.shape[1:3]
    return float(np.abs(result.astype(np.float64) - truth).mean() / (height * width))


def ssim_disco(result: np.ndarray, truth: np.ndarray) -> float:
    """Return the SSIM of DisCo's scripts, averaged over the frames: scikit-image's default on grey images.

    Uniform window of 7 x 7 instead of a Gaussian window, unbiased covariances, K1 = 0.01, K2 = 0.03, range 255; the border of
    3 pixels does not count.

    Args:
        result, truth: uint8 RGB `[F, H, W, 3]`, corresponding frames; H and W at least 7.
    """
    values = []
    for frames in zip(result, truth, strict=True):
        values.append(structural_similarity(*(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames)))
    return float(np.mean(values))
