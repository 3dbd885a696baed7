"""Cells of the study: one training or one evaluation each, in a folder of its own.

    OUT/cells/cost/                          operations and times
    OUT/cells/corpus/ coordinates/ dataset-coordinates/ controlnet-weak/    networks that the study trains, and their data
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
from pipelines.study.questions import LONG_FRAMES, Condition, ControlNet, Model, Question
from tcan.atomic_write import atomic_write
from tcan.errors import UserError, first_line

CELLS, CELL_FILE = "cells", "cell.json"
CORPUS, DETECTOR, DATASET = "corpus", "coordinates", "dataset-coordinates"
"""Names of the cells that make the data of other cells."""


@dataclasses.dataclass(frozen=True)
class Cell(ABC):
    """A unit of work that is done once. `name` is its folder below OUT/cells."""

    name: str
    seed: int
    needs: tuple[str, ...]
    """Names of the cells whose results it requires."""

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
class CorpusCell(Cell):
    """Rendered characters for the networks that the study trains."""

    def run(self, out: Path, config: Config) -> dict[str, Any]:
        from pipelines.study.pretraining import render_corpus

        render_corpus(self.folder(out), config)
        return {}


@dataclasses.dataclass(frozen=True)
class DetectorCell(Cell):
    """Training of the detector of coordinates."""

    def run(self, out: Path, config: Config) -> dict[str, Any]:
        from pipelines import tracking
        from pipelines.study.pretraining import train_coordinates

        folder = self.folder(out)
        steps = {"steps": config.study.detector_steps}
        with tracking.run("detector", self.name, config.tracking, steps, folder) as run:
            values = train_coordinates(out / CELLS / CORPUS, folder, config)
            run.metrics(values)
        return {"mlflow_run_id": run.id, "values": values}


@dataclasses.dataclass(frozen=True)
class DatasetCell(Cell):
    """Clip dataset with the poses of the detector of coordinates."""

    def run(self, out: Path, config: Config) -> dict[str, Any]:
        from pipelines.preprocess.job import preprocess

        preprocess(str(out / "videos" / "train"), str(self.folder(out)), with_coordinates(out, config))
        return {}


@dataclasses.dataclass(frozen=True)
class ControlNetCell(Cell):
    controlnet: ControlNet

    def run(self, out: Path, config: Config) -> dict[str, Any]:
        from pipelines import tracking
        from pipelines.study.pretraining import train

        folder, controlnet = self.folder(out), self.controlnet
        if controlnet.detector == "coordinates":
            config = with_coordinates(out, config)
        with tracking.run(
            "controlnet", self.name, config.tracking, dataclasses.asdict(controlnet), folder
        ) as run:
            train(controlnet, out / CELLS / CORPUS, folder, config.pretrained.pose, config)
        return {"mlflow_run_id": run.id}


def with_coordinates(out: Path, config: Config) -> Config:
    """The configuration with the detector of coordinates."""
    source = str(out / CELLS / DETECTOR / "pose")
    return dataclasses.replace(config, pretrained=dataclasses.replace(config.pretrained, pose=source))


@dataclasses.dataclass(frozen=True)
class TrainingCell(Cell):
    model: Model

    def run(self, out: Path, config: Config) -> dict[str, Any]:
        from pipelines.train.job import train
        from pipelines.train.run_file import read_run

        model, folder, dataset = self.model, self.folder(out), out / "dataset"
        if model.controlnet is not None:
            source = str(out / CELLS / _controlnet_name(model.controlnet) / "controlnet")
            config = dataclasses.replace(
                config, pretrained=dataclasses.replace(config.pretrained, controlnet=source)
            )
            if model.controlnet.detector == "coordinates":
                config, dataset = with_coordinates(out, config), out / CELLS / DATASET
        config = dataclasses.replace(
            config, seed=self.seed, train=dataclasses.replace(config.train, **model.options)
        )
        start = None if model.start is None else model_folder(out, model.start, self.seed)
        train(dataset, folder, config, "1" if model.stage == 1 else "2", start)
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
                config.evaluate,
                frames=LONG_FRAMES if condition.is_long else study.frames,
                videos=0,
                poses=condition.poses,
                detector=config.pretrained.pose,  # the same for all models
            ),
        )
        model = model_folder(out, condition.model, self.seed)
        report = evaluate(video_folder(out, condition), model, folder, config)
        return {"mlflow_run_id": report["mlflow_run_id"], "videos": read_videos(folder / "videos.csv")}


def video_folder(out: Path, condition: Condition) -> Path:
    """Folder of the videos of a condition."""
    return out / "videos" / (f"{condition.videos}-{LONG_FRAMES}" if condition.is_long else condition.videos)


def model_folder(out: Path, model: Model, seed: int) -> Path:
    """Model folder that the training cell of this model writes."""
    folder = out / CELLS / _name(model.name, seed)
    return folder / "stage1" / "model" if model.stage == 1 else folder / "model"


def cells_of(questions: Iterable[Question], seeds: Iterable[int]) -> dict[str, Cell]:
    """All cells by name, each after the one that it needs. Questions share cells of the same name."""
    cells: dict[str, Cell] = {}

    def add_controlnet(controlnet: ControlNet) -> tuple[str, ...]:
        """Names of the cells that a training with this ControlNet requires."""
        name = _controlnet_name(controlnet)
        cells.setdefault(CORPUS, CorpusCell(CORPUS, 0, ()))
        if controlnet.detector == "openpose":
            cells.setdefault(name, ControlNetCell(name, 0, (CORPUS,), controlnet))
            return (name,)
        cells.setdefault(DETECTOR, DetectorCell(DETECTOR, 0, (CORPUS,)))
        cells.setdefault(name, ControlNetCell(name, 0, (CORPUS, DETECTOR), controlnet))
        cells.setdefault(DATASET, DatasetCell(DATASET, 0, (DETECTOR,)))
        return name, DATASET

    def add_training(model: Model, seed: int) -> str:
        name = _name(model.name, seed)
        if name not in cells:
            needs = add_controlnet(model.controlnet) if model.controlnet else ()
            if model.start:
                needs += (add_training(model.start, seed),)
            cells[name] = TrainingCell(name, seed, needs, model)
        return name

    conditions: dict[str, Condition] = {}
    for question in questions:
        conditions |= question.conditions()
        if question.name == "cost":
            cells["cost"] = CostCell("cost", 0, ())
    for seed in seeds:
        trained = {condition.name: add_training(condition.model, seed) for condition in conditions.values()}
        for condition in conditions.values():
            name = _name(condition.name, seed)
            cells[name] = EvaluationCell(name, seed, (trained[condition.name],), condition)
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


def _controlnet_name(controlnet: ControlNet) -> str:
    return f"controlnet-{controlnet.name}"


def _name(part: str, seed: int) -> str:
    return f"{part}-seed{seed}"
