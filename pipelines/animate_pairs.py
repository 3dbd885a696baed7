"""Animate many (image, driving, out) rows of a table on a Ray cluster.

tcan animate --pairs pairs.csv --model run/model

Each worker loads the model once. Outputs that exist are skipped, so rerunning the command completes the table. A pair
that fails is reported on one line and in `pairs.report.csv`; the other pairs continue. The table, the model and all files
may be in a bucket.
"""

import csv
import dataclasses
import io
import json
import logging
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.exceptions import RayActorError
from tqdm import tqdm

from pipelines import storage, tracking
from pipelines.animate import Animation, check_people, prepare_motion, read_inputs, render_animation
from pipelines.cluster import connect, is_local
from pipelines.config import Config
from pipelines.inference import find_model, load_pipeline
from pipelines.lock import locked
from pipelines.match import problems, refuse_problems
from pipelines.mlflow_store import resolve
from pipelines.progress import progress
from pipelines.staging import local_output, original_names, temporary_inputs
from tcan.errors import UserError, first_line
from tcan.pipeline import TCANPipeline
from tcan.weights import MINI_MODEL, read_model_info

COLUMNS = ("image", "driving", "out")
PEOPLE = ("person", "driving_person")  # optional columns
MAX_WORKER_DEATHS = 2  # per pair: the first can be the fault of the machine
MAX_LOADING_DEATHS = 5  # in a row: meanwhile, no worker has loaded the model or finished a pair
MAX_LOGGED_VIDEOS = 16  # results that are copied to the MLflow run
FRAMES_FILE = "frames.json"  # last file of a folder of images in a bucket


@dataclass
class Outcome:
    """Result of a pair: a row of the report."""

    image: str
    driving: str
    out: str
    person: str = ""  # empty: the option of all pairs
    driving_person: str = ""
    status: str = "failed"  # done, skipped (the output exists), failed
    frames: int = 0
    seconds: float = 0.0
    note: str = ""  # reason of the failure, or warnings


def animate_pairs(file: str | Path, model: str | Path, config: Config, **options: Any) -> list[Outcome]:
    """Animate the pairs of a table whose output is missing, and write a report next to the table.

    Args:
        file: .csv (with a header) or .parquet with the columns image, driving and out: paths and URIs. Relative paths
            start at the table's folder. Paths must be valid on every machine of the cluster.
        model: "mini", a folder, a URI, or a model in MLflow (`tracking.local_model`).
        options: fields of `Animation` for all pairs, such as `audio`; `person` and `driving_person` for pairs without a value
            in the column of this name.

    Returns:
        one outcome per pair, in the order of the table.

    Raises:
        UserError: a table that cannot be read; an invalid selection of people; a model folder that is incomplete or does not
            match its pretrained models; failed pairs, raised after all pairs are processed.
    """
    file = storage.absolute(file)
    outcomes = read_pairs(file)
    for row, outcome in enumerate(outcomes, start=1):
        people = _people(outcome, options)
        check_people(people["person"], people["driving_person"], f"{file}, row {row}: ", config)
    folder, _, name = file.rpartition("/")
    model_info = read_model_info(find_model(str(model), config))
    if model != "mini" and storage.local_path(model).exists():
        model = storage.absolute(model)
    with locked(folder, "animate --pairs", f".{name}.lock"):
        return _animate_missing(outcomes, file, str(model), model_info, config, options)


def _animate_missing(
    outcomes: list[Outcome],
    file: str,
    model: str,
    model_info: dict[str, Any],
    config: Config,
    options: dict[str, Any],
) -> list[Outcome]:
    folder, _, name = file.rpartition("/")
    for outcome in outcomes:
        if empty := [column for column in COLUMNS if not getattr(outcome, column)]:
            outcome.note = f"empty {', '.join(empty)} in this row"
        elif _exists(outcome.out):
            outcome.status = "skipped"
    pending = [outcome for outcome in outcomes if outcome.status == "failed" and not outcome.note]
    print(f"{file}: {len(outcomes)} pairs, {_count(outcomes, 'skipped')} already done", flush=True)
    report = f"{folder}/{Path(name).stem}.report.csv"
    if pending:
        with tracking.run(
            "animate",
            f"animate {name}",
            config.tracking,
            dataclasses.asdict(config),
            folder,
            {"model": model_info.get("mlflow_run_id")},
        ) as run:
            try:
                _animate_all(pending, model, config, options, run)
            finally:
                write_report(outcomes, report)
                run.file(report)
    else:
        write_report(outcomes, report)
    failed = _count(outcomes, "failed")
    print(f"{file}: {_count(outcomes, 'done')} animated, {failed} failed; report: {report}", flush=True)
    if failed:
        first = next(outcome for outcome in outcomes if outcome.status == "failed")
        raise UserError(
            f"{file}: {failed} of {len(outcomes)} pairs failed, such as {first.note}; see {report}, fix the causes "
            "and rerun the command"
        )
    return outcomes


