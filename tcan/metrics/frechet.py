"""Fréchet distance between two sets of features: the formula of FID, FID-VID and FVD, without their networks."""

import numpy as np

from tcan.errors import UserError


def frechet_distance(result: np.ndarray, truth: np.ndarray) -> float:
    """Return the squared Fréchet distance between Gaussians with the moments of two sets of features.

    d² = |m_1 - m_2|² + tr C_1 + tr C_2 - 2 tr (C_1 C_2)^(1/2) (Dowson and Landau 1982; Heusel et al. 2017), in float64.
    The covariances are the unbiased estimates, with denominator N - 1, as in pytorch-fid, clean-fid and torchmetrics. The
    distance itself remains biased: it decreases with N. Compare distances of equal N only.

    With the centered features X_i, scaled by (N_i - 1)^(-1/2), C_i = X_i^T X_i, and the last trace is the nuclear norm of
    X_1 X_2^T. This requires no matrix square root. It is also accurate for N <= D, where the covariances are singular.

    Args:
        result, truth: features `[N, D]` and `[M, D]` of any real type; N and M can differ.

    Returns:
        d² >= 0, in squared units of the features.

    Raises:
        UserError: an array is not two-dimensional, has fewer than 2 samples, or contains NaN or inf; D differs.
    """
    first, second = _checked(result, "result"), _checked(truth, "truth")
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"Fréchet distance: the features of result have {first.shape[1]} dimensions, those of truth "
            f"{second.shape[1]}; compute both with the same network"
        )
    mean_1, factor_1 = _moments(first)
    mean_2, factor_2 = _moments(second)
    trace = np.linalg.svd(factor_1 @ factor_2.T, compute_uv=False).sum()
    distance = ((mean_1 - mean_2) ** 2).sum() + (factor_1**2).sum() + (factor_2**2).sum() - 2 * trace
    return max(float(distance), 0.0)  # equal sets: the rounding error can be negative


def _checked(features: np.ndarray, name: str) -> np.ndarray:
    """The features as float64 `[N, D]`."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2:
        raise UserError(
            f"Fréchet distance: the features of {name} have shape {features.shape}; pass an array [N, D]"
        )
    if len(features) < 2:
        raise UserError(
            f"Fréchet distance: {name} has {len(features)} sample(s), the covariance requires at least 2; "
            "evaluate more images or videos"
        )
    if not np.isfinite(features).all():
        raise UserError(
            f"Fréchet distance: the features of {name} contain NaN or inf; check the images and the network"
        )
    return features


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean `[D]` and a factor F `[min(N, D), D]` of the covariance F^T F."""
    mean = features.mean(axis=0)
    centered = (features - mean) / np.sqrt(len(features) - 1)
    # The triangular factor R of X = Q R has the same product X^T X. For N > D it is smaller.
    return mean, np.asarray(np.linalg.qr(centered, mode="r"))
