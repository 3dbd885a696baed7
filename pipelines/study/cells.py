"""Cells of the study: one training or one evaluation each, in a folder of its own.

    OUT/cells/cost/                          operations and times
    OUT/cells/stage1-seed0/                  OUT of `tcan train`
    OUT/cells/stage1-dance-seed0/            OUT of `tcan evaluate`

`cell.json` in the folder contains the result. It is written last: a cell is finished when the file exists.
"""

import csv
import dataclasses
import json
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.mlflow_store import nested
from pipelines.study.questions import Condition, Model, Question
from tcan.atomic_write import atomic_write
from tcan.errors import UserError, first_line

CELLS, CELL_FILE = "cells", "cell.json"


@dataclasses.dataclass(frozen=True)
class Cell(ABC):
    """A unit of work that is done once. `name` is its folder below OUT/cells."""

    name: str
    seed: int
    needs: str | None
    """Name of the cell whose result it requires."""

    def folder(self, out: Path) -> Path:
        return out / CELLS / self.name

    @abstractmethod
    def run(self, out: Path, config: Config) -> dict[str, Any]:
        """Do the work; returns the contents of `cell.json`.

        Raises:
            UserError: see the jobs.
        """


@dataclasses.dataclass(frozen=True)
class CostCell(Cell):
    def run(self, out: Path, config: Config) -> dict[str, Any]:
        from pipelines import tracking
        from pipelines.study.cost import cost

        folder = self.folder(out)
        with tracking.run("cost", "cost", config.tracking, {}, folder) as run:
            values = cost()
            run.metrics(values)
        return {"mlflow_run_id": run.id, "values": values}


@dataclasses.dataclass(frozen=True)
class TrainingCell(Cell):
    model: Model

    def run(self, out: Path, config: Config) -> dict[str, Any]:
        from pipelines.train.job import train
        from pipelines.train.run_file import read_run

        model, folder = self.model, self.folder(out)
        config = dataclasses.replace(
            config, seed=self.seed, train=dataclasses.replace(config.train, **model.options)
        )
        start = None if model.start is None else model_folder(out, model.start, self.seed)
        train(out / "dataset", folder, config, "1" if model.stage == 1 else "2", start)
        run = read_run(str(folder / f"stage{model.stage}"))
        assert run is not None
        return {"mlflow_run_id": run["mlflow_run_id"]}


@dataclasses.dataclass(frozen=True)
class EvaluationCell(Cell):
    condition: Condition

    def run(self, out: Path, config: Config) -> dict[str, Any]:
        from pipelines.evaluate import evaluate

        condition, study, folder = self.condition, config.study, self.folder(out)
        options = {"steps": study.steps, **condition.options}
        if "pose_errors" in options:
            options["pose_errors"] = dataclasses.replace(options["pose_errors"], seed=self.seed)
        config = dataclasses.replace(
            config,
            seed=self.seed,
            animate=dataclasses.replace(config.animate, **options),
            evaluate=dataclasses.replace(
                config.evaluate, frames=study.frames, videos=0, poses=condition.poses
            ),
        )
        model = model_folder(out, condition.model, self.seed)
        report = evaluate(out / "videos" / condition.videos, model, folder, config)
        return {"mlflow_run_id": report["mlflow_run_id"], "videos": read_videos(folder / "videos.csv")}


def model_folder(out: Path, model: Model, seed: int) -> Path:
    """Model folder that the training cell of this model writes."""
    folder = out / CELLS / _name(model.name, seed)
    return folder / "stage1" / "model" if model.stage == 1 else folder / "model"


def cells_of(questions: Iterable[Question], seeds: Iterable[int]) -> dict[str, Cell]:
    """All cells by name, each after the one that it needs. Questions share cells of the same name."""
    cells: dict[str, Cell] = {}

    def add_training(model: Model, seed: int) -> str:
        name = _name(model.name, seed)
        if name not in cells:
            needs = add_training(model.start, seed) if model.start else None
            cells[name] = TrainingCell(name, seed, needs, model)
        return name

    conditions: dict[str, Condition] = {}
    for question in questions:
        conditions |= question.conditions()
        if question.name == "cost":
            cells["cost"] = CostCell("cost", 0, None)
    for seed in seeds:
        trained = {condition.name: add_training(condition.model, seed) for condition in conditions.values()}
        for condition in conditions.values():
            name = _name(condition.name, seed)
            cells[name] = EvaluationCell(name, seed, trained[condition.name], condition)
    return cells


def evaluation_name(condition: Condition, seed: int) -> str:
    return _name(condition.name, seed)


def run_cell(cell: Cell, out: Path, config: Config, parent: str) -> str | None:
    """Run a cell and write its result. Returns None, or on one line why it failed.

    Args:
        parent: id of the MLflow run of the study, in which the runs of the cell are nested.
    """
    try:
        with nested(parent):
            result = cell.run(out, config)
        cell.folder(out).mkdir(parents=True, exist_ok=True)
        with atomic_write(cell.folder(out) / CELL_FILE) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n")
    except UserError as error:
        return " ".join(str(error).split())
    except Exception as error:  # a bug; the other cells continue, and the worker's log has the traceback
        traceback.print_exc()
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def read_result(cell: Cell, out: Path) -> dict[str, Any] | None:
    """Contents of `cell.json`; None if the cell is not finished.

    Raises:
        UserError: the file is damaged.
    """
    path = cell.folder(out) / CELL_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{path}: cannot be read; delete it, and the cell is run again") from None


def read_videos(path: Path) -> dict[str, dict[str, float | None]]:
    """Metrics of each video by its file name; None where a metric is undefined."""
    with open(path, newline="") as file:
        return {
            Path(row.pop("source")).name: {key: _number(text) for key, text in row.items()}
            for row in csv.DictReader(file)
        }


def _number(text: str) -> float | None:
    """None for an empty field, NaN and infinity, which JSON does not have."""
    value = float(text or "nan")
    return value if abs(value) < float("inf") else None


def _name(part: str, seed: int) -> str:
    return f"{part}-seed{seed}"
