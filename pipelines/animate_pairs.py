"""Many animations over a Ray cluster, from a table of (image, driving, out).

tcan animate --pairs pairs.csv --model run/model

Each worker loads the model once. A result that is there is left alone, so the same command again does what is missing.
A pair that can't be made is a line here and in `pairs.report.csv`, and doesn't stop the others.
"""

import csv
import dataclasses
import logging
import os
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError
from tqdm import tqdm

from pipelines import tracking
from pipelines.animate import Animation, load_pipeline, make, read_inputs
from pipelines.cluster import connect
from pipelines.config import Config
from tcan.errors import UserError
from tcan.pipeline import TCANPipeline
from tcan.weights import read_model_info

COLUMNS = ("image", "driving", "out")
DEATHS = 2  # of the workers that a pair is given to: the first may be its machine's fault
SHOWN = 16  # results that are copied into the run


@dataclass
class Outcome:
    """What became of a pair: a row of the report."""

    image: str
    driving: str
    out: str
    status: str = "failed"  # done, done before, failed
    frames: int = 0
    seconds: float = 0.0
    note: str = ""  # why it failed, or what was odd about it


def animate_pairs(
    file: Path, model: Path, config: Config, audio: bool = False, side_by_side: bool = False
) -> list[Outcome]:
    """Makes what is missing of the table's results, and writes FILE's report beside it.

    file: .csv (with a line of names) or .parquet with the columns image, driving and out; relative paths count from
    its folder, and mean the same on every machine of the cluster.

    Returns:
        the outcomes, a pair each, in the table's order.

    Raises:
        UserError: a table that can't be read; a model folder that isn't whole or doesn't fit its pretrained; and, after all
            others have been made, when pairs failed.
    """
    outcomes = read_pairs(file)
    parents = {"model": read_model_info(model).get("mlflow_run_id")}
    for outcome in outcomes:
        if empty := [column for column in COLUMNS if not getattr(outcome, column)]:
            outcome.note = f"no {' and no '.join(empty)} in this row"
        elif _is_there(Path(outcome.out)):
            outcome.status = "done before"
    pending = [outcome for outcome in outcomes if outcome.status == "failed" and not outcome.note]
    print(f"{file}: {len(outcomes)} pairs, {_count(outcomes, 'done before')} of them done before", flush=True)
    report = file.with_name(f"{file.stem}.report.csv")
    if pending:
        with tracking.run(
            "animate", f"animate {file.name}", config.tracking, dataclasses.asdict(config), parents
        ) as run:
            try:
                _make_all(pending, model, config, {"audio": audio, "side_by_side": side_by_side}, run)
            finally:
                write_report(outcomes, report)
                run.file(report)
    else:
        write_report(outcomes, report)
    failed = _count(outcomes, "failed")
    print(
        f"{file}: {_count(outcomes, 'done')} made, {failed} failed; {report} has a row for each", flush=True
    )
    if failed:
        first = next(outcome for outcome in outcomes if outcome.status == "failed")
        raise UserError(
            f"{failed} of {len(outcomes)} pairs failed, such as {first.note}; see {report}, mend them, and "
            "give the same command again"
        )
    return outcomes


def read_pairs(file: Path) -> list[Outcome]:
    """The table's rows, paths made absolute; an empty cell stays empty.

    Raises:
        UserError: no such file, of another kind, without these columns or any row; two rows with one result.
    """
    if file.suffix.lower() not in (".csv", ".parquet"):
        raise UserError(f"{file}: give a table of pairs as .csv or .parquet")
    rows: list[dict[str, Any]]
    try:
        if file.suffix.lower() == ".csv":
            with open(file, newline="", encoding="utf-8-sig") as lines:
                reader = csv.DictReader(lines)
                rows, names = list(reader), list(reader.fieldnames or ())
        else:
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(file)
            rows, names = table.to_pylist(), table.column_names
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); check the path") from None
    except (ValueError, csv.Error) as error:  # pyarrow's own errors, and those of text, are ValueErrors
        raise UserError(f"{file}: cannot be read as a table ({str(error).splitlines()[0]})") from None
    if missing := [column for column in COLUMNS if column not in names]:
        raise UserError(
            f"{file}: no column {', '.join(missing)}; the table needs image, driving and out, and has "
            f"{', '.join(map(str, names)) or 'none'}"
        )
    if not rows:
        raise UserError(f"{file}: holds no pairs")
    folder = file.absolute().parent
    pairs = []
    for row in rows:
        image, driving, out = (
            cell and str(folder / Path(cell).expanduser())
            for cell in (str(row[column] or "").strip() for column in COLUMNS)
        )
        pairs.append(Outcome(image, driving, out))
    seen: set[str] = set()
    for pair in pairs:
        if pair.out in seen:
            raise UserError(f"{file}: two pairs have the same result, {pair.out}; give each its own")
        seen.update([pair.out] if pair.out else [])
    return pairs


