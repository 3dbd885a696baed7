"""Checks that stop a training that has gone wrong: bad losses, hanging workers, exhausted memory."""

import faulthandler
import math
from typing import Any

import torch
from torch import Tensor

from pipelines.config import StageConfig, TrainConfig

SPIKE_AFTER = 20  # steps before the first spike can be detected
MEAN_STEPS = 100  # steps of the running mean


class LossGuard:
    """Detects a NaN or inf loss, and a loss far above its running mean, on the loss's device without a host synchronization.

    The running mean is part of the checkpoint, because with `train.on_bad_loss = skip` it decides which steps are skipped.

    spike_factor: a loss above this many times the mean is a spike; 0 disables the check.
    """

    def __init__(self, spike_factor: float, state: dict[str, Any], device: torch.device | str = "cpu"):
        self._spike_factor = spike_factor
        self.mean = torch.full((), state.get("loss_mean", 0.0), dtype=torch.float64, device=device)
        """Running mean of the good losses."""
        self._steps = torch.full((), state.get("loss_steps", 0), dtype=torch.int64, device=device)

    @property
    def state(self) -> dict[str, Any]:
        """State for a checkpoint. Synchronizes with the device."""
        return {"loss_mean": self.mean.item(), "loss_steps": int(self._steps.item())}

    def check(self, loss: Tensor) -> Tensor:
        """Whether a step's loss (a scalar) is bad: a bool scalar. A good loss updates the running mean."""
        loss = loss.double()
        bad = ~loss.isfinite()
        if self._spike_factor:
            bad |= (self._steps >= SPIKE_AFTER) & (loss > self._spike_factor * self.mean)
        self._steps = self._steps + ~bad
        change = (loss - self.mean) / self._steps.clamp(1, MEAN_STEPS)
        self.mean = self.mean + torch.where(bad, 0.0, change)
        return bad

    @staticmethod
    def reason(loss: float, mean: float) -> str:
        """What is wrong with a bad loss. mean: the running mean."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        return f"the loss is {loss:.4g}, {loss / mean:.0f} times its running mean"


def arm_watchdog(seconds: float) -> None:
    """End this process after this time, with the stack of each thread on stderr, unless it is armed again before.

    It runs in C, so it also ends a process in which a thread hangs with the GIL held. The other workers, which wait for
    this one, end likewise, and Ray Train restarts all of them from the last checkpoint.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)


disarm_watchdog = faulthandler.cancel_dump_traceback_later


def is_out_of_memory(error: BaseException) -> bool:
    """Whether device or main memory is exhausted; for main memory, torch raises a RuntimeError."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text or "not enough memory" in text
    )


def out_of_memory(
    error: BaseException, config: TrainConfig, stage_config: StageConfig, stage: int
) -> str | None:
    """If the error means that memory is exhausted: a message with the settings to change."""
    if not is_out_of_memory(error):
        return None
    advice = []
    if stage_config.micro_batch != 1:
        advice.append(f"lower train.stage{stage}.micro_batch ({stage_config.micro_batch})")
    if not config.gradient_checkpointing:
        advice.append("set train.gradient_checkpointing")
    if config.precision == "fp32":
        advice.append("set train.precision to bf16")
    if config.zero_stage < 3:
        advice.append(f"raise train.zero_stage ({config.zero_stage}), with more train.workers")
    advice.append("offload the optimizer by train.deepspeed")
    return f"stage {stage}: out of memory; {', or '.join(advice)}, and rerun; it resumes from the last checkpoint"