def read_pairs(file: str | Path) -> list[Outcome]:
    """Read the rows of the table with absolute paths and URIs; an empty cell stays empty.

    Raises:
        UserError: a missing file, an unsupported format, missing columns, no rows, two rows with the same output.
    """
    suffix = Path(file).suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise UserError(f"{file}: unsupported suffix; pass a table of pairs as .csv or .parquet")
    rows: list[dict[str, Any]]
    try:
        data = storage.read_bytes(file)
        if suffix == ".csv":
            reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
            rows, names = list(reader), list(reader.fieldnames or ())
        else:
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(pa.BufferReader(data))
            rows, names = table.to_pylist(), table.column_names
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else storage.one_line(error)
        access = ", the endpoint and the credentials" if storage.is_remote(file) else ""
        raise UserError(f"{file}: cannot be read ({reason}); check the path{access}") from None
    except (ValueError, csv.Error) as error:  # errors of pyarrow and of text decoding are ValueErrors
        raise UserError(
            f"{file}: cannot be read as a table ({first_line(error)}); check the format"
        ) from None
    if missing := [column for column in COLUMNS if column not in names]:
        raise UserError(
            f"{file}: no column {', '.join(missing)} (columns: {', '.join(map(str, names)) or 'none'}); the table "
            "needs image, driving and out"
        )
    if not rows:
        raise UserError(f"{file}: no pairs; add one row per animation")
    folder = storage.absolute(file).rpartition("/")[0]
    pairs = []
    for number, row in enumerate(rows, start=1):
        if None in row:  # DictReader's key of further cells
            raise UserError(
                f"{file}, row {number}: more cells than columns; quote cells that contain a comma"
            )
        image, driving, out = (
            _cell(row, column) and _absolute(_cell(row, column), folder) for column in COLUMNS
        )
        person, driving_person = (_cell(row, column) for column in PEOPLE)
        pairs.append(Outcome(image, driving, out, person, driving_person))
    seen: set[str] = set()
    for pair in pairs:
        if pair.out in seen:
            raise UserError(
                f"{file}: two pairs have the same output, {pair.out}; use a different path for each"
            )
        seen.update([pair.out] if pair.out else [])
    return pairs


def _cell(row: dict[str, Any], column: str) -> str:
    """Text of a cell; empty if the cell or the column is missing."""
    value = row.get(column)
    return "" if value is None else str(value).strip()


def _people(pair: Outcome, options: dict[str, Any]) -> dict[str, str]:
    """The selections of people of a pair, by the names of the options."""
    return {name: getattr(pair, name) or options.get(name, "largest") for name in PEOPLE}


def _absolute(name: str, folder: str) -> str:
    """Absolute form of a path or URI in a table of this folder."""
    if storage.is_remote(name) or name.startswith("file://"):
        return storage.absolute(name)
    path = Path(name).expanduser()
    return str(path) if path.is_absolute() else f"{folder}/{path}"


