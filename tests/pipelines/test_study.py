"""`tcan study`: cells, effects, report; a complete study that is killed and resumed."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pytest
import torch
from matplotlib.colors import to_rgb
from mlflow import MlflowClient
from PIL import Image

from pipelines.config.parser import load_config
from pipelines.config.study import StudyConfig
from pipelines.demo import HELD_OUT_SEED
from pipelines.inference import driving_poses
from pipelines.puppets.world import sample_clip
from pipelines.study import cost
from pipelines.study.analysis import Outcome, analyse, question_verdict
from pipelines.study.cells import ControlNetCell, TrainingCell, cells_of, evaluation_name
from pipelines.study.document import Heading, Paragraph, Table, to_html, to_markdown
from pipelines.study.plots import COLOURS, plot_effects
from pipelines.study.pretraining import render_corpus
from pipelines.study.questions import (
    FLICKER,
    POSE,
    PSNR,
    STAGE1,
    Comparison,
    Condition,
    Question,
    questions,
)
from pipelines.study.run import _settings, study
from pipelines.study.statistics import Verdict, paired_effect
from tcan.errors import UserError
from tcan.model import TCAN
from tcan.pixels import to_controlnet_input
from tcan.pose.draw import draw_poses
from tcan.weights import load_pretrained

BASE = Condition("stage1-dance", STAGE1)
FEWER = Condition("stage1-dance-steps-1", STAGE1, options={"steps": 1})
BROKEN = Condition(
    "stage1-dance-broken", STAGE1, options={"window": 64}
)  # the motion modules have 32 positions
QUESTION = Question(
    "test",
    "A test question",
    "A hypothesis.",
    (
        Comparison("two steps", PSNR, ((BASE, FEWER),), 1, primary=True),
        Comparison("against the failed cell", FLICKER, ((BASE, BROKEN),), 1),
    ),
    strip=(BASE, FEWER),
)
SETTINGS = {
    "study.train_videos": 3,
    "study.train_frames": 16,
    "study.held_out_videos": 3,
    "study.frames": 3,
    "study.steps": 2,
    "train.workers": 1,
    "train.stage1.steps": 3,
    "train.stage1.batch_size": 2,
    "train.stage1.micro_batch": 2,
    "train.stage1.checkpoint_every": 1,
    "train.stage1.sample_every": 0,
    "train.stage1.validate_every": 0,
}
CONFIG = load_config(*(word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))))


def run_here(out: Path) -> dict[str, Any]:
    return study(out, [QUESTION], 1, CONFIG)


def results_with(key: str, *values: tuple[Condition, np.ndarray]) -> dict[str, Any]:
    """Results of evaluation cells: values of a metric, `[seeds, videos]` for each condition."""
    return {
        evaluation_name(condition, seed): {
            "mlflow_run_id": "0" * 32,
            "videos": {f"{video}.mp4": {key: float(value)} for video, value in enumerate(row)},
        }
        for condition, rows in values
        for seed, row in enumerate(rows)
    }


def test_questions_share_trainings_and_evaluations() -> None:
    names = ["appa", "temporal_controlnet", "ptm", "controlnet", "sampling"]
    cells = cells_of(questions(names, 1), [0, 1])
    trainings = [cell for cell in cells.values() if isinstance(cell, TrainingCell)]
    assert [cell.name for cell in trainings if cell.seed == 1] == [
        "stage1-seed1", "stage1-no-appa-seed1", "stage2-seed1", "stage2-no-temporal-controlnet-seed1",
        "stage1-finetuned-controlnet-seed1", "stage1-weak-seed1", "stage1-weak-finetuned-seed1",
    ]  # fmt: skip
    position = {name: index for index, name in enumerate(cells)}
    assert all(position[needed] < position[cell.name] for cell in cells.values() for needed in cell.needs)
    assert not any(cell.seed == 1 for cell in list(cells.values())[: len(cells) // 2])
    separate = sum(len(cells_of(questions([name], 1), [0, 1])) for name in names)
    assert len(cells) < separate


def test_networks_that_the_study_trains_are_shared_by_all_seeds_and_precede_what_needs_them() -> None:
    cells = cells_of(questions(["controlnet", "detectors"], 1), [0, 1])
    needs = {name: set(cell.needs) for name, cell in cells.items()}
    assert needs["controlnet-weak"] == needs["controlnet-body-map"] == {"corpus"}
    assert needs["controlnet-coordinates"] == {"corpus", "coordinates"}
    for seed in (0, 1):
        assert needs[f"stage1-coordinates-seed{seed}"] == {"controlnet-coordinates", "dataset-coordinates"}
        assert (
            needs[f"stage1-weak-seed{seed}"]
            == needs[f"stage1-weak-finetuned-seed{seed}"]
            == {"controlnet-weak"}
        )
    names = list(cells)
    assert all(names.index(needed) < names.index(name) for name in names for needed in needs[name])
    assert sum(isinstance(cell, ControlNetCell) for cell in cells.values()) == 4


def test_networks_are_trained_only_for_the_preset_mini(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are trained for mini; use --config mini, or other --questions"):
        render_corpus(tmp_path, load_config("--config", "sd15"))
    assert not list(tmp_path.iterdir())


def test_every_kind_of_pose_errors_has_the_requested_number_of_sizes() -> None:
    (question,) = questions(["temporal_controlnet"], 4)
    kinds = [condition.options.get("pose_errors") for condition in question.conditions().values()]
    for kind in ("missing", "jitter", "outliers", "swaps", "frozen", "burst", "offset"):
        errors = {(error.share, error.size) for error in kinds if error and error.kind == kind}
        assert len(errors) == 4
    pooled = question.comparisons[0]
    assert pooled.primary and len(pooled.pairs) == 6 * 4  # all kinds but the systematic one


def test_videos_of_an_evaluation_have_independent_pose_errors() -> None:
    config = load_config("--animate.pose_errors.kind", "outliers", "--animate.pose_errors.share", "0.3")
    poses = np.random.default_rng(0).uniform(1, 127, (20, 18, 3)).astype(np.float32)
    wrong = [(driving_poses(poses, 128, config, video) != poses).any(axis=(1, 2)) for video in range(9)]
    assert [frames.sum() for frames in wrong] == [6] * 9
    assert len({tuple(np.flatnonzero(frames)) for frames in wrong}) == 9
    again = driving_poses(poses, 128, config, 0)
    assert np.array_equal(again, driving_poses(poses, 128, config))


def test_effects_are_paired_by_video_and_seed_and_decided_with_holms_correction() -> None:
    rng = np.random.default_rng(0)
    videos = rng.normal(50, 20, (3, 8)) / 100  # far larger than the effect
    other = Condition("other", STAGE1)
    question = dataclasses.replace(
        QUESTION,
        comparisons=(
            Comparison("better", POSE, ((FEWER, BASE),), 1, primary=True),
            Comparison("wrong sign", POSE, ((BASE, FEWER),), 1),
            Comparison("equal", POSE, ((other, BASE),), 1),
            Comparison("mean of two pairs", POSE, ((FEWER, BASE), (other, BASE))),
        ),
    )
    effect = 0.02 + rng.normal(0, 0.003, (3, 8))
    results = results_with(POSE.key, (BASE, videos), (FEWER, videos + effect), (other, videos))
    outcomes = analyse(question, results, [0, 1, 2])
    better, _, equal, pooled = outcomes
    assert better.effect is not None and pooled.effect is not None
    assert better.effect.mean == pytest.approx(100 * effect.mean()) and better.effect.seeds == 3
    assert pooled.effect.mean == pytest.approx(50 * effect.mean())
    assert [outcome.verdict for outcome in outcomes] == ["supported", "contradicted", "negligible", None]
    assert better.adjusted_p == pytest.approx(3 * better.effect.p)  # the smallest of three
    assert question_verdict(outcomes) == "supported"
    for outcome in (better, equal):
        outcome.comparison = dataclasses.replace(outcome.comparison, primary=True)
    assert question_verdict(outcomes) == "supported (1 of 2), negligible (1 of 2)"
    assert equal.adjusted_p == 1


def test_seeds_with_failed_cells_and_undefined_metrics_are_ignored() -> None:
    values = np.arange(8.0).reshape(2, 4)
    results = results_with(PSNR.key, (BASE, values), (FEWER, values + np.array([[1], [2]])))
    del results[evaluation_name(FEWER, 1)]
    question = dataclasses.replace(QUESTION, comparisons=(Comparison("a", PSNR, ((FEWER, BASE),), 1, True),))
    (outcome,) = analyse(question, results, [0, 1])
    assert outcome.effect is not None and (outcome.effect.mean, outcome.effect.seeds) == (1, 1)
    results[evaluation_name(FEWER, 0)]["videos"]["0.mp4"][PSNR.key] = None
    results[evaluation_name(BASE, 0)]["videos"].pop("1.mp4")
    (outcome,) = analyse(question, results, [0, 1])
    assert outcome.effect is None and "requires at least 3" in outcome.note
    assert question_verdict([outcome]) == "undecided"
    (outcome,) = analyse(question, {}, [0, 1])
    assert "no seed with all cells finished" in outcome.note


def test_comparison_without_any_found_joint_decides_nothing() -> None:
    question = dataclasses.replace(QUESTION, comparisons=(Comparison("a", POSE, ((FEWER, BASE),), 1, True),))
    nothing, one = np.zeros((1, 4)), np.array([[0.0, 0.1, 0.0, 0.0]])
    (outcome,) = analyse(question, results_with(POSE.key, (BASE, nothing), (FEWER, nothing)), [0])
    assert outcome.effect is None and "0 in all videos of both conditions" in outcome.note
    (outcome,) = analyse(question, results_with(POSE.key, (BASE, nothing), (FEWER, one)), [0])
    assert outcome.effect is not None


def test_document_has_the_same_contents_as_markdown_and_html(tmp_path: Path) -> None:
    link = "[1.5](http://h/#/runs/0)"
    blocks = [Heading(1, "T & U"), Paragraph("a `b` **c**"), Table(("x", "y"), [("1 | 2", link)])]
    assert (
        to_markdown(blocks) == f"# T & U\n\na `b` **c**\n\n| x | y |\n| --- | --- |\n| 1 \\| 2 | {link} |\n"
    )
    page = to_html(blocks, tmp_path)
    assert "<h1>T &amp; U</h1>" in page and "<p>a <code>b</code> <b>c</b></p>" in page
    assert '<td>1 | 2</td><td><a href="http://h/#/runs/0">1.5</a></td>' in page


def test_counted_operations_of_the_temporal_layers_equal_the_formula() -> None:
    """Per location, a motion module with C channels has 22 C^2 F products in linear layers and 4 F^2 C in attention.

    Mini's ControlNet has one each at the down factors 4 and 8.
    """
    frames, channels = cost.FRAMES, 128
    products = (4**2 + 2**2) * (22 * channels**2 * frames + 4 * frames**2 * channels)
    on, off = (cost.controlnet_operations(cost.fake_model("mini", value), 128) for value in (True, False))
    assert on - off == 2 * products


def test_levels_with_temporal_layers_have_few_percent_of_the_effect_of_the_pose_in_mini() -> None:
    """docs/study.md: why mini cannot decide whether the temporal ControlNet corrects poses."""
    parts = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")
    mini = load_pretrained(**dict.fromkeys(parts, "mini"))
    tcan = TCAN(mini.unet, mini.controlnet, mini.motion_adapter, mini.empty_prompt)
    clip = sample_clip("dance", HELD_OUT_SEED, 4, 128)
    drawn = torch.from_numpy(draw_poses(clip.keypoints, 128, 128, 2))[None]
    noisy = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    for timestep in (torch.tensor([400]), torch.tensor([800])):
        with torch.no_grad():
            down, middle = tcan.pose_residuals(noisy, timestep, to_controlnet_input(drawn))
            shallow = [residual * (residual.shape[-1] > 4) for residual in down]
            complete, partial, without = (
                tcan.denoise(noisy, timestep, residuals, None)
                for residuals in ((down, middle), (shallow, 0 * middle), None)
            )
        share = (complete - partial).norm() / (complete - without).norm()
        assert 0.01 < share < 0.1


def test_too_few_videos_for_an_interval_raise_user_error() -> None:
    with pytest.raises(UserError, match=r"study\.held_out_videos = 2: must be at least 3"):
        StudyConfig(held_out_videos=2)
    with pytest.raises(UserError, match="--seeds 0: must be at least 1"):
        study(Path("unused"), [], 0, CONFIG)


def test_effects_of_every_verdict_are_plotted(tmp_path: Path) -> None:
    comparison = QUESTION.comparisons[0]
    effect = paired_effect(np.random.default_rng(0).normal(1, 0.1, (2, 5)))
    outcomes = [Outcome(comparison, effect, verdict=verdict) for verdict in (*get_args(Verdict), None)]
    assert plot_effects(outcomes, tmp_path / "effects.png")
    image = np.asarray(Image.open(tmp_path / "effects.png").convert("RGB")).reshape(-1, 3)
    for verdict in (*get_args(Verdict), None):
        colour = np.round(255 * np.array(to_rgb(COLOURS[verdict])))
        assert (abs(image - colour).max(axis=1) <= 1).any()


def test_report_only_requires_a_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study; run the command without --report_only"):
        study(tmp_path, [QUESTION], 1, CONFIG, report_only=True)
    assert not list(tmp_path.iterdir())


def test_study_of_another_configuration_is_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG, study=dataclasses.replace(CONFIG.study, steps=5))
    state = {"schema_version": 1, "mlflow_run_id": None, "settings": {"study.steps": 5}}
    (tmp_path / "study.json").write_text(json.dumps({**state, "settings": _settings(other)}))
    with pytest.raises(UserError, match=r"started with study\.steps = 5, not 2; set the same value"):
        run_here(tmp_path)
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(UserError, match="not a file of tcan study"):
        run_here(tmp_path)
    assert not (tmp_path / "videos").exists()


@pytest.mark.slow
def test_killed_study_resumes_and_a_failed_cell_does_not_stop_the_others(
    ray_cluster: None, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    started = psutil.Popen([sys.executable, __file__, str(out)], env=environment, stdout=subprocess.DEVNULL)
    training = out / "cells" / "stage1-seed0" / "stage1"
    while started.poll() is None and not list(training.glob("step_*")):
        time.sleep(0.1)
    processes = [started, *started.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, 20)
    assert not (training.parent / "cell.json").exists()  # it was killed during the training
    report = study(out, [QUESTION], 1, CONFIG, report_only=True)
    assert len(report["missing"]) == 4 and not report["failed"]
    assert "4 cells: `stage1-seed0`" in (out / "report.md").read_text()

    with pytest.raises(UserError, match=r"1 of 4 cells failed, such as stage1-dance-broken-seed0 .*window"):
        run_here(out)
    report = json.loads((out / "report.json").read_text())
    assert not report["missing"] and list(report["failed"]) == ["stage1-dance-broken-seed0"]
    decided, failed = report["questions"][0]["comparisons"]
    assert decided["effect"]["videos"] == 3 and decided["verdict"] in (
        "supported",
        "contradicted",
        "negligible",
        "undecided",
    )
    assert failed["effect"] is None and "no seed with all cells finished" in failed["note"]
    text = (out / "report.md").read_text()
    assert "stage1-dance-broken-seed0" in text and "figures/test-effects.png" in text
    assert "PSNR, dB" in (out / "logs" / "stage1-dance-seed0.txt").read_text()
    html = (out / "report.html").read_text()
    assert html.count("data:image/png") == html.count("data:image/webp") == 1  # effects, strip

    client = MlflowClient(f"sqlite:///{out}/mlflow/mlflow.db")
    parent = report["mlflow_run_id"]
    nested = client.search_runs(
        [client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    by_id = {run.info.run_id: run.data.tags["tcan.kind"] for run in nested}
    assert {"preprocess", "stage1", "evaluate"} == set(by_id.values())
    assert {by_id[run] for run in decided["runs"]} == {"evaluate"}

    # The evaluation of a cell again gives the same report, and finished cells are not run again.
    finished = out / "cells" / "stage1-dance-seed0" / "cell.json"
    again = out / "cells" / "stage1-dance-steps-1-seed0" / "cell.json"
    before = finished.stat().st_mtime_ns
    again.unlink()
    with pytest.raises(UserError, match="1 of 4 cells failed"):
        run_here(out)
    assert finished.stat().st_mtime_ns == before and again.exists()
    anonymous = [re.sub(r"[0-9a-f]{32}", "ID", value) for value in (text, (out / "report.md").read_text())]
    assert anonymous[0] == anonymous[1]


if __name__ == "__main__":  # the process that the test kills
    run_here(Path(sys.argv[1]))
