"""Resumable training loop for the mini weights: Muon and AdamW, with EMA.

It uses plain PyTorch, because it produces only the pretrained models of the preset. `pipelines.train` trains TCAN.
"""

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcan.atomic_write import atomic_write
from tcan.errors import UserError

EMA_DECAY = 0.995
SAVE_EVERY = 100  # steps
SAVE_SECONDS = 60.0
"""Least time between checkpoints. On a GPU, the recipe's steps take so little that checkpoints and metrics would dominate."""
LOG_EVERY = 25  # steps
MEASURED_STEPS = 8
"""Steps that are timed, for each thread that prepares batches, to convert minutes into steps. The steps of the first batches are not
timed, because all threads prepare these before the first step."""

PREFETCHED = {"cpu": 1, "cuda": 8}
"""Batches prepared at the same time, each in a thread. A GPU needs several: it computes a batch faster than one core prepares it."""

Batch = dict[str, Any]
"""Tensors, which are copied to the device, and other values, which are not."""


def print_line(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True)
class Setting:
    """Where and how long a part is trained; the defaults are the recipe."""

    device: str = "cpu"
    """On a GPU, the forward pass runs in bf16."""
    batch: int = 1
    """Factor of the number of images per step."""
    minutes: float | None = None
    """Duration instead of the recipe's number of steps."""
    log: Callable[[str], None] = print_line


RECIPE = Setting()


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest semi-orthogonal matrices with the Newton-Schulz iterations of Muon (Jordan et al., 2024).

    Args:
        matrices: `[N, rows, columns]`.
    """
    # Coefficients of Muon's quintic polynomial: fast, inexact convergence of the singular values.
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum SGD with orthogonalized updates (Muon), for weights of two or more dimensions.

    `torch.optim.Muon` accepts only two-dimensional weights. Here, convolutions are reshaped to `[out, in * kh * kw]`.
    Weights of equal shape are orthogonalized in one batch, which reduces the cost on a CPU.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            updates: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(buffer, group["momentum"]).flatten(1)
                updates.setdefault((nesterov.shape[0], nesterov.shape[1]), []).append((parameter, nesterov))
            for (rows, columns), pairs in updates.items():
                directions = orthogonalize(torch.stack([update for _, update in pairs]))
                # 0.2 sqrt(max) matches the update size of AdamW, so both use one learning rate (Moonlight, 2025).
                scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for (parameter, _), direction in zip(pairs, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction.view_as(parameter), alpha=-scale)


def learning_rate_factor(step: int, steps: int, warm_up: int = 30) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last 60 % of the steps."""
    return min((step + 1) / warm_up, 1.0, (steps - step) / (0.6 * steps))


def fit(
    name: str,
    module: nn.Module,
    batch_at: Callable[[int], Batch],
    loss_of: Callable[[int, Batch], Tensor],
    *,
    steps: int,
    lr: float,
    work: Path,
    setting: Setting = RECIPE,
    evaluate: Callable[[int, nn.Module], str] | None = None,
) -> nn.Module:
    """Train the parameters of `module` that require gradients, and return the EMA module, on the device of the setting.

    Batch and loss must depend on the step only, so that an interrupted run resumes with identical results.

    Args:
        name: name of the part. The run resumes from the checkpoint `work/name.pt` if it exists, with the number of steps
            with which it was started.
        batch_at: step -> batch in host memory; called in other threads while the device computes.
        loss_of: (step, batch on the device) -> scalar loss of `module`. `batch["steps"]` is the number of steps.
        steps: number of optimizer steps, if the setting has no duration.
        lr: peak learning rate of both optimizers.
        work: folder of the checkpoint.
        evaluate: (step, EMA module) -> text to log after every checkpoint, such as metrics.

    Raises:
        UserError: the checkpoint was written with another batch size; the loss is NaN or inf.
    """
    device = torch.device(setting.device)
    run = _Run(module.to(device), lr)
    start = 0
    checkpoint = work / f"{name}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        if saved["batch"] != setting.batch:
            raise UserError(
                f"{checkpoint}: was written with --batch {saved['batch']}, not {setting.batch}; set the same value, or use "
                "another work folder"
            )
        start, steps = saved["step"], saved["steps"]
        run.restore(saved)
        setting.log(f"{name}: resumes from step {start} of {steps}")
    elif setting.minutes is not None:
        seconds = run.seconds_per_step(batch_at, loss_of, device)
        steps = max(1, round(60 * setting.minutes / seconds))
        setting.log(f"{name}: {steps} steps of {seconds:.2f} s in {setting.minutes:.1f} minutes")

    start_time = saved_time = time.time()
    total = torch.zeros((), device=device)
    for step, batch in _batches(batch_at, range(start, steps), device):
        total += run.step(step, steps, batch, loss_of)
        done = step + 1
        if done % LOG_EVERY == 0:
            step_time = (time.time() - start_time) / (done - start)
            mean = total.item() / LOG_EVERY
            check_finite(mean, f"{name}: step {done}", checkpoint)
            setting.log(f"{name}: step {done}/{steps} loss {mean:.4f} {step_time:.2f} s/step")
            total.zero_()
        due = done % SAVE_EVERY == 0 and time.time() - saved_time >= SAVE_SECONDS
        if due or done == steps:
            check_finite(total.item(), f"{name}: step {done}", checkpoint)
            with atomic_write(checkpoint) as partial:
                torch.save({"step": done, "steps": steps, "batch": setting.batch, **run.state()}, partial)
            if evaluate is not None:
                setting.log(f"{name}: step {done} {evaluate(done, run.average)}")
            saved_time = time.time()
    return run.average


