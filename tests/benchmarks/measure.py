"""Times and memory, side by side: every figure is a ratio to a named alternative, of one run on one machine."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """A line of RESULTS.md."""

    what: str
    value: str
    note: str = ""


def seconds(run: Run, device: str = "cpu") -> float:
    """Of one run. On a CPU those that the process itself was at work: what else the machine does counts little."""
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
    """Of two times taken beside each other, round after round."""

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
        return f"middle half of {len(self.rounds)} rounds {low:.2f} to {high:.2f}"


def side_by_side(sides: dict[str, Run], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every side, round after round: all run in turn, to and fro, so that noise meets all of them.

    A round before the first warms up, but where only one is wanted: that is of minutes.
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
    """The most memory that a run takes beside what was there before.

    On a CPU by torch's own allocator, every allocation and release as the profiler records them; on a GPU by its
    allocator's own count.
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
    """Of modules' parameters and buffers, and of optimizers' states."""
    total = 0
    for owner in owners:
        if isinstance(owner, torch.optim.Optimizer):
            tensors = [x for state in owner.state.values() for x in state.values() if torch.is_tensor(x)]
        else:
            tensors = [*owner.parameters(), *owner.buffers()]
        total += sum(x.numel() * x.element_size() for x in tensors)
    return total
