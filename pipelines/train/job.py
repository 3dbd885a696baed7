"""The training job: clip dataset -> model folder, by stage 1, stage 2, or both.

    OUT/stage1/             Ray Train's storage of the run (checkpoints) and run.json
    OUT/stage1/model/       the model folder of stage 1, once it is finished
    OUT/stage2/
    OUT/model/              the model folder of stage 2, which `tcan animate` loads

OUT is a local folder, which all machines of a cluster must share, or the URI of a folder in a bucket.

Rerunning the command resumes from the last checkpoint; finished stages are skipped.
"""

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn

import ray
import ray.train
from ray.train.torch import TorchTrainer

from pipelines import storage, tracking
from pipelines.cluster import connect, is_local
from pipelines.config import Config, DrawConfig
from pipelines.dataset import check_clip_files, clip_sizes, read_info
from pipelines.gauges import TrainingGauges
from pipelines.lock import locked
from pipelines.staging import original_names, upload
from pipelines.train import checkpoint
from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler
from pipelines.train.engine import deepspeed_settings, read_settings
from pipelines.train.heartbeat import RunMonitor
from pipelines.train.mailbox import Mailbox, Recorder, on_driver_node
from pipelines.train.progress import progress
from pipelines.train.run_file import check_same_settings, read_run, run_settings, write_run
from pipelines.train.task import Task, pretrained_sources, schedule_options, stage_config, variant
from pipelines.train.worker import run_worker
from tcan.errors import UserError
from tcan.weights import MODEL_FILE, load_pretrained, read_model_info, read_variant

START_GRACE_SECONDS = 5  # after a signal, for workers that are about to make their first step
START = "start"  # copy of the model that stage 2 starts from
REGISTERED_NAMES = {1: "tcan-stage1", 2: "tcan"}  # in the MLflow model registry


def train(
    dataset: str | Path,
    out: str | Path,
    config: Config,
    stage: Literal["1", "2", "all"] = "all",
    from_model: str | Path | None = None,
) -> str:
    """Train the stages that are not finished yet; returns the path or URI of the last requested stage's model folder.

    Args:
        from_model: the stage-1 model that stage 2 starts from, instead of OUT/stage1/model: a folder, or a model in
            MLflow (`tracking.local_model`).

    Raises:
        UserError: the dataset, the pretrained models, the model and the configuration do not match, or OUT contains a
            run with other settings.
    """
    dataset, out = storage.absolute(dataset), storage.absolute(out)
    if from_model and stage == "1":
        raise UserError("--from: only stage 2 starts from a model; remove --from or --stage 1")
    info = read_info(dataset)
    check_clip_files(dataset, info)
    _check_dataset(dataset, info, config)
    for number in [1] * (stage != "2" and not from_model) + [2] * (stage != "1"):
        _check_clips(dataset, info, config, number)  # all stages, before the first one starts
    models = {1: f"{out}/stage1/{checkpoint.MODEL}", 2: f"{out}/{checkpoint.MODEL}"}
    if stage == "2" and not from_model and not storage.exists(models[1]):
        raise UserError(
            f"{models[1]}: no such model; stage 2 starts from it: train stage 1 first, or pass a model with --from"
        )
    tracking.check(config.tracking)
    with _locked(out, config):
        if stage != "2" and not from_model:
            _train_stage(1, dataset, info, out, models[1], None, config)
        if stage == "1":
            return models[1]
        start = tracking.local_model(str(from_model or models[1]), config.tracking).absolute()
        _check_start(start, config)
        _train_stage(2, dataset, info, out, models[2], start, config)
        return models[2]


@contextmanager
def _locked(out: str, config: Config) -> Iterator[None]:
    """Lock the run folder, and the location of the checkpoints if it is another one."""
    checkpoints = config.train.storage
    with (
        locked(out, "train"),
        locked(storage.absolute(checkpoints), "train") if checkpoints else nullcontext(),
    ):
        yield


