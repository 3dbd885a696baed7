"""The training loop of a worker: steps of the DeepSpeed engine, validation, sample images, checkpoints."""

import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.config import StageConfig
from pipelines.train import checkpoint
from pipelines.train.clips import ClipStore
from pipelines.train.data import NO_ERRORS, Batch, Sampler
from pipelines.train.engine import create_engine, ema_weights, optimizer_step
from pipelines.train.heartbeat import Heartbeat
from pipelines.train.loss_guard import LossGuard, arm_watchdog
from pipelines.train.model import batch_loss, build_model, save_trained_model
from pipelines.train.prefetch import StepBatches, data_processes, prefetched
from pipelines.train.run_logger import RunLogger
from pipelines.train.task import Task, pretrained_sources, schedule_options
from pipelines.train.throughput import FlopsMeter, peak_matmul_flops, profiler
from pipelines.train.validation import SampleImages, Validation, validation_sampler
from tcan.acceleration import compile_tcan, is_compiled, use_fast_formats
from tcan.pose import PoseErrors
from tcan.schedule import noise_schedule
from tcan.weights import load_pretrained


@dataclass(frozen=True)
class StepResult:
    values: Tensor
    """float64 `[4]` on the device: mean loss over all workers, gradient norm, whether the loss is bad, running mean of the
    loss."""
    lr: float
    stop: bool
    """The driver asks for a checkpoint and the end of the training."""
    preempted: bool
    """A worker's machine is about to be taken away."""


@dataclass(frozen=True)
class PendingStep:
    """A step whose results are still on the device."""

    number: int
    """From 1."""
    result: StepResult
    shape: tuple[int, ...]
    """Of the latents of a micro-batch."""
    seconds: float
    """Time of the host."""
    data_wait: float
    """Seconds of `seconds` spent waiting for data."""


