"""How much a worker computes, of how much it could, and on what its time goes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Speed:
    """Operations of an optimizer step over all workers: multiplications and additions of matrix products, convolutions
    and attentions, forward and backward, of a frozen layer those that it takes part in. What gradient checkpointing
    computes again counts again.

    Counted in the first micro batch that this process takes, so no later step is slowed by it.

    micro_batches: of an optimizer step, over all workers. rate: what one worker's device can do (`peak_matmul_flops`).
    """

    def __init__(self, micro_batches: int, workers: int, rate: float | None):
        self._micro_batches, self._workers, self._rate = micro_batches, workers, rate
        self._operations = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around forward and backward of each micro batch."""
        if self._operations:
            yield
            return
        with _Counter() as counter:
            yield
        self._operations = self._micro_batches * counter.operations

    def metrics(self, seconds: float) -> dict[str, float]:
        """Of a step that took so long."""
        reached = self._operations / seconds
        values = {"tflops_per_second": reached / 1e12}
        if self._rate:
            values["mfu"] = reached / (self._workers * self._rate)
        return values


class _Counter(TorchDispatchMode):
    """Counts by torch's formulas, and only looks on: under its own FlopCounterMode gradients are rounded otherwise, and a
    run that goes on, whose first step comes later, would no longer equal one that was never stopped."""

    operations = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if formula := flop_registry.get(op.overloadpacket):
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        return result


def peak_matmul_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a GPU at the product of two large matrices, the most it can be had to do; None without a GPU."""
    if device.type != "cuda":
        return None
    size, repeats = 8192, 10
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a @ b
    began.record()
    for _ in range(repeats):
        a @ b
    ended.record()
    ended.synchronize()
    return 2 * size**3 * repeats / (began.elapsed_time(ended) / 1000)


def profiler(steps: int, ready: Callable[[torch.profiler.profile], None]) -> torch.profiler.profile:
    """Records so many steps, from the third on: the first is slower than all others. Its `step` is to be called after each
    step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=ready,
    )