def write_report(outcomes: Sequence[Outcome], name: str) -> None:
    """Write a CSV with one row per pair, in the order of the table.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Outcome)])
    writer.writeheader()
    writer.writerows(dataclasses.asdict(outcome) for outcome in outcomes)
    storage.write(name, text.getvalue().encode())


def _animate_all(
    pending: list[Outcome], model: str, config: Config, options: dict[str, Any], run: tracking.Run
) -> None:
    """Complete the outcomes in order of completion, and log them to the run."""
    began, frames = time.monotonic(), 0
    finished = _on_workers(pending, model, config, options)
    for number, outcome in enumerate(progress(finished, "pair", len(pending)), start=1):
        frames += outcome.frames
        done = _count(pending, "done")
        metrics = {"pairs_done": done, "pairs_failed": number - done, "frames": frames}
        run.metrics(metrics | {"frames_per_second": frames / (time.monotonic() - began)}, step=number)
        if outcome.status == "failed":
            tqdm.write(f"failed: {outcome.note}")
        elif outcome.note:
            tqdm.write(outcome.note)
        is_video = bool(Path(outcome.out).suffix)  # not a folder of images
        if outcome.status == "done" and done <= MAX_LOGGED_VIDEOS and is_video:
            run.file(outcome.out, "videos")


def _on_workers(
    pending: list[Outcome], model: str, config: Config, options: dict[str, Any]
) -> Iterator[Outcome]:
    """Assign each pair to the next idle worker; yield the outcomes in order of completion.

    A worker that dies is replaced, and its pair is retried. The pair fails after `MAX_WORKER_DEATHS` deaths.

    Raises:
        UserError: `animate.device` is a GPU, and Ray runs on this machine alone, which has none; `MAX_LOADING_DEATHS`
            workers in a row died while they loaded the model.
    """
    connect()
    # Workers may look for the model in MLflow.
    config = dataclasses.replace(config, tracking=resolve(config.tracking))
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    device = config.animate.device
    requires_gpu = device.startswith("cuda")  # an autoscaling cluster may have none yet
    if requires_gpu and not gpus and is_local():
        raise UserError(f"animate.device = {device}: this machine has no GPU; use auto or cpu")
    on_gpu = requires_gpu or (device == "auto" and gpus > 0)
    Worker = ray.remote(num_cpus=1, num_gpus=int(on_gpu))(Animator)
    waiting, deaths, loading_deaths = deque(pending), dict.fromkeys(map(id, pending), 0), 0
    running: dict[Any, tuple[Any, Outcome | None]] = {}  # task -> worker, pair (None: loading the model)

    def start() -> None:
        worker = Worker.remote(model, config, options)
        running[worker.load.remote()] = worker, None

    for _ in range(min(len(pending), config.animate.workers or (max(gpus, 1) if on_gpu else cpus))):
        start()
    while waiting or any(pair is not None for _, pair in running.values()):
        (result,), _ = ray.wait(list(running))
        worker, pair = running.pop(result)
        try:
            fields = ray.get(result)
        except RayActorError as error:
            if pair is None:
                loading_deaths += 1
                if loading_deaths == MAX_LOADING_DEATHS:
                    raise UserError(
                        f"{model}: {loading_deaths} workers in a row died while they loaded the model ({first_line(error)}); if "
                        "they run out of memory, set a smaller animate.workers or use larger nodes"
                    ) from None
            else:
                deaths[id(pair)] += 1
                if deaths[id(pair)] < MAX_WORKER_DEATHS:
                    waiting.append(pair)
                else:
                    pair.note = (
                        f"{pair.out}: the worker died {MAX_WORKER_DEATHS} times, possibly out of memory"
                    )
                    yield pair
            if waiting:
                start()
            continue
        loading_deaths = 0
        if pair is not None:
            for name, value in fields.items():
                setattr(pair, name, value)
            yield pair
        if waiting:
            pair = waiting.popleft()
            running[worker.animate.remote(pair)] = worker, pair


class Animator:
    """Ray actor that loads the model once and animates one pair at a time.

    model: see `animate_pairs`; a path must be valid on every machine. Others are found by each worker.
    """

    def __init__(self, model: str, config: Config, options: dict[str, Any]) -> None:
        self.model, self.config, self.options = model, config, options
        self.notes: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.notes.append(record.getMessage())  # type: ignore[method-assign]
        for name in ("tcan", "pipelines"):
            logging.getLogger(name).setLevel(logging.WARNING)  # Ray workers log errors only
            logging.getLogger(name).addHandler(handler)

    def load(self) -> None:
        """Load the model before the first pair, because its errors concern all pairs."""
        _ = self.pipe

    @cached_property
    def pipe(self) -> TCANPipeline:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # Ray reserved one CPU; torch would use all of the machine
        is_mini = self.model == "mini"
        model = MINI_MODEL if is_mini else tracking.local_model(self.model, self.config.tracking)
        return load_pipeline(model, self.config)

    def animate(self, pair: Outcome) -> dict[str, Any]:
        """Animate a pair; returns the fields of its outcome."""
        began = time.monotonic()
        self.notes.clear()
        status, frames = "failed", 0
        with temporary_inputs() as local_input:
            try:
                frames = self._render(pair, local_input)
                status = "done"
            except UserError as error:
                self.notes.append(" ".join(str(error).split()))
            except Exception as error:
                traceback.print_exc()  # a bug; the other pairs continue, and the worker's log has the traceback
                self.notes.append(f"{pair.out}: {type(error).__name__}: {' '.join(str(error).split())}")
            note = original_names("; ".join(self.notes))
        seconds = round(time.monotonic() - began, 3)
        return {"status": status, "frames": frames, "seconds": seconds, "note": note}

    def _render(self, pair: Outcome, local_input: Callable[[str], Path]) -> int:
        """Animate a pair; returns the number of frames."""
        image, driving = local_input(pair.image), local_input(pair.driving)
        with local_output(pair.out) as out:
            animation = Animation(image, out, driving, **self.options | _people(pair, self.options))
            inputs = read_inputs(animation, self.config)
            motion = prepare_motion(self.pipe, animation, inputs, self.config)
            refuse_problems(motion, pair.out, animation.strict)
            self.notes += problems(motion)
            frames = render_animation(self.pipe, animation, inputs, motion, self.config)
        if storage.is_remote(pair.out) and not Path(pair.out).suffix:
            info = {"frames": frames, "fps": inputs.fps}
            storage.write(f"{pair.out}/{FRAMES_FILE}", json.dumps(info).encode())
        return frames


def _exists(out: str) -> bool:
    """Whether an output is complete: uploads of a folder of images may have been interrupted."""
    if storage.is_remote(out):
        return storage.exists(out if Path(out).suffix else f"{out}/{FRAMES_FILE}")
    path = Path(out)
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _count(outcomes: Sequence[Outcome], status: str) -> int:
    return sum(outcome.status == status for outcome in outcomes)