class Trainer:
    """One worker of a training stage. All workers call the same methods in the same order."""

    def __init__(self, task: Task, rank: int, workers: int):
        config = task.config.train
        self.task, self.rank, self.workers = task, rank, workers
        self.config, self.stage = config, task.stage_config
        os.environ["DS_ACCELERATOR"] = "cuda" if config.gpus_per_worker else "cpu"
        self.device = ray.train.torch.get_device()
        torch.set_num_threads(config.cpus_per_worker)

        self.pretrained = load_pretrained(**pretrained_sources(task.config))
        self.pretrained.scheduler = noise_schedule(self.pretrained.scheduler, **schedule_options(config))
        model = build_model(task, self.pretrained)
        use_fast_formats(self.device, model)
        self.engine = create_engine(model, config, self.stage, workers, task.deepspeed)
        # After DeepSpeed has placed the weights. ZeRO 3 gathers them in hooks, at which a graph would break.
        self.compiled = config.zero_stage < 3 and is_compiled(config.compile, self.device)
        if self.compiled:
            compile_tcan(self.engine.module)
        self.frozen = checkpoint.FrozenFingerprint(self.engine.module)
        self.state = checkpoint.load(self.engine)
        self.first_step = self.last_checkpoint = self.state["step"]
        self.scratch = Path(tempfile.gettempdir()) / f"tcan-{task.run_id}-{rank}"
        shutil.rmtree(self.scratch, ignore_errors=True)  # left by a worker that was killed

        self.loss_guard = LossGuard(config.loss_spike_factor, self.state, self.device)
        self.pending: list[PendingStep] = []
        # Flags are exchanged between the hosts, without the GPUs.
        self.host_group = None if self.device.type == "cpu" else dist.new_group(backend="gloo")
        self.heartbeat = Heartbeat(task.monitor, rank)
        # Only training poses get errors: the other samplers serve validation.
        errors = PoseErrors(config.pose_dropout, config.pose_jitter, config.pose_outliers)
        self.sampler = create_sampler(task, "train", self.stage.batch_size, errors)
        self.logger = RunLogger(task, rank, self.first_step)
        self.flops_meter = FlopsMeter(
            self.stage.batch_size // task.micro_batch,
            workers,
            peak_matmul_flops(self.device, self.engine.module.dtype),
        )
        self._create_validation()

    def _create_validation(self) -> None:
        self.validation: Validation | None = None
        self.validation_metrics: dict[str, float] = {}
        self.sample_images: SampleImages | None = None
        make_sampler = partial(create_sampler, self.task, mixed=True)
        if self.stage.sample_every:
            self.sample_images = SampleImages(make_sampler, self.task.stage, self.pretrained, self.device)
        samples = self.config.validation_samples
        if self.stage.validate_every and (held_out := validation_sampler(make_sampler, samples)):
            self.validation = Validation(held_out, samples)

    def run(self) -> None:
        """Train to the last step of the stage, or until the driver asks to stop."""
        if self.first_step >= self.stage.steps and not self.state.get("model"):
            self.save(self.first_step, is_last=True)  # train.stageN.steps was lowered since the last start
        profile = self._profiler()
        source = StepBatches(self.sampler, self.rank, self.workers, self.task.micro_batch)
        steps = range(self.first_step, self.stage.steps)
        pinned = self.device.type == "cuda"
        with prefetched(source, steps, data_processes(self.config), pinned) as upcoming:
            has_left_machine = False
            for step in steps:
                arm_watchdog(self.config.hang_timeout)
                began = time.perf_counter()
                batches = next(upcoming)
                data_wait = time.perf_counter() - began
                result = self.train_step(step, batches)
                shape, seconds = batches[0].latents.shape, time.perf_counter() - began
                self.pending.append(PendingStep(step + 1, result, shape, seconds, data_wait))

                is_last = step + 1 == self.stage.steps
                must_save = is_last or result.stop or (result.preempted and not has_left_machine)
                must_save |= (step + 1) % self.stage.checkpoint_every == 0
                # Before a checkpoint, so that none is saved after a step that stops the training.
                if (must_save or (step + 1) % self.config.log_every == 0) and self._synchronize():
                    break
                self._validate_if_due(step + 1, is_last)
                if must_save:
                    self.save(step + 1, is_last)
                    # Ray Train moves the workers when the machine goes: one checkpoint for that is enough.
                    has_left_machine |= result.preempted
                if profile:
                    profile.step()
                if result.stop:
                    break
        if profile:
            profile.stop()
        self.logger.flush()
        # Still under the watchdog: otherwise a finished worker would wait forever for one that hangs from here on.
        dist.barrier()

    def train_step(self, step: int, batches: list[Batch]) -> StepResult:
        """One optimizer step over this worker's micro-batches; skipped if the loss is NaN, inf or a spike, or if the norm of
        the gradient is NaN or inf.

        Does not synchronize with the device (DeepSpeed does, to clip the gradients).
        """
        lr = learning_rate(step, self.stage)
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = lr
        local_loss = torch.zeros((), device=self.device)
        if self.compiled:  # the operations of compiled networks cannot be counted while they run
            self.flops_meter.count_fake(self.engine.module, batches[0])
        for batch in batches:
            with self.flops_meter.counted(batch.latents.shape):
                loss = self.batch_loss(batch, self.config.snr_gamma)
                self.engine.backward(loss)
            local_loss += loss.detach() / len(batches)
            if batch is not batches[-1]:
                self.engine.step()  # counts the gradient accumulation
        stop = self.heartbeat.send(step + 1)
        preempted = ray.train.get_preemption_info() is not None
        stop, preempted = _any_worker(self.host_group, stop, preempted)
        mean_loss = local_loss.float() / self.workers
        dist.all_reduce(mean_loss)
        bad = self.loss_guard.check(mean_loss)
        grad_norm = optimizer_step(self.engine, bad)
        values = torch.stack([value.double() for value in (mean_loss, grad_norm, bad, self.loss_guard.mean)])
        return StepResult(values, lr, stop, preempted)

    def _synchronize(self) -> bool:
        """Copy the results of the pending steps to the host, check and log them; returns whether the training has to stop."""
        began = time.perf_counter()
        steps, self.pending = self.pending, []
        if not steps:
            return False
        rows = torch.stack([step.result.values for step in steps]).tolist()
        waited = (time.perf_counter() - began) / len(steps)  # for the device, which was behind the host
        logged: list[tuple[int, dict[str, float]]] = []
        for step, (loss, grad_norm, is_bad, mean_loss) in zip(steps, rows, strict=True):
            if is_bad:
                reason = LossGuard.reason(loss, mean_loss)
            elif not math.isfinite(grad_norm):
                reason, grad_norm = "the norm of the gradient is NaN or inf", math.nan
            else:
                reason = ""
            if reason and self._stop_at_bad_loss(step.number, reason):
                self.logger.steps(logged)
                return True
            seconds = step.seconds + waited
            metrics = {
                "loss": loss,
                "grad_norm": math.nan if is_bad else grad_norm,
                "lr": step.result.lr,
                "step_seconds": seconds,
                "data_wait_seconds": step.data_wait,
            }
            logged.append((step.number, metrics | self.flops_meter.metrics(seconds, step.shape)))
        self.logger.steps(logged)
        return False

    def batch_loss(self, batch: Batch, snr_gamma: float | None = None) -> Tensor:
        return batch_loss(self.engine, self.pretrained, batch, self.device, snr_gamma)

    def validate(self, step: int) -> None:
        """Compute and log the validation loss with the EMA weights, if there are any."""
        assert self.validation is not None
        # Without compilation for the shapes of the validation and of sample images.
        with ema_weights(self.engine), torch.compiler.set_stance("force_eager"):
            self.validation_metrics = self.validation.compute(self.batch_loss, self.device)
        self.logger.metrics(self.validation_metrics, step)

    def log_samples(self, step: int) -> None:
        """Render and log the sample images. Called by all workers: under ZeRO-3 each holds a shard of the weights."""
        assert self.sample_images is not None
        with ema_weights(self.engine), torch.compiler.set_stance("force_eager"):
            image, clip = self.sample_images.draw(self.engine.module)
        self.logger.samples(image, clip, step)

    def save(self, step: int, is_last: bool) -> None:
        """Save a checkpoint after `step` steps; the last one of a stage contains the model folder."""
        began = time.perf_counter()
        self.frozen.check()
        self.logger.flush()
        writer = partial(save_trained_model, self.task, self.engine, self.pretrained) if is_last else None
        metrics = {}
        if self.config.keep_checkpoints == "best":  # every checkpoint needs a score to be ranked
            metrics["validation_loss"] = self.validation_metrics.get("validation_loss", math.inf)
        state = {"step": step, "model": is_last, **self.loss_guard.state}
        checkpoint.save(self.engine, state, metrics, self.scratch, writer)
        self.last_checkpoint = step
        self.logger.metrics({"checkpoint_seconds": time.perf_counter() - began}, step)

    def _validate_if_due(self, step: int, is_last: bool) -> None:
        if self.validation and (is_last or step % self.stage.validate_every == 0):
            self.validate(step)
        if self.sample_images and (is_last or step % self.stage.sample_every == 0):
            self.log_samples(step)

    def _stop_at_bad_loss(self, step: int, reason: str) -> bool:
        """Report a NaN, inf or spiking loss; returns whether `train.on_bad_loss` says to stop."""
        videos = sorted({self.sampler.video(step - 1, i).video_id for i in range(self.stage.batch_size)})
        report = f"stage {self.task.stage}, step {step}: {reason}; videos {', '.join(videos)}"
        if self.config.on_bad_loss == "skip":
            if self.rank == 0:
                print(f"{report}: step skipped", flush=True)
            return False
        last = f"the last checkpoint is of step {self.last_checkpoint}" if self.last_checkpoint else None
        advice = "lower lr, check these videos, or set train.on_bad_loss to skip"
        message = f"{report}; {last or 'there is no checkpoint yet'}; {advice}"
        ray.get(self.task.monitor.abort.remote(message))
        return True

    def _profiler(self) -> torch.profiler.profile | None:
        """The started profiler of rank 0, if `train.profile_steps` asks for one."""
        if not self.config.profile_steps or self.rank:
            return None
        name = f"from_step_{self.first_step + 3:06d}"
        profile = profiler(self.config.profile_steps, lambda finished: self.logger.trace(finished, name))
        profile.start()
        return profile


