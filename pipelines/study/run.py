"""`tcan study`: ablations of TCAN in the puppet world, with statistics.

    OUT/study.json           configuration, and the id of the MLflow run
    OUT/videos/ OUT/dataset/ rendered puppets, clip dataset
    OUT/cells/               one folder per training and per evaluation (`pipelines.study.cells`)
    OUT/logs/                what each evaluation and each training job prints
    OUT/report.md .html .json
    OUT/figures/             plots and image strips
    OUT/mlflow/              the MLflow runs, nested in the run of the study

Rerunning the command runs the missing and the failed cells, then writes the report.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from pipelines import storage, tracking
from pipelines.cluster import connect
from pipelines.config import Config
from pipelines.dataset import INFO_FILE
from pipelines.demo import HELD_OUT_SEED, render
from pipelines.lock import locked
from pipelines.mlflow_store import nested
from pipelines.preprocess.job import preprocess
from pipelines.study.cells import (
    Cell,
    DatasetCell,
    TrainingCell,
    cells_of,
    read_result,
    run_cell,
    video_folder,
)
from pipelines.study.questions import LONG_FRAMES, LONG_VIDEOS, Condition, Question
from pipelines.study.report import write_report
from pipelines.train.run_file import RESUME_MAY_CHANGE, STAGE_RESUME_MAY_CHANGE
from tcan.atomic_write import atomic_write
from tcan.errors import UserError, first_line

STUDY_FILE = "study.json"
ANIMATE_MAY_CHANGE = {"workers", "device", "offload", "decode_batch", "compile"}


def study(
    out: str | Path, questions: list[Question], seeds: int, config: Config, report_only: bool = False
) -> dict[str, Any]:
    """Run all missing cells of the questions, side by side as far as the cluster has room, and write the report.

    A cell that fails does not stop the others; the report names it.

    Args:
        out: a local folder, or one that all machines of the cluster share.
        seeds: number of trainings of each model, with the seeds from `config.seed` on.
        report_only: write the report of the finished cells, and run none.

    Returns:
        the contents of report.json.

    Raises:
        UserError: OUT is a study of another configuration, or not a study if `report_only`; the videos cannot be preprocessed;
            cells failed, raised after the report is written.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be at least 1; set e.g. 3")
    if storage.is_remote(out):
        raise UserError(
            f"--out {out}: a bucket; pass a local folder, or one that all machines of the cluster share"
        )
    out = Path(out).absolute()
    if report_only and not (out / STUDY_FILE).exists():
        raise UserError(f"{out}: no study; run the command without --report_only first")
    store = dataclasses.replace(config.tracking, folder=str(out / "mlflow"))
    config = dataclasses.replace(config, tracking=tracking.resolve(store))
    used_seeds = range(config.seed, config.seed + seeds)
    cells = cells_of(questions, used_seeds)
    with locked(out, "study"):
        state = _read_state(out, _settings(config))
        tracking.check(config.tracking)
        params = dataclasses.asdict(config) | {"questions": [question.name for question in questions]}
        with tracking.run(
            "study", f"study {out.name}", config.tracking, params, out, run_id=state["mlflow_run_id"]
        ) as run:
            _write_state(out, {**state, "mlflow_run_id": run.id})
            failed: dict[str, str] = {}
            if not report_only:
                conditions = [c for question in questions for c in question.conditions().values()]
                _prepare(out, conditions, config, run.id)
                failed = _run_missing(cells, out, config, run.id)
            report = write_report(out, questions, used_seeds, cells, failed, run.id, config)
            _log(run, out, report)
    print(f"report: {out / 'report.md'}, {out / 'report.html'}", flush=True)
    if failed:
        name, reason = next(iter(failed.items()))
        raise UserError(
            f"{out}: {len(failed)} of {len(cells)} cells failed, such as {name} ({reason}); fix the causes and rerun the "
            "command"
        )
    return report


