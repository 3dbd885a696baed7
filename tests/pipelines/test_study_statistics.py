"""Statistics of `tcan study` against closed forms and independent implementations."""

import numpy as np
import pytest
from scipy import stats

from pipelines.study.statistics import Effect, holm, paired_effect, verdict
from tcan.errors import UserError


def test_interval_of_one_seed_equals_scipys_bootstrap() -> None:
    differences = np.random.default_rng(0).normal(0.3, 1, 30)
    effect = paired_effect(differences[None])
    expected = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert effect.mean == pytest.approx(differences.mean())
    assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_interval_has_the_variance_of_crossed_resampling() -> None:
    """Additive data a_s + b_v: the bootstrap variance of the mean is var(a) / S + var(b) / V."""
    rng = np.random.default_rng(0)
    seeds, videos = rng.normal(0, 1, 12), rng.normal(0, 2, 40)
    effect = paired_effect(seeds[:, None] + videos)
    sd = np.sqrt(seeds.var() / 12 + videos.var() / 40)
    assert (effect.high - effect.low) == pytest.approx(2 * 1.96 * sd, rel=0.05)


def test_undefined_videos_are_ignored_and_too_few_are_a_user_error() -> None:
    differences = np.array([[1.0, 2, 3, np.nan], [1, 2, 3, 4]])
    effect = paired_effect(differences)
    assert (effect.mean, effect.videos, effect.seeds) == (2, 3, 2)
    with pytest.raises(UserError, match="requires at least 3"):
        paired_effect(differences[:, 1:])


def test_p_value_is_not_below_that_of_the_sign_test() -> None:
    """`scipy.stats.binomtest` of 5 differences of the same sign; with many, the bootstrap's resolution is the limit."""
    assert paired_effect(np.ones((3, 5))).p == pytest.approx(stats.binomtest(5, 5).pvalue)
    assert paired_effect(np.ones((3, 30))).p == pytest.approx(2 / 10_001)


def test_holm_matches_the_textbook_example() -> None:
    """Holm (1979): with m = 4, the sorted p-values are multiplied by 4, 3, 2, 1, and made monotonic."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]


@pytest.mark.parametrize(
    ("low", "high", "p", "sign", "expected"),
    [
        (0.1, 0.5, 0.01, 1, "supported"),
        (0.1, 0.5, 0.01, -1, "contradicted"),
        (-0.1, 0.5, 0.01, 1, "undecided"),
        (0.1, 0.5, 0.2, 1, "undecided"),
        (-0.1, 0.3, 0.01, 1, "negligible"),  # of 0.4
        (-0.4, 0.3, 0.01, 1, "undecided"),
        (0.1, 0.3, 0.2, -1, "negligible"),
        (0.1, 0.3, 0.01, 1, "supported"),
    ],
)
def test_verdict_requires_interval_and_adjusted_p(
    low: float, high: float, p: float, sign: int, expected: str
) -> None:
    assert verdict(Effect((low + high) / 2, low, high, p, 5, 2), p, sign, 0.4) == expected
