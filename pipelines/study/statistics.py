"""Paired bootstrap of an effect over seeds and videos, Holm's correction, and verdicts."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tcan.errors import UserError

RESAMPLES = 10_000
MIN_VIDEOS = 3
DECIMALS = 10
Verdict = Literal["supported", "contradicted", "negligible", "undecided"]


@dataclass(frozen=True)
class Effect:
    """Mean paired difference with a 95 % percentile interval."""

    mean: float
    low: float
    high: float
    p: float
    """Two-sided p-value of the hypothesis that the mean difference is 0."""
    videos: int
    seeds: int


def paired_effect(differences: np.ndarray, seed: int = 0) -> Effect:
    """Bootstrap the mean of paired differences; seeds and videos are resampled independently, with replacement.

    The crossed resampling (Owen 2007, "The pigeonhole bootstrap") accounts for both sources of variation. A p-value is
    twice the smaller fraction of the resampled means on one side of 0, with one added to each count (Davison and Hinkley
    1997), so it is never 0. It is at least 2^(1 - videos), the smallest p-value of the sign test: the bootstrap of few
    differences of the same sign never reaches 0, however few they are.

    Args:
        differences: `[seeds, videos]`, each of one training seed and one held-out video under two conditions; NaN where
            the metric is undefined.

    Raises:
        UserError: fewer than 3 videos with a defined difference.
    """
    differences = np.asarray(differences, dtype=np.float64)
    differences = differences[:, ~np.isnan(differences).any(axis=0)]
    seeds, videos = differences.shape
    if videos < MIN_VIDEOS:
        raise UserError(
            f"bootstrap: {videos} videos with this metric; an interval requires at least {MIN_VIDEOS}: evaluate more"
        )
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    columns = rng.multinomial(videos, np.full(videos, 1 / videos), RESAMPLES) / videos
    means = np.einsum("rs,sv,rv->r", rows, differences, columns)
    means = means.round(DECIMALS)  # so that equal values give exactly 0
    low, high = np.percentile(means, (2.5, 97.5))
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, max(2 * (tail + 1) / (RESAMPLES + 1), 2.0 ** (1 - videos)))
    return Effect(float(differences.mean()), float(low), float(high), float(p), videos, seeds)


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values of Holm's step-down procedure (1979), which controls the family-wise error rate."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(value) for value in adjusted]


def verdict(effect: Effect, adjusted_p: float, expected_sign: int, minimal: float) -> Verdict:
    """Whether the effect has the expected sign (1 or -1): decided if the adjusted p-value is below 0.05.

    Args:
        minimal: smallest effect that matters. An undecided effect whose interval lies within `-minimal` and `minimal` is negligible.
    """
    if adjusted_p >= 0.05 or effect.low <= 0 <= effect.high:
        return "negligible" if -minimal < effect.low and effect.high < minimal else "undecided"
    return "supported" if np.sign(effect.mean) == expected_sign else "contradicted"
