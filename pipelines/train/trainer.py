"""What each worker of Ray Train does: build TCAN, wrap it in a DeepSpeed engine, take steps, report checkpoints."""

import dataclasses
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.config import Config, StageConfig, TrackingConfig, TrainConfig
from pipelines.train import checkpoint
from pipelines.train.data import NO_ERRORS, Batch, ClipStore, Sampler
from pipelines.train.engine import averaged, make_engine
from pipelines.train.heartbeat import Pulse
from pipelines.train.loss_guard import LossGuard, arm, disarm, out_of_memory
from pipelines.train.run_logger import Log
from pipelines.train.throughput import Speed, peak_matmul_flops, profiler
from pipelines.train.validation import Samples, Validation, validation_sampler
from tcan.errors import UserError
from tcan.model import TCAN, diffusion_loss
from tcan.pose import PoseErrors
from tcan.schedule import noise_schedule
from tcan.weights import PretrainedModels, load_model, load_pretrained, portable_source, save_model


@dataclass(frozen=True)
class Task:
    """What the driver tells every worker."""

    config: Config
    stage: int
    dataset: str
    vae_scaling_factor: float
    from_model: str | None
    """Model folder to start from; None: the pretrained alone."""
    tracking: TrackingConfig
    run_id: str
    deepspeed: dict[str, Any]
    """The user's own DeepSpeed settings."""
    watch: Any
    """The run's `Watch`."""
    bar: bool
    """The driver shows a bar of the progress, so no lines are printed."""
    model_info: dict[str, Any]
    """Written into the model folder beside the rest."""