def _check_start(start: Path, config: Config) -> None:
    """Check the model that stage 2 starts from."""
    start_info, options = read_model_info(start), schedule_options(config.train)
    if start_info["stage"] != 1:
        raise UserError(
            f"{start}: a model of stage 2; stage 2 starts from a model of stage 1: pass one with --from"
        )
    if start_info.get("schedule", options) != options:
        raise UserError(
            f"{start}: trained with {start_info['schedule']}, not {options}; set the same options for stage 2"
        )
    draw = dataclasses.asdict(config.draw)
    if (drawn := start_info.get("draw", dataclasses.asdict(DrawConfig()))) != draw:
        raise UserError(
            f"{start}: its pose images were drawn with {drawn}, not {draw}; set the same draw.hands and draw.face for stage 2"
        )
    if (style := start_info.get("pose_style", "skeleton")) != config.train.pose_style:
        raise UserError(
            f"{start}: trained with pose images in the style {style}; set train.pose_style {style} for stage 2"
        )
    _check_variant(start, start_info, config)


def _check_variant(start: Path, info: dict[str, Any], config: Config) -> None:
    before, now = read_variant(info), variant(config.train)
    for key in ("appa", "controlnet"):
        if (old := getattr(before, key)) != (new := getattr(now, key)):
            raise UserError(
                f"{start}: trained with {key} = {old}, not {new}; set train.{key} {str(old).lower()} for stage 2"
            )


def _check_dataset(dataset: str, info: dict[str, Any], config: Config) -> None:
    for part, column in (("hands", "hand_fingerprint"), ("face", "face_fingerprint")):
        if getattr(config.draw, part) and column not in info["identity"]:
            raise UserError(
                f"{dataset}: has no {part}, which draw.{part} needs; preprocess with --preprocess.{part} true, or set "
                f"draw.{part} to false"
            )
    if not info.get("buckets") and min(info["height"], info["width"]) < config.size:
        raise UserError(
            f"{dataset}: its canvas of {info['width']} x {info['height']} pixels is smaller than the training size "
            f"{config.size}; preprocess with --size {config.size}, or lower --size"
        )
    pretrained = load_pretrained(**pretrained_sources(config))
    positions = pretrained.motion_adapter.config.motion_max_seq_length
    if config.train.clip_frames > positions:
        raise UserError(
            f"train.clip_frames = {config.train.clip_frames}: the motion modules of {config.pretrained.motion_adapter} have "
            f"{positions} positions; set at most {positions}"
        )
    vae = pretrained.info["vae"]
    if vae["fingerprint"] != info["vae_fingerprint"]:
        raise UserError(
            f"{dataset}: encoded with another VAE ({info['vae_fingerprint']}) than {vae['source']} "
            f"({vae['fingerprint']}); preprocess with this VAE, or set --pretrained.vae to the other one"
        )


def _check_clips(dataset: str, info: dict[str, Any], config: Config, stage: int) -> None:
    """Check that the dataset has clips that a stage can train on, and that DeepSpeed's settings match the configuration.

    Raises:
        UserError: no clip is long enough; contradictory settings.
    """
    stage_options = stage_config(config, stage)
    # "auto" is resolved by the workers.
    one = (
        dataclasses.replace(stage_options, micro_batch=1)
        if stage_options.micro_batch == "auto"
        else stage_options
    )
    deepspeed_settings(config.train, one, config.train.workers, read_settings(config.train.deepspeed))
    Sampler(
        ClipStore(dataset), stage, seed=config.seed, batch_size=stage_options.batch_size, size=None if info.get("buckets") else config.size,
        vae_scaling_factor=info["vae_scaling_factor"], stick_width=config.train.stick_width, frames=config.train.clip_frames,
        drop_reference=config.train.drop_reference,
    )  # fmt: skip


