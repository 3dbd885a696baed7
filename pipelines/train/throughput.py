"""FLOP/s and MFU of a training, and traces of torch's profiler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipelines.train.data import Batch
from tcan.model import TCAN, diffusion_loss

Shape = tuple[int, ...]


class FlopsMeter:
    """FLOP/s and MFU (model FLOPs utilization) of optimizer steps over all workers.

    Counts matrix products, convolutions and attention, forward and backward; of a frozen layer only the passes it takes
    part in. Recomputation by gradient checkpointing counts too. Only the first micro-batch of each shape is counted, so
    later steps are not slowed down.

    micro_batches: per optimizer step, over all workers. peak_flops: of one worker's device (`peak_matmul_flops`).
    """

    def __init__(self, micro_batches: int, workers: int, peak_flops: float | None):
        self._micro_batches, self._workers, self._peak_flops = micro_batches, workers, peak_flops
        self._flops_per_step: dict[Shape, int] = {}

    @contextmanager
    def counted(self, shape: Shape) -> Iterator[None]:
        """Context of the forward and backward pass of each micro-batch; shape: of its latents."""
        if shape in self._flops_per_step:
            yield
            return
        with _FlopCounter() as counter:
            yield
        self._flops_per_step[shape] = self._micro_batches * counter.flops

    def count_fake(self, model: TCAN, batch: Batch) -> None:
        """Count a micro-batch of a new shape on fake tensors, which takes seconds and neither device memory nor device time."""
        shape, device = batch.latents.shape, model.device
        if shape in self._flops_per_step:
            return
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, _FlopCounter() as counter, torch.compiler.set_stance("force_eager"):
            latents = torch.empty(shape, device=device)
            pose = torch.empty(*shape[:2], 3, 8 * shape[-2], 8 * shape[-1], device=device)
            timestep = torch.zeros(shape[0], dtype=torch.int64, device=device)
            loss = diffusion_loss(model, DDIMScheduler(), latents, latents, timestep, pose, latents[:, 0])
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, trained, allow_unused=True)
        self._flops_per_step[shape] = self._micro_batches * counter.flops

    def metrics(self, seconds: float, shape: Shape) -> dict[str, float]:
        """`tflops_per_second` over all workers, and `mfu` (0 to 1), of a step of this duration; shape: of its micro-batches."""
        flops_per_second = self._flops_per_step[shape] / seconds
        values = {"tflops_per_second": flops_per_second / 1e12}
        if self._peak_flops:
            values["mfu"] = flops_per_second / (self._workers * self._peak_flops)
        return values


class _FlopCounter(TorchDispatchMode):
    """Counts by torch's formulas without changing how operations run.

    torch's FlopCounterMode decomposes operations, which changes the rounding of gradients: a resumed run, which counts
    at another step, would no longer equal an uninterrupted one.
    """

    flops = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if formula := flop_registry.get(op.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def peak_matmul_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Measured FLOP/s of a GPU for a product of two 8192 x 8192 matrices; None without a GPU."""
    if device.type != "cuda":
        return None
    size, repeats = 8192, 10
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a @ b
    start.record()
    for _ in range(repeats):
        a @ b
    end.record()
    end.synchronize()
    return 2 * size**3 * repeats / (start.elapsed_time(end) / 1000)


def profiler(steps: int, on_ready: Callable[[torch.profiler.profile], None]) -> torch.profiler.profile:
    """A profiler that records `steps` steps from the third on; the first step is slower than all others.

    Call its `step` after each training step.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=on_ready,
    )
