"""Results of the cells -> effects with intervals and verdicts."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.study.cells import evaluation_name
from pipelines.study.questions import Comparison, Condition, Metric, Question
from pipelines.study.statistics import Effect, Verdict, holm, paired_effect, verdict
from tcan.errors import UserError

Results = Mapping[str, Mapping[str, Any]]
"""Contents of `cell.json` by the name of the cell, of the finished cells."""


@dataclasses.dataclass
class Outcome:
    """A comparison with its effect. `effect` is None if there is no interval, for the reason in `note`."""

    comparison: Comparison
    effect: Effect | None
    note: str = ""
    adjusted_p: float | None = None
    verdict: Verdict | None = None
    """None: the comparison has no hypothesis, or no interval."""


def analyse(question: Question, results: Results, seeds: Sequence[int]) -> list[Outcome]:
    """Effect of each comparison, with Holm's correction over the comparisons of the question that have a hypothesis."""
    outcomes = []
    for comparison in question.comparisons:
        try:
            outcomes.append(Outcome(comparison, paired_effect(differences(comparison, results, seeds))))
        except UserError as error:
            outcomes.append(Outcome(comparison, None, str(error)))
    tested = [outcome for outcome in outcomes if outcome.effect and outcome.comparison.expected]
    adjusted = holm([outcome.effect.p for outcome in tested if outcome.effect])
    for outcome, p in zip(tested, adjusted, strict=True):
        comparison = outcome.comparison
        assert outcome.effect is not None and comparison.expected is not None
        outcome.adjusted_p = p
        outcome.verdict = verdict(outcome.effect, p, comparison.expected, comparison.metric.minimal)
    return outcomes


def question_verdict(outcomes: Sequence[Outcome]) -> str | None:
    """The verdict of all primary comparisons if it is the same; else the verdicts with their counts. None without a hypothesis."""
    primary = [outcome.verdict or "undecided" for outcome in outcomes if outcome.comparison.primary]
    counts = Counter(primary)
    if len(counts) > 1:
        return ", ".join(f"{name} ({count} of {len(primary)})" for name, count in counts.most_common())
    return primary[0] if primary else None


def differences(comparison: Comparison, results: Results, seeds: Sequence[int]) -> np.ndarray:
    """Differences `[seeds, videos]` in printed units; NaN where a metric is undefined.

    Only seeds of which all cells are finished are included.

    Raises:
        UserError: there is no such seed; the metric is 0 in every video, such as joints that are found nowhere.
    """
    rows: list[dict[str, float]] = []
    is_zero = True
    for seed in seeds:
        pairs = [
            [video_values(condition, comparison.metric, results, seed) for condition in pair]
            for pair in comparison.pairs
        ]
        if all(values is not None for pair in pairs for values in pair):
            rows.append(_mean_difference(pairs))
            is_zero &= not any(
                value for pair in pairs for values in pair for value in (values or {}).values()
            )
    if not rows:
        raise UserError(
            f"{comparison.label}: no seed with all cells finished; fix the failed cells and rerun the command"
        )
    if is_zero:
        raise UserError(
            f"{comparison.label}: 0 in all videos of both conditions, which decides nothing; use easier videos"
        )
    videos = sorted({video for row in rows for video in row})
    return np.array([[row.get(video, np.nan) for video in videos] for row in rows])


def _mean_difference(pairs: Sequence[Sequence[Mapping[str, float] | None]]) -> dict[str, float]:
    """Difference of each video, averaged over the pairs in which it is defined."""
    found: dict[str, list[float]] = {}
    for first, second in pairs:
        assert first is not None and second is not None
        for video in first.keys() & second.keys():
            found.setdefault(video, []).append(first[video] - second[video])
    return {
        video: float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
        for video, values in found.items()
    }


def video_values(
    condition: Condition, metric: Metric, results: Results, seed: int
) -> dict[str, float] | None:
    """The metric of each video in printed units, NaN where undefined; None if the cell is not finished."""
    result = results.get(evaluation_name(condition, seed))
    if result is None:
        return None
    found = {video: row.get(metric.key) for video, row in result["videos"].items()}
    return {video: float("nan") if value is None else value * metric.factor for video, value in found.items()}


def mean_value(condition: Condition, metric: Metric, results: Results, seed: int) -> float | None:
    """Mean over the videos in printed units; None if the cell is not finished, or the metric is undefined."""
    values = video_values(condition, metric, results, seed)
    defined = [value for value in (values or {}).values() if not np.isnan(value)]
    return float(np.mean(defined)) if defined else None