def _train_stage(
    stage: int,
    dataset: str,
    info: dict[str, Any],
    out: str,
    model: str,
    start: Path | None,
    config: Config,
) -> None:
    stage_options = stage_config(config, stage)
    folder = f"{out}/stage{stage}"
    settings = run_settings(stage, dataset, start, config)
    run = read_run(folder)
    if run:
        check_same_settings(folder, run["settings"], settings)
        if run["finished_steps"] >= stage_options.steps and storage.exists(f"{model}/{MODEL_FILE}"):
            print(
                f"stage {stage}: already finished ({run['finished_steps']} steps), skipped: {model}",
                flush=True,
            )
            return
        print(f"stage {stage}: resumes from the last checkpoint in {folder}", flush=True)
    _connect(config)

    start_run = read_model_info(start).get("mlflow_run_id") if start else None
    parents = {"dataset": info["mlflow_run_id"], "stage1": start_run}
    name = f"stage {stage}: {os.path.basename(out)}"
    run_id = run["mlflow_run_id"] if run else None
    with tracking.run(
        f"stage{stage}", name, config.tracking, dataclasses.asdict(config), folder, parents, run_id
    ) as record:
        resumed = record.id == run_id
        record.tag("tcan.dataset_fingerprint", settings["dataset"])
        run = {"mlflow_run_id": record.id, "finished_steps": 0, "settings": settings}
        write_run(folder, run)
        task = Task(
            config=config,
            stage=stage,
            dataset=str(dataset),
            buckets=clip_sizes(info) if info.get("buckets") else None,
            vae_scaling_factor=info["vae_scaling_factor"],
            from_model=_for_workers(start, folder) if start else None,
            run_id=record.id,
            deepspeed=read_settings(config.train.deepspeed),
            monitor=on_driver_node(RunMonitor),
            mailbox=on_driver_node(Mailbox),
            show_bar=sys.stdout.isatty() and sys.stderr.isatty(),
            model_info={
                "mlflow_run_id": record.id,
                "dataset": settings["dataset"],
                "steps": stage_options.steps,
                "schedule": schedule_options(config.train),
                "draw": dataclasses.asdict(config.draw),
                "pose_style": config.train.pose_style,
            },
        )
        gauges = TrainingGauges(os.path.basename(out), stage, record.id, stage_options.steps)
        recorder = Recorder(task.mailbox, record, gauges, resumed)
        try:
            result = _fit(task, out, recorder)
        finally:
            recorder.close()
        checkpoint.publish(result.checkpoint, model)
        record.model(model, REGISTERED_NAMES[stage], os.path.basename(out), config.animate)
        write_run(folder, {**run, "finished_steps": stage_options.steps})
    print(f"stage {stage}: finished, model in {model}", flush=True)


def _for_workers(start: Path, folder: str) -> str:
    """The path or URI of the model that stage 2 starts from, for workers on other machines.

    A model in a bucket is read from there. Any other model is uploaded if the run's folder is in a bucket; otherwise all
    machines share the run's folder, and the model's.
    """
    name = original_names(str(start))
    if storage.is_remote(name) or not storage.is_remote(folder):
        return name
    upload(start, f"{folder}/{START}")
    return f"{folder}/{START}"


def _fit(task: Task, out: str, recorder: Recorder) -> ray.train.Result:
    """Train the stage.

    On SIGTERM or Ctrl-C the workers finish the step and save a checkpoint; a second signal ends the job at once.

    Raises:
        UserError: an error that the workers have reported and the user can fix.
        SystemExit, KeyboardInterrupt: after a signal.
    """
    config = task.config.train
    # Imports need most of a minute on a busy machine or a cold disk; after Ray's default of one minute it starts over.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    location, name = config.storage or out, f"stage{task.stage}"
    checkpoint.remove_incomplete(f"{location}/{name}")
    trainer = _ray_trainer(task, location, name)
    bar = progress(f"stage {task.stage}", task.stage_config.steps)
    with _signals() as received, bar if task.show_bar else nullcontext() as update_bar:
        fitted = _in_thread(trainer.fit)  # in the main thread, Ray Train would handle Ctrl-C itself
        _wait(fitted, task, recorder, received, update_bar)
    checkpoint.remove_incomplete(f"{location}/{name}")
    if reason := ray.get(task.monitor.abort_reason.remote()):
        raise UserError(reason)
    result = fitted.result()
    if received:
        print(f"stage {task.stage}: stopped; rerun the command to resume", flush=True)
        _interrupt(received[0])
    return result


