"""The Fréchet distance compared with closed forms, scipy's matrix square root, and torchmetrics."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tcan.errors import UserError
from tcan.metrics import frechet_distance


def whitened(samples: int, dimensions: int, seed: int = 0) -> np.ndarray:
    """Features with mean 0 and unbiased covariance I, exactly."""
    features = np.random.default_rng(seed).standard_normal((samples, dimensions))
    orthonormal, _ = np.linalg.qr(features - features.mean(axis=0))
    return orthonormal * np.sqrt(samples - 1)


def correlated(samples: int, dimensions: int, seed: int) -> np.ndarray:
    """Features with a random mean and covariance."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((samples, dimensions)) @ rng.standard_normal(
        (dimensions, dimensions)
    ) + rng.normal(0, 3, dimensions)


def distance_by_sqrtm(first: np.ndarray, second: np.ndarray) -> float:
    """The definition, with scipy's matrix square root of the product of the covariances."""
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    mean = ((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum()
    return float(mean + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root).real)


def test_shifted_and_scaled_gaussians_follow_the_closed_form() -> None:
    # |shift|² + D (1 - scale)²
    first, second = whitened(200, 16, seed=1), whitened(90, 16, seed=2)
    assert frechet_distance(first, second) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(first, 3 * second + 0.5) == pytest.approx(16 * 0.25 + 16 * 4, rel=1e-12)


def test_diagonal_covariances_follow_the_closed_form() -> None:
    first, second = np.linspace(0.1, 5, 12), np.linspace(7, 1, 12)
    distance = frechet_distance(whitened(50, 12, seed=1) * first, whitened(80, 12, seed=2) * second)
    assert distance == pytest.approx(((first - second) ** 2).sum(), rel=1e-12)


def test_two_dimensions_with_different_axes_follow_the_closed_form() -> None:
    # For 2 x 2 matrices, tr M^(1/2) = (tr M + 2 (det M)^(1/2))^(1/2).
    factors = np.array([[2, 0.3], [0, 1]]), np.array([[0.5, 0], [-1.5, 3]])
    first, second = (whitened(30, 2, seed) @ factor for seed, factor in enumerate(factors))
    covariances = [factor.T @ factor for factor in factors]
    product = covariances[0] @ covariances[1]
    root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root_trace
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_fewer_samples_than_dimensions_are_exact() -> None:
    # Singular covariances: sets on orthogonal subspaces, and a scaled copy, have closed forms.
    features = whitened(8, 6)
    first = np.concatenate([features, np.zeros((8, 94))], axis=1)
    second = np.concatenate([np.zeros((8, 94)), 2 * features], axis=1)
    assert frechet_distance(first, second) == pytest.approx(6 + 4 * 6, rel=1e-12)
    assert frechet_distance(first, 3 * first) == pytest.approx(4 * 6, rel=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("samples", [(400, 300), (400, 20), (20, 30)], ids=str)
def test_distance_equals_the_definition_with_scipy_sqrtm(samples: tuple[int, int]) -> None:
    dimensions = 24
    first, second = correlated(samples[0], dimensions, seed=1), correlated(samples[1], dimensions, seed=2)
    # sqrtm loses about 8 digits at singular matrices, which fewer samples than dimensions have.
    tolerance = 1e-10 if min(samples) > dimensions else 1e-5
    assert frechet_distance(first, second) == pytest.approx(distance_by_sqrtm(first, second), rel=tolerance)


@pytest.mark.parametrize("samples", [(400, 300), (20, 30)], ids=str)
def test_distance_equals_torchmetrics_on_the_same_features(samples: tuple[int, int]) -> None:
    first, second = correlated(samples[0], 24, seed=3), correlated(samples[1], 24, seed=4)
    identity = nn.Identity()
    identity.num_features = 24
    fid = FrechetInceptionDistance(identity)
    fid.update(torch.from_numpy(first), real=False)
    fid.update(torch.from_numpy(second), real=True)
    assert frechet_distance(first, second) == pytest.approx(fid.compute().item(), rel=1e-5)


def test_distance_is_symmetric_and_computed_in_float64() -> None:
    first, second = correlated(40, 8, seed=5) + 1e3, correlated(60, 8, seed=6) + 1e3
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-12)
    single = first.astype(np.float32), second.astype(np.float32)
    assert frechet_distance(*single) == frechet_distance(
        *(features.astype(np.float64) for features in single)
    )


def test_unusable_features_raise_user_error() -> None:
    good, bad = whitened(10, 4), whitened(10, 4)
    bad[3, 1] = np.nan
    for result, truth, reason in (
        (good[:1], good, r"result has 1 sample\(s\)"),
        (good, good[:0], r"truth has 0 sample\(s\)"),
        (good, bad, "truth contain NaN"),
        (bad * np.inf, good, "result contain NaN"),
        (good, whitened(10, 3), "have 4 dimensions, those of truth 3"),
        (good[0], good, r"shape \(4,\)"),
    ):
        with pytest.raises(UserError, match=reason):
            frechet_distance(result, truth)
