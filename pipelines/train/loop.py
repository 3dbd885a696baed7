"""What each worker of Ray Train does: build TCAN, wrap it in a DeepSpeed engine, take steps, report checkpoints."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines import tracking
from pipelines.config import Config, StageConfig, TrackingConfig, TrainConfig
from pipelines.train import checkpoint
from pipelines.train.data import Batch, ClipStore, Sampler
from pipelines.train.engine import averaged, make_engine
from tcan.errors import UserError
from tcan.model import TCAN, diffusion_loss
from tcan.schedule import noise_schedule
from tcan.weights import Bases, load_bases, load_model, portable_source, save_model

PICTURE_SAMPLES = {1: 4, 2: 1}  # rows of a sample picture, by stage
PICTURE_COLUMNS = 4  # of these frames of a clip, evenly spaced
PICTURE_STEPS = 10  # DDIM steps: enough to judge by, few enough not to matter


@dataclass(frozen=True)
class Task:
    """What the driver tells every worker."""

    config: Config
    stage: int
    dataset: str
    vae_scaling_factor: float
    from_model: str | None
    """Model folder to start from; None: the bases alone."""
    tracking: TrackingConfig
    run_id: str
    deepspeed: dict[str, Any]
    """The user's own DeepSpeed settings."""
    model_info: dict[str, Any]
    """Written into the model folder beside the rest."""


def run_worker(settings: dict[str, Task]) -> None:
    """Ray Train's function: from the last checkpoint, if any, to the end of the stage.

    Raises FloatingPointError when the loss is no number, RuntimeError when a frozen parameter has changed.
    """
    task = settings["task"]
    config, stage_config = task.config.train, stage_of(task.config, task.stage)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    os.environ["DS_ACCELERATOR"] = "cuda" if config.gpus_per_worker else "cpu"
    device = ray.train.torch.get_device()
    torch.set_num_threads(config.cpus_per_worker)

    bases = load_bases(**bases_sources(task.config))
    bases.scheduler = noise_schedule(bases.scheduler, **schedule_options(config))
    engine = make_engine(_model(task, bases), config, stage_config, workers, task.deepspeed)
    frozen = checkpoint.FrozenFingerprint(engine.module)
    done = checkpoint.load(engine)["step"]

    sampler = _sampler(task, stage_config, "train")
    log = _Log(task, stage_config, rank, done)
    pictures = _Pictures(task, bases, device) if stage_config.picture_every else None
    ahead = ThreadPoolExecutor(1, "data")
    share = (rank, workers, stage_config.micro_batch)
    upcoming = ahead.submit(sampler.worker_batches, done, *share)
    for step in range(done, stage_config.steps):
        began = time.perf_counter()
        batches = upcoming.result()
        waited = time.perf_counter() - began
        upcoming = ahead.submit(sampler.worker_batches, step + 1, *share)

        lr = learning_rate(step, stage_config)
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for batch in batches:
            part = _loss(engine, bases, batch, device, config.snr_gamma)
            engine.backward(part)
            engine.step()  # an optimizer step at the last of them
            loss += part.detach() / len(batches)
        log.step(step + 1, loss, engine.get_global_grad_norm(), lr, time.perf_counter() - began, waited)

        last = step + 1 == stage_config.steps
        if pictures and (last or (step + 1) % stage_config.picture_every == 0):
            # By all workers: under ZeRO-3 each holds a part of the weights.
            with averaged(engine):
                log.picture(pictures.draw(engine.module), step + 1)
        if last or (step + 1) % stage_config.checkpoint_every == 0:
            frozen.check()
            log.flush(step + 1)
            writer = _model_writer(task, engine, bases) if last else None
            checkpoint.save(engine, {"step": step + 1}, {"loss": log.last_loss}, writer)
    ahead.shutdown(cancel_futures=True)
    log.close()


def stage_of(config: Config, stage: int) -> StageConfig:
    return config.train.stage1 if stage == 1 else config.train.stage2