def _ray_trainer(task: Task, location: str, name: str) -> TorchTrainer:
    config = task.config.train
    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    is_elastic = config.min_workers is not None
    return TorchTrainer(
        run_worker,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(config.min_workers, config.workers) if is_elastic else config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=name,  # with the storage path, the key under which a later start finds the checkpoints
            storage_path=location,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=config.num_checkpoints,
                checkpoint_score_attribute="validation_loss" if config.keep_checkpoints == "best" else None,
                checkpoint_score_order="min",
            ),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            # Before CUDA starts: Ray Train starts it for NCCL, ahead of the worker's function.
            worker_runtime_env={"env_vars": _allocator_settings()} if config.gpus_per_worker else {},
        ),
    )


def _allocator_settings() -> dict[str, str]:
    """The driver's settings of torch's CUDA allocator; `pipelines.cli` sets expandable segments."""
    return {name: value for name, value in os.environ.items() if name == "PYTORCH_CUDA_ALLOC_CONF"}


def _wait(
    fitted: Future,
    task: Task,
    recorder: Recorder,
    received: list[int],
    update_bar: Callable[[int, str], None] | None,
) -> None:
    """Wait for the end of the training; meanwhile forward signals, report hung workers, and update the bar."""
    timeout = 0.9 * task.config.train.hang_timeout  # a little before the watchdog ends the workers
    hung_workers, is_stopping, stopped_at = task.monitor.hung_workers.remote(timeout), False, 0.0
    while not wait([fitted], timeout=0.5).done:
        if recorder.error:  # workers wait for it at their next checkpoint
            raise recorder.error
        if received and not is_stopping:
            is_stopping, stopped_at = True, time.monotonic()
            task.monitor.stop.remote()
            print(
                f"stage {task.stage}: stopping with a checkpoint after this step; interrupt again to stop at once",
                flush=True,
            )
        is_late = is_stopping and time.monotonic() - stopped_at > START_GRACE_SECONDS
        if is_late and not ray.get(task.monitor.is_training.remote()):
            print(f"stage {task.stage}: stopped before the first step", flush=True)
            _interrupt(received[0])
        if ray.wait([hung_workers], timeout=0)[0]:
            if message := ray.get(hung_workers):
                print(f"stage {task.stage}: {message}; all workers restart", flush=True)
            hung_workers = task.monitor.hung_workers.remote(timeout)
        if update_bar and (last_progress := ray.get(task.monitor.progress.remote())):
            update_bar(*last_progress)


def _in_thread(function: Callable[[], Any]) -> Future:
    """Run a function in a daemon thread."""
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
    """Collect the first SIGTERM or SIGINT in the yielded list; the next one ends the process as usual."""
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
    """Connect to Ray.

    Raises:
        UserError: a local Ray has too few CPUs or GPUs for the workers.
    """
    connect()
    if "RAY_ADDRESS" in os.environ and not is_local():  # a cluster may scale up
        return
    workers = config.train.min_workers or config.train.workers
    needed = {"CPU": workers * config.train.cpus_per_worker, "GPU": workers * config.train.gpus_per_worker}
    available = ray.cluster_resources()
    for kind, amount in needed.items():
        if amount > available.get(kind, 0):
            raise UserError(
                f"train.workers = {workers} need {amount} {kind}s, this machine has {available.get(kind, 0):.0f}; "
                f"lower train.workers or train.{kind.lower()}s_per_worker"
            )