def create_sampler(
    task: Task, split: Any, batch_size: int, errors: PoseErrors = NO_ERRORS, mixed: bool = False
) -> Sampler:
    """The sampler of a split ("train" or "validation") with the options of the task.

    Raises:
        UserError: no video of the split is long enough for the stage.
    """
    config = task.config.train
    # Validation reads its samples once.
    # Each process that creates batches has a copy of the store.
    copies = max(1, data_processes(config)) if split == "train" else 1
    disk_bytes = int(config.cache_disk_gb * 2**30) // copies if split == "train" else 0
    return Sampler(
        ClipStore(task.dataset, split, (config.clip_cache_mb << 20) // copies, disk_bytes),
        task.stage,
        seed=task.config.seed,
        batch_size=batch_size,
        size=None if task.buckets else task.config.size,
        vae_scaling_factor=task.vae_scaling_factor,
        stick_width=config.stick_width,
        frames=config.clip_frames,
        drop_reference=config.drop_reference,
        reference=config.stage1_reference if task.stage == 1 else config.stage2_reference,
        noise_offset=config.noise_offset,
        pose_errors=errors,
        mixed=mixed,
        draw=task.config.draw,
        pose_style=config.pose_style,
    )


def learning_rate(step: int, config: StageConfig) -> float:
    """Learning rate of a step, counted from 0: linear warm-up to `lr`, then constant."""
    return config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))


def _any_worker(group: dist.ProcessGroup | None, *flags: bool) -> tuple[bool, ...]:
    """For each flag whether any worker has set it; all workers get the same answer. group: exchanges CPU tensors."""
    counts = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(counts, group=group)
    return tuple(count > 0 for count in counts.tolist())