def check_finite(loss: float, where: str, checkpoint: Path) -> None:
    """Require a finite loss before the checkpoint is replaced: otherwise the weights are NaN, too.

    Raises:
        UserError: the loss is NaN or inf.
    """
    if not math.isfinite(loss):
        raise UserError(
            f"{where}: the loss is {loss}; rerun the command to resume from {checkpoint}, on a GPU with --device cpu, which "
            "computes in fp32, or use another --batch and work folder"
        )


def _batches(
    batch_at: Callable[[int], Batch], steps: range, device: torch.device
) -> Iterator[tuple[int, Batch]]:
    """The steps with their batches on the device; the next batches are prepared during a step."""

    def prepare(step: int) -> Batch:
        batch = batch_at(step)
        if device.type == "cuda":
            batch = {
                key: value.pin_memory() if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
        return batch | {"steps": steps.stop}

    workers = PREFETCHED[device.type]
    pool = ThreadPoolExecutor(workers)
    try:
        upcoming = deque(pool.submit(prepare, step) for step in steps[:workers])
        for step in steps:
            batch = upcoming.popleft().result()
            if step + workers in steps:
                upcoming.append(pool.submit(prepare, step + workers))
            yield step, {key: _upload(value, device) for key, value in batch.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _upload(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


class _Run:
    """Weights, EMA weights and optimizers of a training."""

    def __init__(self, module: nn.Module, lr: float):
        self.module, self.lr = module, lr
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.average = copy.deepcopy(module).requires_grad_(False).eval()
        pairs = zip(self.average.parameters(), module.parameters(), strict=True)
        self.averaged = [(mean, p) for mean, p in pairs if p.requires_grad]
        self.optimizers = self._new_optimizers()

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        matrices = [p for p in self.trained if p.ndim >= 2]
        vectors = [p for p in self.trained if p.ndim < 2]
        adamw = torch.optim.AdamW(vectors, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.0)
        return [Muon(matrices, lr=self.lr), adamw]

    def step(self, step: int, steps: int, batch: Batch, loss_of: Callable[[int, Batch], Tensor]) -> Tensor:
        """One optimizer step; returns the loss, without waiting for the device."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * learning_rate_factor(step, steps)
        device = self.trained[0].device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(step, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, parameter in self.averaged:
                mean.lerp_(parameter, 1 - decay)
        return loss.detach()

    def seconds_per_step(
        self,
        batch_at: Callable[[int], Batch],
        loss_of: Callable[[int, Batch], Tensor],
        device: torch.device,
    ) -> float:
        """Time some steps, then undo them."""
        before = copy.deepcopy(self.state())
        first = PREFETCHED[device.type]
        steps = first * (1 + MEASURED_STEPS)
        began = time.time()
        for step, batch in _batches(batch_at, range(steps), device):
            self.step(step, steps, batch, loss_of).item()  # waits for the device
            if step + 1 == first:
                began = time.time()
        seconds = (time.time() - began) / (steps - first)
        self.optimizers = self._new_optimizers()
        self.restore({**before, "optimizers": []})
        return seconds

    def state(self) -> dict[str, Any]:
        return {
            "trained": [p.data for p in self.trained],
            "average": [mean.data for mean, _ in self.averaged],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set everything that `state` contains; without "optimizers" these remain."""
        for tensor, value in zip(self.trained, state["trained"], strict=True):
            tensor.data.copy_(value)
        for (tensor, _), value in zip(self.averaged, state["average"], strict=True):
            tensor.data.copy_(value)
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=False):
            optimizer.load_state_dict(values)
