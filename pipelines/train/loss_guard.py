"""What stops a training that has gone wrong before it has cost more."""

import faulthandler
import math
from typing import Any

import torch

from pipelines.config import StageConfig, TrainConfig

SPIKE_AFTER, REMEMBERED = 20, 100  # steps: before the first spike can be told; of the running mean


class LossGuard:
    """Tells a loss that is no number, or many times its running mean. What it knows is part of the checkpoint: with
    `train.bad_loss = skip` it decides which steps are left out."""

    def __init__(self, spike: float, state: dict[str, Any]):
        self._spike = spike
        self._mean, self._steps = state.get("loss_mean", 0.0), state.get("loss_steps", 0)

    @property
    def state(self) -> dict[str, Any]:
        return {"loss_mean": self._mean, "loss_steps": self._steps}

    def fault(self, loss: float) -> str | None:
        """What is wrong with a step's loss; None, and it counts in the mean, when nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._spike and self._steps >= SPIKE_AFTER and loss > self._spike * self._mean:
            return f"the loss is {loss:.4g}, {loss / self._mean:.0f} times its mean of the steps before"
        self._steps += 1
        self._mean += (loss - self._mean) / min(self._steps, REMEMBERED)
        return None


def arm(seconds: float) -> None:
    """Ends this worker, after it has written where each thread stands, unless it is armed again within the time.

    In C, so also when a thread hangs with Python's lock held; the other workers, waiting for this one, end likewise,
    and Ray Train starts all of them anew from the last checkpoint.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)


disarm = faulthandler.cancel_dump_traceback_later


def out_of_memory(
    error: BaseException, config: TrainConfig, stage_config: StageConfig, stage: int
) -> str | None:
    """What to change when that is what an error means."""
    text = str(error)
    if (
        not isinstance(error, torch.OutOfMemoryError)
        and "allocate memory" not in text
        and "not enough memory" not in text
    ):
        return None
    advice = []
    if stage_config.micro_batch > 1:
        advice.append(f"lower train.stage{stage}.micro_batch ({stage_config.micro_batch})")
    if not config.gradient_checkpointing:
        advice.append("set train.gradient_checkpointing")
    if config.precision == "fp32":
        advice.append("set train.precision to bf16")
    if config.zero_stage < 3:
        advice.append(f"raise train.zero_stage ({config.zero_stage}), with more train.workers")
    advice.append("offload the optimizer by train.deepspeed")
    return f"stage {stage}: out of memory; {', or '.join(advice)}; the same command then goes on from the last checkpoint"