def _settings(config: Config) -> dict[str, Any]:
    """All settings that determine the results of the cells, as flat keys."""
    values = dataclasses.asdict(config)
    del values["tracking"]
    del values["study"]["pose_error_sizes"]  # selects cells
    for key in RESUME_MAY_CHANGE:
        del values["train"][key]
    for stage in ("stage1", "stage2"):
        for key in STAGE_RESUME_MAY_CHANGE - {"steps"}:
            del values["train"][stage][key]
    for key in ANIMATE_MAY_CHANGE:
        del values["animate"][key]
    return _flat(values)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _read_state(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Contents of study.json, after a comparison of the settings."""
    path = out / STUDY_FILE
    if not path.exists():
        return {"schema_version": 1, "mlflow_run_id": None, "settings": settings}
    try:
        state = json.loads(path.read_text())
        started, run_id = dict(state["settings"]), state["mlflow_run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: cannot be read, or is not a file of tcan study; restore it or use another OUT"
        ) from None
    for key, value in settings.items():
        if started.get(key) != value:
            raise UserError(
                f"{out}: this study was started with {key} = {started.get(key)}, not {value}; set the same value, or use "
                "another OUT"
            )
    return {**state, "mlflow_run_id": run_id}


def _write_state(out: Path, state: dict[str, Any]) -> None:
    with atomic_write(out / STUDY_FILE) as partial:
        partial.write_text(json.dumps(state, indent=2) + "\n")


def _prepare(out: Path, conditions: Iterable[Condition], config: Config, run_id: str) -> None:
    """Render the videos and preprocess those for training, as far as they are missing."""
    options, size = config.study, config.size
    render(out / "videos" / "train", "dance", 0, options.train_videos, options.train_frames, size)
    for folder, condition in {video_folder(out, c): c for c in conditions}.items():
        count = (LONG_VIDEOS, LONG_FRAMES) if condition.is_long else (options.held_out_videos, options.frames)
        render(folder, condition.videos, HELD_OUT_SEED, *count, size)
    if not (out / "dataset" / INFO_FILE).exists():
        with nested(run_id):
            preprocess(str(out / "videos" / "train"), str(out / "dataset"), config)


def _run_missing(cells: dict[str, Cell], out: Path, config: Config, run_id: str) -> dict[str, str]:
    """Run the cells without a result; returns the reason of each failure by the name of the cell."""
    finished = {name for name, cell in cells.items() if read_result(cell, out) is not None}
    waiting = {name: cell for name, cell in cells.items() if name not in finished}
    print(f"{out}: {len(cells)} cells, {len(finished)} already finished", flush=True)
    failed: dict[str, str] = {}
    if not waiting:
        return failed
    connect()
    running: dict[Any, Cell] = {}
    while waiting or running:
        for name, needed in [(name, set(cell.needs) & failed.keys()) for name, cell in waiting.items()]:
            if needed:
                del waiting[name]
                failed[name] = f"{min(needed)} failed"
        while (ready := _next(waiting, finished, running, config)) is not None:
            del waiting[ready.name]
            print(f"{ready.name}: started", flush=True)
            running[_start(ready, out, config, run_id)] = ready
        if not running:
            continue
        (task,), _ = ray.wait(list(running))
        cell = running.pop(task)
        try:
            error = ray.get(task)
        except RayError as death:  # of the worker
            error = f"the worker died, possibly out of memory ({first_line(death)})"
        if error:
            failed[cell.name] = error
        else:
            finished.add(cell.name)
        left = len(waiting) + len(running)
        print(f"{cell.name}: {f'failed: {error}' if error else 'finished'}; {left} cells left", flush=True)
    return failed


def _next(
    waiting: dict[str, Cell], finished: set[str], running: dict[Any, Cell], config: Config
) -> Cell | None:
    """The first cell that can start now; None if it has to wait for room or for another cell.

    A cell never overtakes an earlier one that waits for room, so that large cells are not delayed by small ones.
    """
    unit = _unit()
    room = ray.cluster_resources().get(unit, 1) - sum(_size(cell, unit, config) for cell in running.values())
    for cell in waiting.values():
        if finished.issuperset(cell.needs):
            return cell if not running or _size(cell, unit, config) <= room else None
    return None


def _unit() -> str:
    return "GPU" if ray.cluster_resources().get("GPU") else "CPU"


def _size(cell: Cell, unit: str, config: Config) -> int:
    """Number of GPUs, or of CPU cores in a cluster without GPUs, that a cell occupies; preprocessing uses the entire cluster."""
    if isinstance(cell, DatasetCell):
        return int(ray.cluster_resources().get(unit, 1))
    if not isinstance(cell, TrainingCell):
        return 1
    train = config.train
    return train.workers * (train.gpus_per_worker if unit == "GPU" else train.cpus_per_worker)


def _start(cell: Cell, out: Path, config: Config, run_id: str) -> Any:
    """Start a Ray task. A job with workers reserves nothing itself, because these do."""
    has_workers = isinstance(cell, TrainingCell | DatasetCell)
    gpus = 1 if _unit() == "GPU" and not has_workers else 0
    task: Callable[..., Any] = ray.remote(num_cpus=0 if has_workers else 1, num_gpus=gpus, max_retries=0)(
        _run_in_task
    ).remote
    return task(cell, out, config, run_id)


def _run_in_task(cell: Cell, out: Path, config: Config, run_id: str) -> str | None:
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # Ray reserved one CPU; torch would use all of the machine
    log = out / "logs" / f"{cell.name}.txt"
    log.parent.mkdir(exist_ok=True)
    # Lines of cells that run side by side would be mixed.
    with open(log, "a") as file, redirect_stdout(file):
        return run_cell(cell, out, config, run_id)


def _log(run: tracking.Run, out: Path, report: dict[str, Any]) -> None:
    for question in report["questions"]:
        for index, row in enumerate(question["comparisons"]):
            if row["effect"] is not None:
                values = {key: row["effect"][key] for key in ("mean", "low", "high")}
                run.metrics({f"{question['name']}/{index:02}/{key}": value for key, value in values.items()})
    for name in ("report.md", "report.html", "report.json"):
        run.file(out / name)
    run.file(out / "figures", "figures")