def write_report(outcomes: Sequence[Outcome], path: Path) -> None:
    """A CSV with a row for each pair, in the table's order.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Outcome)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(outcome) for outcome in outcomes)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the report ({error.strerror}); check the folder") from None
    finally:
        partial.unlink(missing_ok=True)


def _make_all(
    pending: list[Outcome], model: Path, config: Config, options: dict[str, Any], run: tracking.Run
) -> None:
    """Fills in the outcomes as they come, and records them."""
    began, frames = time.monotonic(), 0
    finished = _on_workers(pending, model, config, options)
    for number, outcome in enumerate(
        tqdm(finished, "pairs", total=len(pending), unit="pair", disable=None), start=1
    ):
        frames += outcome.frames
        done = _count(pending, "done")
        metrics = {"pairs_done": done, "pairs_failed": number - done, "frames": frames}
        run.metrics(metrics | {"frames_per_second": frames / (time.monotonic() - began)}, step=number)
        if outcome.status == "failed":
            tqdm.write(f"failed: {outcome.note}")
        elif outcome.note:
            tqdm.write(outcome.note)
        if outcome.status == "done" and done <= SHOWN and Path(outcome.out).is_file():
            run.file(outcome.out, "videos")


def _on_workers(
    pending: list[Outcome], model: Path, config: Config, options: dict[str, Any]
) -> Iterator[Outcome]:
    """Each pair to the next worker that is free; the outcomes as they come.

    A worker that dies is replaced. Its pair is given to one more, and has failed when that one dies too.
    """
    connect()
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    Worker = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(Animator)
    waiting, deaths = deque(pending), dict.fromkeys(map(id, pending), 0)
    running: dict[Any, tuple[Any, Outcome | None]] = {}  # what a worker does: a pair, or loading the model

    def start() -> None:
        worker = Worker.remote(model, config, options)
        running[worker.load.remote()] = worker, None

    for _ in range(min(len(pending), config.animate.workers or gpus or cpus)):
        start()
    while waiting or any(pair is not None for _, pair in running.values()):
        (result,), _ = ray.wait(list(running))
        worker, pair = running.pop(result)
        try:
            made = ray.get(result)
        except RayActorError:
            if pair is None:
                raise
            deaths[id(pair)] += 1
            if deaths[id(pair)] < DEATHS:
                waiting.append(pair)
            else:
                pair.note = f"{pair.out}: its worker died {DEATHS} times, perhaps for want of memory"
                yield pair
            start()
            continue
        if pair is not None:
            for name, value in made.items():
                setattr(pair, name, value)
            yield pair
        if waiting:
            pair = waiting.popleft()
            running[worker.animate.remote(pair)] = worker, pair


class Animator:
    """A worker: the model, loaded once, and what it makes of one pair after another."""

    def __init__(self, model: Path, config: Config, options: dict[str, Any]) -> None:
        self.model, self.config, self.options = model, config, options
        self.notes: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.notes.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("tcan").setLevel(logging.WARNING)  # Ray's workers are told to keep quiet
        logging.getLogger("tcan").addHandler(handler)

    def load(self) -> None:
        """Loads the model now: what is wrong with it is wrong with every pair."""
        _ = self.pipe

    @cached_property
    def pipe(self) -> TCANPipeline:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # the CPU that Ray reserved; torch would take all of the machine's
        return load_pipeline(self.model, self.config)

    def animate(self, pair: Outcome) -> dict[str, Any]:
        """The fields of the pair's outcome."""
        began = time.monotonic()
        self.notes.clear()
        animation = Animation(Path(pair.image), Path(pair.out), Path(pair.driving), **self.options)
        status, frames = "failed", 0
        try:
            frames = make(self.pipe, animation, read_inputs(animation, self.config), self.config)
            status = "done"
        except UserError as error:
            self.notes.append(" ".join(str(error).split()))
        except Exception as error:  # ours, but the other pairs may do well; the trace is in the worker's log
            traceback.print_exc()
            self.notes.append(f"{pair.out}: {type(error).__name__}: {' '.join(str(error).split())}")
        seconds = round(time.monotonic() - began, 3)
        return {"status": status, "frames": frames, "seconds": seconds, "note": "; ".join(self.notes)}


def _is_there(out: Path) -> bool:
    return any(out.iterdir()) if out.is_dir() else out.exists()


def _count(outcomes: Sequence[Outcome], status: str) -> int:
    return sum(outcome.status == status for outcome in outcomes)