def bases_sources(config: Config) -> dict[str, str]:
    """What `tcan.weights.load_bases` takes: training needs no pose network."""
    sources = dataclasses.asdict(config.bases)
    del sources["pose"]
    return sources


def schedule_options(config: TrainConfig) -> dict[str, Any]:
    """What `tcan.schedule.noise_schedule` takes, and the model folder keeps as "schedule"."""
    return {"prediction_type": config.prediction_type, "zero_terminal_snr": config.zero_terminal_snr}


def learning_rate(step: int, config: StageConfig) -> float:
    """Of the step with this number, from 0: rises linearly to `lr` over the warm-up, then constant."""
    return config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))


# --- model and engine ------------------------------------------------------------------------------------------------


def _model(task: Task, bases: Bases) -> TCAN:
    config = task.config.train
    torch.manual_seed(task.config.seed)  # of APPA's first weights
    if task.from_model:
        model = load_model(task.from_model, bases)
    else:
        model = TCAN(
            bases.unet,
            bases.controlnet,
            bases.motion_adapter,
            bases.empty_prompt,
            config.lora_rank,
            config.lora_alpha,
        )
    model.set_stage(task.stage)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    # The buffers too: DeepSpeed converts parameters alone.
    return model.to(torch.bfloat16 if config.precision == "bf16" else torch.float32).train()


def _sampler(task: Task, stage: StageConfig, split: Any) -> Sampler:
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
    )