def run_worker(settings: dict[str, Task]) -> None:
    """Ray Train's function: from the last checkpoint, if any, to the end of the stage.

    Raises UserError when memory is exhausted, FloatingPointError when the gradient is no number, RuntimeError when a
    frozen parameter has changed. What the driver is to say instead of a failure it finds in `Task.watch`.
    """
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells of every report otherwise
    task = settings["task"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if ray.get(task.watch.begin.remote(rank, workers)):
        return
    try:
        _run(task, rank, workers)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        stage_config = stage_of(task.config, task.stage)
        if reason := out_of_memory(error, task.config.train, stage_config, task.stage):
            ray.get(task.watch.give_up.remote(reason))  # the next try would end like this one
            raise UserError(reason) from error
        raise
    finally:
        disarm()


def _run(task: Task, rank: int, workers: int) -> None:
    config, stage_config = task.config.train, stage_of(task.config, task.stage)
    os.environ["DS_ACCELERATOR"] = "cuda" if config.gpus_per_worker else "cpu"
    device = ray.train.torch.get_device()
    torch.set_num_threads(config.cpus_per_worker)

    pretrained = load_pretrained(**pretrained_sources(task.config))
    pretrained.scheduler = noise_schedule(pretrained.scheduler, **schedule_options(config))
    engine = make_engine(_model(task, pretrained), config, stage_config, workers, task.deepspeed)
    frozen = checkpoint.FrozenFingerprint(engine.module)
    state = checkpoint.load(engine)
    done = saved = state["step"]
    scratch = Path(tempfile.gettempdir()) / f"tcan-{task.run_id}-{rank}"
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed worker left
    loss_guard = LossGuard(config.spike, state)

    def make(split: str, batch_size: int) -> Sampler:
        return _sampler(task, dataclasses.replace(stage_config, batch_size=batch_size), split)

    def loss_of(batch: Batch, snr_gamma: float | None = None) -> Tensor:
        return _loss(engine, pretrained, batch, device, snr_gamma)

    # The other samplers judge the model: their poses stay as they are.
    errors = PoseErrors(config.pose_dropout, config.pose_jitter, config.pose_outliers)
    sampler = _sampler(task, stage_config, "train", errors)
    log = Log(task, stage_config, rank, done)
    micro_batches = stage_config.batch_size // stage_config.micro_batch
    speed = Speed(micro_batches, workers, peak_matmul_flops(device, engine.module.dtype))
    profile = None
    if config.profile and rank == 0:
        profile = profiler(config.profile, lambda seen: log.trace(seen, f"from_step_{done + 3:06d}"))
    samples = validation = None
    if stage_config.sample_every:
        samples = Samples(make, task.stage, pretrained, device, lambda batch: _on(batch, device))
    if stage_config.validate_every and (held_out := validation_sampler(make, config.validation_samples)):
        validation = Validation(held_out, config.validation_samples)
    judged: dict[str, float] = {}

    def save(step: int, last: bool) -> None:
        began = time.perf_counter()
        frozen.check()
        log.flush()
        writer = _model_writer(task, engine, pretrained) if last else None
        # Every checkpoint has a score, else keep-best could not order them.
        score = {"validation_loss": judged.get("validation_loss", math.inf)} if config.keep == "best" else {}
        checkpoint.save(engine, {"step": step, "model": last, **loss_guard.state}, score, scratch, writer)
        log.metrics({"checkpoint_seconds": time.perf_counter() - began}, step)

    if done >= stage_config.steps and not state.get("model"):  # it now ends sooner than it was begun to
        save(done, True)
    ahead = ThreadPoolExecutor(1, "data")
    share = (rank, workers, stage_config.micro_batch)
    upcoming = ahead.submit(sampler.worker_batches, done, *share)
    pulse, left = Pulse(task.watch, rank), False
    if profile:
        profile.start()
    for step in range(done, stage_config.steps):
        arm(config.hang_seconds)
        began = time.perf_counter()
        batches = upcoming.result()
        waited = time.perf_counter() - began
        upcoming = ahead.submit(sampler.worker_batches, step + 1, *share)

        lr = learning_rate(step, stage_config)
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = lr
        own = torch.zeros((), device=device)
        for batch in batches:
            with speed.counted():
                part = loss_of(batch, config.snr_gamma)
                engine.backward(part)
            own += part.detach() / len(batches)
            if batch is not batches[-1]:
                engine.step()  # counts the accumulation
        stop, leaving = pulse.beat(step + 1), ray.train.get_preemption_info() is not None
        loss, stop, leaving = _agree(own, stop, leaving)
        fault = loss_guard.fault(loss)
        engine.basic_optimizer.leave_out = fault is not None
        engine.step()
        if fault:
            norm = math.nan
            videos = sorted({sampler.video(step, i).video_id for i in range(stage_config.batch_size)})
            fault = f"stage {task.stage}, step {step + 1}: {fault}; videos {', '.join(videos)}"
            if config.bad_loss == "stop":
                kept = (
                    f"the last good checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
                )
                advice = "lower lr, look at these videos, or set train.bad_loss to skip"
                ray.get(task.watch.give_up.remote(f"{fault}; {kept}; {advice}"))
                break
            if rank == 0:
                print(f"{fault}: step left out", flush=True)
        elif not math.isfinite(norm := float(engine.get_global_grad_norm())):
            raise FloatingPointError(f"stage {task.stage}: the gradient's norm is {norm} at step {step + 1}")
        seconds = time.perf_counter() - began
        values = {"loss": loss, "grad_norm": norm, "lr": lr, **speed.metrics(seconds)}
        log.step(step + 1, values, seconds, waited)

        last = step + 1 == stage_config.steps
        if validation and (last or (step + 1) % stage_config.validate_every == 0):
            with averaged(engine):
                judged = validation.measure(loss_of, device)
            log.metrics(judged, step + 1)
        if samples and (last or (step + 1) % stage_config.sample_every == 0):
            # By all workers: under ZeRO-3 each holds a part of the weights.
            with averaged(engine):
                image, clip = samples.draw(engine.module)
            log.samples(image, clip, step + 1)
        if last or stop or (leaving and not left) or (step + 1) % stage_config.checkpoint_every == 0:
            save(saved := step + 1, last)
            left |= leaving  # Ray Train takes the workers away when the machine goes, and starts others
        if profile:
            profile.step()
        if stop:
            break
    if profile:
        profile.stop()
    ahead.shutdown(cancel_futures=True)
    log.close()
    dist.barrier()  # still on the guard: else who is done would wait without end for one that hangs from here


def _agree(loss: Tensor, *wishes: bool) -> Any:
    """The mean of the workers' losses, and of each wish whether one of them has it: the same on all of them."""
    wished = torch.tensor([float(wish) for wish in wishes], device=loss.device)
    together = torch.cat([loss.float()[None] / dist.get_world_size(), wished])
    dist.all_reduce(together)
    mean, *counts = together.tolist()
    return mean, *(count > 0 for count in counts)


def stage_of(config: Config, stage: int) -> StageConfig:
    return config.train.stage1 if stage == 1 else config.train.stage2


def pretrained_sources(config: Config) -> dict[str, str]:
    """What `tcan.weights.load_pretrained` takes: training needs no pose network."""
    sources = dataclasses.asdict(config.pretrained)
    del sources["pose"]
    return sources


def schedule_options(config: TrainConfig) -> dict[str, Any]:
    """What `tcan.schedule.noise_schedule` takes, and the model folder keeps as "schedule"."""
    return {"prediction_type": config.prediction_type, "zero_terminal_snr": config.zero_terminal_snr}


def learning_rate(step: int, config: StageConfig) -> float:
    """Of the step with this number, from 0: rises linearly to `lr` over the warm-up, then constant."""
    return config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))


