"""Training's driver: clip dataset -> model folder, by stage 1, stage 2, or both.

    OUT/stage1/             Ray Train's storage of the run (checkpoints) and run.json
    OUT/stage1/model/       the model folder of stage 1, when it is finished
    OUT/stage2/
    OUT/model/              the model folder of stage 2: what `tcan animate` takes

The same command again goes on from the last checkpoint; what is finished is left alone.
"""

import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn

import ray
import ray.train
from ray.train.torch import TorchTrainer

from pipelines import tracking
from pipelines.cluster import connect
from pipelines.config import Config
from pipelines.dataset import INFO_FILE, read_info
from pipelines.train import checkpoint
from pipelines.train.data import ClipStore, Sampler
from pipelines.train.engine import deepspeed_settings, read_settings
from pipelines.train.heartbeat import Watch
from pipelines.train.progress import progress
from pipelines.train.trainer import Task, pretrained_sources, run_worker, schedule_options, stage_of
from tcan.errors import UserError
from tcan.weights import MODEL_FILE, load_pretrained, read_model_info

RUN_FILE = "run.json"
REGISTERED = {1: "tcan-stage1", 2: "tcan"}  # names in MLflow's registry
# Of a run that goes on, these may change: they move no number of it by more than rounding.
MAY_CHANGE = {
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "zero_stage",
    "deepspeed",
    "gradient_checkpointing",
    "min_workers",
    "max_failures",
    "keep_checkpoints",
    "keep",
    "validation_samples",
    "bad_loss",
    "spike",
    "hang_seconds",
    "log_every",
    "profile",
    "cache_mb",
}
STAGE_MAY_CHANGE = {"steps", "micro_batch", "checkpoint_every", "sample_every", "validate_every"}


def train(
    dataset: str | Path,
    out: str | Path,
    config: Config,
    stage: Literal["1", "2", "all"] = "all",
    from_model: str | Path | None = None,
) -> Path:
    """Trains what is missing and returns the model folder of the last stage asked for.

    from_model: the stage-1 model that stage 2 starts from, instead of OUT/stage1/model: a folder, or as
        `tracking.local_model` takes it.
    Raises UserError when the dataset, the pretrained, the model and the configuration don't fit each other, or OUT holds a
    run with other settings.
    """
    dataset, out = Path(dataset).absolute(), Path(out).absolute()
    if from_model and stage == "1":
        raise UserError("--from gives stage 2 its start; leave out --stage 1")
    info = read_info(dataset)
    _check_dataset(dataset, info, config)
    models = {1: out / "stage1" / checkpoint.MODEL, 2: out / checkpoint.MODEL}
    if stage != "2" and not from_model:
        _train_stage(1, dataset, info, out, models[1], None, config)
    if stage == "1":
        return models[1]
    start = tracking.local_model(str(from_model), config.tracking).absolute() if from_model else models[1]
    if not from_model and not start.is_dir():
        raise UserError(
            f"stage 2 starts from {start}, which isn't there; run stage 1 first, or name a model with --from"
        )
    start_info, options = read_model_info(start), schedule_options(config.train)
    if start_info["stage"] != 1:
        raise UserError(f"{start}: stage 2 starts from a model of stage 1; this one has been through stage 2")
    if start_info.get("schedule", options) != options:
        raise UserError(
            f"{start}: was trained with {start_info['schedule']}, not {options}; give stage 2 the same"
        )
    _train_stage(2, dataset, info, out, models[2], start, config)
    return models[2]


def _check_dataset(dataset: Path, info: dict[str, Any], config: Config) -> None:
    if min(info["height"], info["width"]) < config.size:
        raise UserError(
            f"{dataset}: its canvas of {info['width']} x {info['height']} pixels is below the training size {config.size}; "
            f"preprocess at {config.size} or set --size"
        )
    vae = load_pretrained(**pretrained_sources(config)).info["vae"]
    if vae["fingerprint"] != info["vae_fingerprint"]:
        raise UserError(
            f"{dataset}: its latents are of another VAE ({info['vae_fingerprint']}) than {vae['source']} "
            f"({vae['fingerprint']}); preprocess with this VAE, or set --pretrained.vae to that one"
        )


def _train_stage(
    stage: int,
    dataset: Path,
    info: dict[str, Any],
    out: Path,
    model: Path,
    start: Path | None,
    config: Config,
) -> None:
    stage_config = stage_of(config, stage)
    folder = out / f"stage{stage}"
    settings = _settings(stage, dataset, start, config)
    given = read_settings(config.train.deepspeed)
    deepspeed_settings(
        config.train, stage_config, config.train.workers, given
    )  # what contradicts is said now
    run = _read_run(folder)
    if run:
        _check_same(folder, run["settings"], settings)
        if run["finished_steps"] >= stage_config.steps and (model / MODEL_FILE).is_file():
            print(
                f"stage {stage}: finished before ({run['finished_steps']} steps), left alone: {model}",
                flush=True,
            )
            return
        print(f"stage {stage}: goes on from the last checkpoint in {folder}", flush=True)
    # Before anything starts: is there a clip to train on?
    Sampler(
        ClipStore(dataset), stage, seed=config.seed, batch_size=stage_config.batch_size, size=config.size,
        vae_scaling_factor=info["vae_scaling_factor"], stick_width=config.train.stick_width, frames=config.train.frames,
        drop_reference=config.train.drop_reference,
    )  # fmt: skip
    _connect(config)

    start_run = read_model_info(start).get("mlflow_run_id") if start else None
    parents = {"dataset": info["mlflow_run_id"], "stage1": start_run}
    name = f"stage {stage}: {out.name}"
    run_id = run["mlflow_run_id"] if run else None
    with tracking.run(
        f"stage{stage}", name, config.tracking, dataclasses.asdict(config), parents, run_id
    ) as record:
        record.tag("tcan.dataset_fingerprint", settings["dataset"])
        run = {"mlflow_run_id": record.id, "finished_steps": 0, "settings": settings}
        _write_run(folder, run)
        task = Task(
            config=config,
            stage=stage,
            dataset=str(dataset),
            vae_scaling_factor=info["vae_scaling_factor"],
            from_model=str(start) if start else None,
            tracking=record.config,
            run_id=record.id,
            deepspeed=given,
            watch=ray.remote(num_cpus=0)(Watch).remote(),
            bar=sys.stdout.isatty() and sys.stderr.isatty(),
            model_info={
                "mlflow_run_id": record.id,
                "dataset": settings["dataset"],
                "steps": stage_config.steps,
                "schedule": schedule_options(config.train),
            },
        )
        result = _fit(task, out)
        checkpoint.publish(result.checkpoint, model)
        options = {
            "num_inference_steps": config.animate.steps,
            "guidance_scale": float(config.animate.guidance_scale),
            "start_from_reference": config.animate.start_from_reference,
        }
        record.model(model, REGISTERED[stage], out.name, options)
        _write_run(folder, {**run, "finished_steps": stage_config.steps})
    print(f"stage {stage}: finished, model in {model}", flush=True)