def _on(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on the device; pose float32 `[B, F, 3, H, W]` in [0, 1]."""
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors = {key: tensor.to(device, non_blocking=True) for key, tensor in tensors.items()}
    tensors["pose"] = tensors["pose"].movedim(-1, 2).float() / 255
    return tensors


def _loss(engine: Any, bases: Bases, batch: Batch, device: torch.device, snr_gamma: float | None) -> Tensor:
    t = _on(batch, device)
    return diffusion_loss(
        engine,
        bases.scheduler,
        t["latents"],
        t["noise"],
        t["timestep"],
        t["pose"],
        t["reference"],
        t["keep_reference"],
        snr_gamma,
    )


def _model_writer(task: Task, engine: Any, bases: Bases) -> Callable[[Path], None]:
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
                    bases=bases.info | {"pose": {"source": portable_source(task.config.bases.pose)}},
                    stage=task.stage,
                    height=task.config.size,
                    width=task.config.size,
                    stick_width=task.config.train.stick_width,
                    **task.model_info,
                )

    return write


# --- what can be seen ------------------------------------------------------------------------------------------------


class _Log:
    """Numbers of every step: into the run from rank 0, by a thread so that no step waits; a line now and then.

    The losses of all workers are averaged only when a line is due: an exchange a line, not one a step.
    """

    def __init__(self, task: Task, stage: StageConfig, rank: int, done: int):
        self._task, self._stage, self._rank = task, stage, rank
        self._pending: list[tuple[int, Tensor, dict[str, float]]] = []
        self._writer = ThreadPoolExecutor(1, "tracking")
        self._written = [self._writer.submit(self._attach)] if rank == 0 else []
        self._began, self._done_before = time.perf_counter(), done
        self.last_loss = math.nan

    def _attach(self) -> None:
        self._run = tracking.attach(self._task.tracking, self._task.run_id)

    def step(self, step: int, loss: Tensor, grad_norm: Any, lr: float, seconds: float, waited: float) -> None:
        values = {
            "grad_norm": float(grad_norm),
            "lr": lr,
            "samples_per_second": self._stage.batch_size / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
        }
        self._pending.append((step, loss, values))
        if step % self._task.config.train.log_every == 0 or step == self._stage.steps:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Called by all workers at the same step."""
        if not self._pending:
            return
        losses = torch.stack([loss for _, loss, _ in self._pending])
        dist.all_reduce(losses)
        losses = (losses / dist.get_world_size()).tolist()
        rows = [
            (at, {"loss": loss, **values})
            for (at, _, values), loss in zip(self._pending, losses, strict=True)
        ]
        self._pending = []
        self.last_loss = losses[-1]
        if self._rank == 0:
            self._written.append(self._writer.submit(self._write, rows))
            self._print(step, rows)
        for at, values in rows:
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"stage {self._task.stage}: the loss is {values['loss']} at step {at}"
                )

    def _write(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        for step, values in rows:
            self._run.metrics(values, step)

    def _print(self, step: int, rows: list[tuple[int, dict[str, float]]]) -> None:
        mean = {key: sum(values[key] for _, values in rows) / len(rows) for key in rows[0][1]}
        left = (time.perf_counter() - self._began) / (step - self._done_before) * (self._stage.steps - step)
        print(
            f"stage {self._task.stage}: step {step}/{self._stage.steps}  loss {mean['loss']:.4f}  "
            f"gradient {mean['grad_norm']:.3f}  {self._stage.batch_size / mean['step_seconds']:.1f} samples/s  "
            f"data wait {mean['data_wait_seconds'] / mean['step_seconds']:.1%}  "
            f"{int(left) // 60}:{int(left) % 60:02d} left",
            flush=True,
        )

    def picture(self, picture: np.ndarray, step: int) -> None:
        if self._rank == 0:
            self._written.append(self._writer.submit(lambda: self._run.picture(picture, "samples", step)))

    def close(self) -> None:
        """Waits for what is still being written; an error of it comes out here."""
        self._writer.shutdown()
        for written in self._written:
            written.result()


class _Pictures:
    """Fixed samples of the validation split (of the train split when that has none) as pictures, one row a sample:
    reference, then pose, prediction and truth of a few frames. Without guidance: the model as it is."""

    def __init__(self, task: Task, bases: Bases, device: torch.device):
        samples = PICTURE_SAMPLES[task.stage]
        stage = dataclasses.replace(stage_of(task.config, task.stage), batch_size=samples)
        try:
            sampler = _sampler(task, stage, "validation")
        except UserError:
            sampler = _sampler(task, stage, "train")
        self._batch, self._device = sampler.batch(0, range(samples)), device
        self._vae = bases.vae.to(device)
        self._scheduler = type(bases.scheduler).from_config(bases.scheduler.config)
        self._scheduler.set_timesteps(PICTURE_STEPS, device=device)
        self._truth = self._decode(self._batch.latents)
        self._reference = self._decode(self._batch.reference[:, None])

    @torch.no_grad()
    def draw(self, model: nn.Module) -> np.ndarray:
        """uint8 [H, W, 3]."""
        t = _on(self._batch, self._device)
        latents = t["noise"]
        for step in self._scheduler.timesteps:
            eps = model(latents, step.expand(len(latents)), t["pose"], t["reference"])
            latents = self._scheduler.step(eps.float(), step, latents).prev_sample
        prediction = self._decode(latents)
        frames = sorted({round(i) for i in np.linspace(0, latents.shape[1] - 1, PICTURE_COLUMNS)})
        pose = self._batch.pose.numpy()
        rows = [
            [self._reference[i, 0], *(part[i, f] for f in frames for part in (pose, prediction, self._truth))]
            for i in range(len(latents))
        ]
        return np.concatenate([np.concatenate(row, axis=1) for row in rows])

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> np.ndarray:
        """Scaled latents [B, F, 4, h, w] -> uint8 [B, F, H, W, 3]."""
        shape = latents.shape[:2]
        unscaled = latents.flatten(0, 1).to(self._device, self._vae.dtype) / self._vae.config.scaling_factor
        pictures = torch.cat([self._vae.decode(frame[None]).sample for frame in unscaled])
        pictures = ((pictures.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pictures.unflatten(0, shape).movedim(2, -1).cpu().numpy()
