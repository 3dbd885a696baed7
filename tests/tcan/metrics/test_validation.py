"""Orderings that must hold: metrics without networks rank known corruptions of a true video."""

import numpy as np
import pytest

from tcan.metrics.networks import Networks
from tests.benchmarks.metrics import evaluate, verdict, videos

RANKED = {
    "blur": ("l1", "psnr", "ssim", "l1_disco", "ssim_disco"),
    "identity": ("l1", "psnr", "l1_disco", "colour_distance"),
    "frozen": ("l1", "ssim", "l1_disco", "ssim_disco"),
    "flicker": ("l1", "l1_disco", "flicker", "warping_error"),
    "pose": ("l1", "psnr", "l1_disco"),
}
"""Corruption -> metrics that order truth, level 1 and level 2 in every video. The mean PSNR is infinite if one frame is exact."""


@pytest.fixture(scope="module")
def values() -> dict[str, dict[str, np.ndarray]]:
    return evaluate(videos(3, frames=12, size=96), Networks())


@pytest.mark.parametrize("kind", RANKED)
def test_metrics_rank_the_levels_of_a_corruption(kind: str, values: dict[str, dict[str, np.ndarray]]) -> None:
    found = {metric: verdict(metric, values[kind][metric]) for metric in RANKED[kind]}
    assert found == dict.fromkeys(RANKED[kind], "ranks")


def test_known_blind_spots_are_blind_spots(values: dict[str, dict[str, np.ndarray]]) -> None:
    # A frozen video has neither flicker nor a warping error, and blur reduces the warping error.
    assert verdict("warping_error", values["frozen"]["warping_error"]) == "reversed"
    assert verdict("flicker", values["frozen"]["flicker"]) in ("blind", "reversed")
    # The first frame of a frozen video is exact.
    assert verdict("psnr", values["frozen"]["psnr"]) == "blind"
    assert verdict("warping_error", values["blur"]["warping_error"]) == "reversed"
    # The overflow makes unrelated frames look as good as similar ones: about 27 dB or more.
    assert (values["identity"]["psnr_uint8_overflow"][2] > 27).all() > (
        values["identity"]["psnr"][2] > 27
    ).any()


def test_verdicts_follow_the_values_and_the_direction_of_the_metric() -> None:
    ranked = np.array([[0, 0.1], [1, 2], [3, 4]])
    assert verdict("l1", ranked) == "ranks" and verdict("ssim", ranked) == "reversed"
    assert verdict("psnr", np.array([[np.inf, np.inf], [30, 40], [20, 10]])) == "ranks"
    assert verdict("l1", ranked[[0, 2, 1]]) == "sees"
    assert verdict("flicker", np.ones((3, 2))) == "blind"
    assert verdict("flicker", np.array([[1, 1], [2, 2], [2, 0.5]])) == "unsure"
