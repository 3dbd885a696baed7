"""Plots and image strips of the study's report."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.study.analysis import Outcome, Results, mean_value
from pipelines.study.cells import CELLS, evaluation_name
from pipelines.study.questions import Condition, Curve, Question
from pipelines.study.statistics import Verdict
from tcan.atomic_write import atomic_write
from tcan.video import read_video

COLOURS: dict[Verdict | None, str] = {
    "supported": "tab:green",
    "contradicted": "tab:red",
    "negligible": "tab:olive",
    "undecided": "tab:gray",
    None: "tab:blue",  # no hypothesis
}
STRIP_TIMES = 6
DPI = 110
WEBP_QUALITY = 80


def plot_effects(outcomes: Sequence[Outcome], path: Path) -> bool:
    """Write one row per comparison: mean and interval. False if no comparison has an interval."""
    shown = [outcome for outcome in outcomes if outcome.effect is not None]
    if not shown:
        return False
    figure = Figure(figsize=(8, 0.55 + 0.62 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), squeeze=False)[:, 0]
    for ax, outcome in zip(axes, shown, strict=True):
        effect, comparison = outcome.effect, outcome.comparison
        assert effect is not None
        errors = [[effect.mean - effect.low], [effect.high - effect.mean]]
        ax.errorbar([effect.mean], [0], xerr=errors, fmt="o", capsize=4, color=COLOURS[outcome.verdict])
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_yticks([0], [comparison.label], fontweight="bold" if comparison.primary else "normal")
        ax.set_ylim(-1, 1)
        extent = 1.1 * max(abs(effect.low), abs(effect.high)) or 1.0
        ax.set_xlim(-extent, extent)
        ax.tick_params(axis="x", labelsize=7)
        ax.xaxis.get_offset_text().set_fontsize(6)
        ax.set_title(f"{comparison.metric.label} ({comparison.metric.unit or '1'})", fontsize=7, loc="right", pad=2)  # fmt: skip
        ax.spines[["top", "right", "left"]].set_visible(False)
    _save(figure, path)
    return True


def plot_curves(question: Question, results: Results, seeds: Sequence[int], path: Path) -> bool:
    """Write one plot per curve: the mean over videos and seeds, and a point per seed. False if there is none."""
    if not question.curves:
        return False
    columns = min(4, len(question.curves))
    rows = -(-len(question.curves) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, curve in zip(axes, question.curves, strict=False):
        _draw_curve(ax, curve, results, seeds)
    for ax in axes[len(question.curves) :]:
        ax.set_visible(False)
    _save(figure, path)
    return True


def _draw_curve(ax: Axes, curve: Curve, results: Results, seeds: Sequence[int]) -> None:
    for number, (label, points) in enumerate(curve.series.items()):
        x, y = [], []
        for quantity, condition in points:
            values = [mean_value(condition, curve.metric, results, seed) for seed in seeds]
            defined = [value for value in values if value is not None]
            ax.plot([quantity] * len(defined), defined, ".", color=f"C{number}", alpha=0.5)
            if defined:
                x.append(quantity)
                y.append(np.mean(defined))
        ax.plot(x, y, "-", color=f"C{number}", label=label)
    ax.set_title(curve.title, fontsize=9)
    ax.set_xlabel(curve.quantity, fontsize=8)
    unit = f" ({curve.metric.unit})" if curve.metric.unit else ""
    ax.set_ylabel(curve.metric.label.split(" of the ")[0] + unit, fontsize=7)
    ax.tick_params(labelsize=7)
    if len(curve.series) > 1:
        ax.legend(fontsize=7)


def plot_strip(conditions: Sequence[Condition], out: Path, seed: int, path: Path) -> bool:
    """Write frames of the first held-out video: the truth and the driving poses, then a row for each condition.

    Returns:
        False if no condition is evaluated.
    """
    rows: list[tuple[str, np.ndarray]] = []
    previous: Condition | None = None
    for condition in conditions:
        found = sorted((out / CELLS / evaluation_name(condition, seed) / "videos").glob("000-*.mp4"))
        if not found:
            continue
        reference, pose, truth, result = np.split(read_video(found[0])[0], 4, axis=2)
        blank = np.full_like(reference, 255)
        if previous is None or condition.videos != previous.videos:
            rows.append((f"truth ({condition.videos})", _strip_frames(reference, truth)))
        if previous is None or _driving(condition) != _driving(previous):
            rows.append(("driving poses", _strip_frames(blank, pose)))
        rows.append((condition.name, _strip_frames(blank, result)))
        previous = condition
    if not rows:
        return False
    height, width = rows[0][1].shape[:2]
    figure = Figure(figsize=(9, 0.25 + 7.4 * height / width * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), squeeze=False)[:, 0]
    for ax, (name, image) in zip(axes, rows, strict=True):
        ax.imshow(image, interpolation="lanczos")
        ax.set_anchor("E")  # the labels are at the left
        ax.set_xticks([])
        ax.set_yticks([height / 2], ["\n".join(wrap(name, 20))])
        ax.tick_params(labelsize=7, length=0)
        ax.spines[:].set_visible(False)
    _save(figure, path)
    return True


def _strip_frames(reference: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """One row `[H, W, 3]`: the first frame of `reference`, then `frames` at `STRIP_TIMES` times."""
    times = np.linspace(0, len(frames) - 1, STRIP_TIMES + 1).round().astype(int)[1:]
    return np.concatenate([reference[0], *frames[times]], axis=1)


def _driving(condition: Condition) -> tuple[object, object]:
    """What determines the driving poses of a condition."""
    return condition.videos, condition.options.get("pose_errors")


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as partial:
        if path.suffix == ".webp":
            figure.savefig(partial, dpi=DPI, pil_kwargs={"quality": WEBP_QUALITY})
        else:  # without metadata, equal results give equal files
            figure.savefig(partial, dpi=DPI, metadata={"Software": None})
