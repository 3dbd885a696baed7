"""Time and memory, measured side by side: every figure is a ratio to a named baseline, from one run on one machine."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One row of RESULTS.md."""

    what: str
    value: str
    note: str = ""


def seconds(run: Run, device: str = "cpu") -> float:
    """Duration of one run in seconds. On a CPU, the CPU time of the process, so that other load has little effect."""
    if device == "cpu":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Ratio:
    """Ratios of two times, one per round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        return f"{self.median:.2f}"

    @property
    def spread(self) -> str:
        if len(self.rounds) == 1:
            return "one round"
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return f"interquartile range {low:.2f} to {high:.2f}, {len(self.rounds)} rounds"


def side_by_side(sides: dict[str, Run], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each alternative in each round. All run in turn, in alternating order, so that noise affects all of them.

    One warm-up round is discarded, except if `rounds` is 1, because such a round takes minutes.
    """
    warm_up = int(rounds > 1)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + warm_up):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            times[name].append(seconds(sides[name], device))
    return {name: values[warm_up:] for name, values in times.items()}


def ratio(times: dict[str, list[float]], numerator: str, denominator: str) -> Ratio:
    return Ratio([a / b for a, b in zip(times[numerator], times[denominator], strict=True)])


def peak_bytes(run: Run, device: str = "cpu") -> int:
    """Peak memory of a run in bytes, relative to before the run.

    On a CPU, from torch's allocations and releases as recorded by the profiler; on a GPU, from the statistics of the
    caching allocator.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def tensor_bytes(*owners: Any) -> int:
    """Bytes of the parameters and buffers of modules, and of the states of optimizers."""
    total = 0
    for owner in owners:
        if isinstance(owner, torch.optim.Optimizer):
            tensors = [x for state in owner.state.values() for x in state.values() if torch.is_tensor(x)]
        else:
            tensors = [*owner.parameters(), *owner.buffers()]
        total += sum(x.numel() * x.element_size() for x in tensors)
    return total