# --- model and engine ------------------------------------------------------------------------------------------------


def _model(task: Task, pretrained: PretrainedModels) -> TCAN:
    config = task.config.train
    torch.manual_seed(task.config.seed)  # of APPA's first weights
    if task.from_model:
        model = load_model(task.from_model, pretrained)
    else:
        model = TCAN(
            pretrained.unet,
            pretrained.controlnet,
            pretrained.motion_adapter,
            pretrained.empty_prompt,
            config.lora_rank,
            config.lora_alpha,
        )
    model.set_stage(task.stage)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    # The buffers too: DeepSpeed converts parameters alone.
    return model.to(torch.bfloat16 if config.precision == "bf16" else torch.float32).train()


def _sampler(task: Task, stage: StageConfig, split: Any, errors: PoseErrors = NO_ERRORS) -> Sampler:
    config = task.config.train
    return Sampler(
        ClipStore(task.dataset, split, config.cache_mb << 20),
        task.stage,
        seed=task.config.seed,
        batch_size=stage.batch_size,
        size=task.config.size,
        vae_scaling_factor=task.vae_scaling_factor,
        stick_width=config.stick_width,
        frames=config.frames,
        drop_reference=config.drop_reference,
        reference=config.stage1_reference if task.stage == 1 else config.stage2_reference,
        noise_offset=config.noise_offset,
        pose_errors=errors,
    )


def _on(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on the device; pose float32 `[B, F, 3, H, W]` in [0, 1]."""
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors = {key: tensor.to(device, non_blocking=True) for key, tensor in tensors.items()}
    tensors["pose"] = tensors["pose"].movedim(-1, 2).float() / 255
    return tensors


def _loss(
    engine: Any,
    pretrained: PretrainedModels,
    batch: Batch,
    device: torch.device,
    snr_gamma: float | None = None,
) -> Tensor:
    t = _on(batch, device)
    return diffusion_loss(
        engine,
        pretrained.scheduler,
        t["latents"],
        t["noise"],
        t["timestep"],
        t["pose"],
        t["reference"],
        t["reference_mask"],
        snr_gamma,
    )


def _model_writer(task: Task, engine: Any, pretrained: PretrainedModels) -> Callable[[Path], None]:
    import deepspeed

    def write(folder: Path) -> None:
        sharded = task.config.train.zero_stage == 3
        with (
            averaged(engine),
            deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=sharded),
        ):
            if dist.get_rank() == 0:
                save_model(
                    engine.module,
                    folder,
                    pretrained=pretrained.info
                    | {"pose": {"source": portable_source(task.config.pretrained.pose)}},
                    stage=task.stage,
                    height=task.config.size,
                    width=task.config.size,
                    stick_width=task.config.train.stick_width,
                    **task.model_info,
                )

    return write