def _fit(task: Task, out: Path) -> ray.train.Result:
    """Trains the stage. SIGTERM and Ctrl-C: a checkpoint after the step that is being taken, then SystemExit or
    KeyboardInterrupt; a second one at once. Raises UserError for what the workers found that has to be mended."""
    config = task.config.train
    # Imports take most of a minute on a busy machine or a cold disk; Ray's own limit is one minute, then it starts over.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    resources = {"CPU": config.cpus_per_worker} | (
        {"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}
    )
    elastic = config.min_workers is not None
    storage, name = config.storage or str(out), f"stage{task.stage}"
    checkpoint.sweep(f"{storage}/{name}")
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(config.min_workers, config.workers) if elastic else config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=name,  # with the storage path: what a later start goes on from
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=config.keep_checkpoints,
                checkpoint_score_attribute="validation_loss" if config.keep == "best" else None,
                checkpoint_score_order="min",
            ),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    bar = progress(f"stage {task.stage}", stage_of(task.config, task.stage).steps)
    with _signals() as received, bar if task.bar else nullcontext() as show:
        fitted = _in_thread(trainer.fit)  # in the main thread, Ray Train would take Ctrl-C for itself
        patience = 0.9 * config.hang_seconds  # a little before the workers end themselves
        asked, told = task.watch.late.remote(patience), False
        while not wait([fitted], timeout=0.5).done:
            if received and not told:
                told = True
                task.watch.stop.remote()
                print(
                    f"stage {task.stage}: stops with a checkpoint after this step; again to stop at once",
                    flush=True,
                )
            if ray.wait([asked], timeout=0)[0]:
                if late := ray.get(asked):
                    print(f"stage {task.stage}: {late}; all workers are started anew", flush=True)
                asked = task.watch.late.remote(patience)
            if show and (progressed := ray.get(task.watch.progress.remote())):
                show(*progressed)
    checkpoint.sweep(f"{storage}/{name}")
    verdict = ray.get(task.watch.verdict.remote())
    if verdict:
        raise UserError(verdict)
    result = fitted.result()
    if received:
        print(f"stage {task.stage}: stopped; the same command goes on", flush=True)
        _interrupt(received[0])
    return result


def _in_thread(function: Callable[[], Any]) -> Future:
    """Runs a function beside the main thread, which may end without waiting for it."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    return future


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The first SIGTERM or SIGINT within is put into the list; the next one ends the process as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: Any) -> None:
        if received:
            _interrupt(number)
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _connect(config: Config) -> None:
    """Connects to Ray; UserError when this machine alone is too small for the workers."""
    connect()
    if "RAY_ADDRESS" in os.environ:  # a cluster may grow
        return
    workers = config.train.min_workers or config.train.workers
    needed = {"CPU": workers * config.train.cpus_per_worker, "GPU": workers * config.train.gpus_per_worker}
    there = ray.cluster_resources()
    for kind, amount in needed.items():
        if amount > there.get(kind, 0):
            raise UserError(
                f"train.workers = {workers} need {amount} {kind}s, this machine has {there.get(kind, 0):.0f}; "
                f"lower train.workers or train.{kind.lower()}s_per_worker"
            )


# --- what a run was begun with ---------------------------------------------------------------------------------------


def _settings(stage: int, dataset: Path, start: Path | None, config: Config) -> dict[str, Any]:
    """All that decides a run's numbers."""
    values = dataclasses.asdict(config.train)
    chosen = {key: value for key, value in values.items() if key not in MAY_CHANGE | {"stage1", "stage2"}}
    chosen |= {key: value for key, value in values[f"stage{stage}"].items() if key not in STAGE_MAY_CHANGE}
    start_digest = _digest(*sorted(start.rglob("*.safetensors"))) if start else None
    return {
        "seed": config.seed,
        "size": config.size,
        "dataset": _digest(dataset / INFO_FILE),
        "from": start_digest,
        **chosen,
    }


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _check_same(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    for key in now:
        if begun.get(key) != now[key]:
            raise UserError(
                f"{folder}: this run was begun with {key} = {begun.get(key)}, not {now[key]}; give the same, or another OUT"
            )


def _read_run(folder: Path) -> dict[str, Any] | None:
    path = folder / RUN_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def _write_run(folder: Path, run: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{RUN_FILE}.part"
    partial.write_text(json.dumps(run, indent=2) + "\n")
    os.replace(partial, folder / RUN_FILE)
