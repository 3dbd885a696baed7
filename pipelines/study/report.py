"""The report of the study: report.md, report.html, report.json and figures."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import tracking
from pipelines.config import Config
from pipelines.mlflow_store import connect, experiment_id, masked
from pipelines.study.analysis import Outcome, Results, analyse, mean_value, question_verdict
from pipelines.study.cells import Cell, evaluation_name, read_result
from pipelines.study.document import Block, Heading, Image, Paragraph, Table, to_html, to_markdown
from pipelines.study.plots import plot_curves, plot_effects, plot_strip
from pipelines.study.questions import Question
from tcan.atomic_write import atomic_write
from tcan.errors import UserError

LOCAL_PAGE = "http://127.0.0.1:5000"
"""Address of `tcan ui`, for stores without a server."""
Link = Callable[[str, str], str]


def write_report(
    out: Path,
    questions: Sequence[Question],
    seeds: Sequence[int],
    cells: Mapping[str, Cell],
    failed: Mapping[str, str],
    run_id: str,
    config: Config,
) -> dict[str, Any]:
    """Write the report of all finished cells; equal results give equal files.

    Args:
        failed: reason of each failure by the name of the cell.
        run_id: of the study.

    Returns:
        the contents of report.json.
    """
    results = {name: result for name, cell in cells.items() if (result := read_result(cell, out)) is not None}
    outcomes = {question.name: analyse(question, results, seeds) for question in questions}
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    link = _linker(config)
    missing = [name for name in cells if name not in results and name not in failed]
    blocks = [*_introduction(questions, outcomes, seeds, run_id, link, config), *_incomplete(failed, missing)]
    for question in questions:
        blocks += _question(question, outcomes[question.name], results, seeds, out, link)
    contents = {
        "schema_version": 1,
        "mlflow_run_id": run_id,
        "seeds": list(seeds),
        "failed": dict(failed),
        "missing": missing,
        "questions": [_json(question, outcomes[question.name], results, seeds) for question in questions],
    }
    for name, text in (
        ("report.md", to_markdown(blocks)),
        ("report.html", to_html(blocks, out)),
        ("report.json", json.dumps(contents, indent=2) + "\n"),
    ):
        with atomic_write(out / name) as partial:
            partial.write_text(text)
    return contents


def _linker(config: Config) -> Link:
    """A function from a text and a run id to a link to the page of the run; to the text alone if MLflow is not available."""
    store = tracking.resolve(config.tracking)
    try:
        experiment = experiment_id(connect(store), store)
    except UserError:
        return lambda text, run: text
    is_server = (store.uri or "").startswith("http")
    page = masked(store.uri or "").rstrip("/") if is_server else LOCAL_PAGE
    return lambda text, run: f"[{text}]({page}/#/experiments/{experiment}/runs/{run})"


def _introduction(
    questions: Sequence[Question],
    outcomes: Mapping[str, Sequence[Outcome]],
    seeds: Sequence[int],
    run_id: str,
    link: Link,
    config: Config,
) -> list[Block]:
    study, train = config.study, config.train
    errors = {"dropout": train.pose_dropout, "jitter": train.pose_jitter, "outliers": train.pose_outliers}
    trained_with = ", ".join(f"{name} {value:g}" for name, value in errors.items() if value) or "none"
    verdicts = [
        (question.title, question_verdict(outcomes[question.name]) or "no hypothesis")
        for question in questions
    ]
    blocks: list[Block] = [
        Heading(1, "Ablation study in the puppet world"),
        Paragraph(
            f"Training seeds: {len(seeds)}. {study.held_out_videos} held-out videos of each distribution with {study.frames} "
            f"frames, {study.train_videos} training videos. Stage 1: {train.stage1.steps} steps of {train.stage1.batch_size} "
            f"images; stage 2: {train.stage2.steps} steps of {train.stage2.batch_size} clips of "
            f"{train.clip_frames} frames, pose errors in training: {trained_with}. {study.steps} denoising steps. "
            f"All runs are nested in the MLflow {link('run of the study', run_id)}. Every number links to its run."
        ),
        Paragraph(
            "Links to a local store work while `tcan ui --tracking.folder OUT/mlflow` serves it, OUT being the folder of the "
            "study."
        ),
        Table(("question", "verdict"), verdicts),
        Paragraph(
            "An effect is the mean paired difference of two conditions over seeds and held-out videos. Its 95 % interval is the "
            "percentile interval of a bootstrap that resamples seeds and videos independently. p is two-sided and not below the "
            "smallest one of the sign test over the videos, with Holm's correction over the comparisons of a question that have a hypothesis. A hypothesis is supported or contradicted "
            "if the corrected p is below 0.05 and the interval excludes 0. Otherwise the effect is negligible if the interval lies "
            f"within the smallest difference that matters ({_minimal_effects(questions)}), which was chosen before the study ran; "
            "else the hypothesis is undecided. The verdict of a question is that of its primary comparisons (bold). With few seeds "
            "and videos, such intervals are too narrow."
        ),
    ]
    if len(seeds) == 1:
        blocks.append(
            Paragraph("With one seed, the intervals do not include the variation between trainings.")
        )
    return blocks


def _minimal_effects(questions: Sequence[Question]) -> str:
    metrics = dict.fromkeys(
        comparison.metric for question in questions for comparison in question.comparisons
    )
    return ", ".join(f"{metric.label}: {metric.minimal:g} {metric.unit}".rstrip() for metric in metrics)


def _incomplete(failed: Mapping[str, str], missing: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    if failed:
        blocks += [
            Heading(2, "Failed cells"),
            Paragraph("These cells failed, and are missing below. Rerun the command to run them again."),
            Table(("cell", "reason"), list(failed.items())),
        ]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        blocks += [Heading(2, "Cells that are not finished"), Paragraph(f"{len(missing)} cells: {names}.")]
    return blocks


def _question(
    question: Question,
    outcomes: Sequence[Outcome],
    results: Results,
    seeds: Sequence[int],
    out: Path,
    link: Link,
) -> list[Block]:
    blocks: list[Block] = [Heading(2, question.title), Paragraph(question.hypothesis)]
    if question.name == "cost":
        return [*blocks, *_cost(results, link)]
    blocks += [
        Paragraph(f"Verdict: {question_verdict(outcomes) or 'no hypothesis'}."),
        _effects(outcomes),
    ]
    files = {"effects": "effects.png", "curves": "curves.png", "strip": "strip.webp"}
    figures = {kind: Path("figures") / f"{question.name}-{file}" for kind, file in files.items()}
    if plot_effects(outcomes, out / figures["effects"]):
        blocks.append(Image(figures["effects"], "Effects with 95 % intervals"))
    if plot_curves(question, results, seeds, out / figures["curves"]):
        blocks.append(
            Image(figures["curves"], "Means over the videos: a point per seed, a line through their means")
        )
    if plot_strip(question.strip, out, seeds[0], out / figures["strip"]):
        blocks.append(
            Image(
                figures["strip"], f"Frames of the first held-out video, seed {seeds[0]}; left: the reference"
            )
        )
    return [*blocks, _means(question, results, seeds, link)]


def _effects(outcomes: Sequence[Outcome]) -> Table:
    rows = []
    for outcome in outcomes:
        comparison, effect = outcome.comparison, outcome.effect
        label = f"**{comparison.label}**" if comparison.primary else comparison.label
        expected = {1: "> 0", -1: "< 0", None: "-"}[comparison.expected]
        metric = comparison.metric.label + (f", {comparison.metric.unit}" if comparison.metric.unit else "")
        if effect is None:
            rows.append((label, metric, expected, outcome.note, "", "", "", "-"))
            continue
        p = "-" if outcome.adjusted_p is None else f"{outcome.adjusted_p:.4f}"
        interval = f"{effect.low:+.3g} to {effect.high:+.3g}"
        n = f"{effect.seeds} x {effect.videos}"
        rows.append((label, metric, expected, f"{effect.mean:+.3g}", interval, p, n, outcome.verdict or "-"))
    header = ("comparison", "metric", "expected", "effect", "95 % interval", "p (Holm)", "seeds x videos", "verdict")  # fmt: skip
    return Table(header, rows)


def _means(question: Question, results: Results, seeds: Sequence[int], link: Link) -> Table:
    """Mean of each metric in each condition, one number per seed, each with a link to its run."""
    metrics = list(dict.fromkeys(comparison.metric for comparison in question.comparisons))
    rows = []
    for condition in question.conditions().values():
        row = [condition.name]
        for metric in metrics:
            numbers = []
            for seed in seeds:
                value = mean_value(condition, metric, results, seed)
                if value is not None:
                    run = results[evaluation_name(condition, seed)]["mlflow_run_id"]
                    numbers.append(link(f"{value:.4g}", run))
            row.append(" ".join(numbers) or "-")
        rows.append(row)
    units = [f"{metric.label}{f', {metric.unit}' if metric.unit else ''}" for metric in metrics]
    return Table(("condition (one number per seed)", *units), rows)


def _cost(results: Results, link: Link) -> list[Block]:
    if "cost" not in results:
        return [Paragraph("Not available: the cell failed.")]
    values, run = results["cost"]["values"], results["cost"]["mlflow_run_id"]
    rows = []
    for label, key, factor, form in (
        ("operations of the ControlNet, 10^12", "controlnet_tflop", 1, ".2f"),
        ("operations of a guided denoising step, 10^12", "step_tflop", 1, ".2f"),
        ("parameters of the ControlNet, 10^6", "controlnet_parameters", 1e-6, ".1f"),
        ("CPU time of mini's ControlNet, ms", "mini_controlnet_seconds", 1000, ".0f"),
    ):
        off, on = values[f"{key}_off"], values[f"{key}_on"]
        numbers = (format(off * factor, form), format(on * factor, form), f"{100 * (on / off - 1):+.1f} %")
        rows.append((label, *(link(number, run) for number in numbers)))
    header = ("a window of 16 frames", "temporal layers off", "on", "difference")
    text = "Operations and parameters are those of SD1.5's networks at 512 x 512. Memory on a GPU is not available here."
    return [Table(header, rows), Paragraph(text)]


def _json(
    question: Question, outcomes: Sequence[Outcome], results: Results, seeds: Sequence[int]
) -> dict[str, Any]:
    return {
        "name": question.name,
        "title": question.title,
        "hypothesis": question.hypothesis,
        "verdict": question_verdict(outcomes),
        "comparisons": [
            {
                "label": outcome.comparison.label,
                "metric": outcome.comparison.metric.key,
                "unit": outcome.comparison.metric.unit,
                "expected": outcome.comparison.expected,
                "primary": outcome.comparison.primary,
                "effect": dataclasses.asdict(outcome.effect) if outcome.effect else None,
                "adjusted_p": outcome.adjusted_p,
                "verdict": outcome.verdict,
                "note": outcome.note,
                "runs": _runs(outcome, results, seeds),
            }
            for outcome in outcomes
        ],
        "values": results["cost"]["values"] if question.name == "cost" and "cost" in results else {},
    }


def _runs(outcome: Outcome, results: Results, seeds: Sequence[int]) -> list[str]:
    """MLflow runs of the evaluations behind an effect."""
    names = [
        evaluation_name(condition, seed)
        for pair in outcome.comparison.pairs
        for condition in pair
        for seed in seeds
    ]
    return [results[name]["mlflow_run_id"] for name in dict.fromkeys(names) if name in results]
