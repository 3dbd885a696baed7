"""Where the driver and the workers of a run leave word for each other, without a step waiting for it."""

import os
import time
from typing import Any

import ray


class Watch:
    """An actor of Ray, one a run, that outlives the workers that are replaced."""

    def __init__(self) -> None:
        self._stop = False
        self._verdict: str | None = None
        self._beats: dict[
            int, tuple[int, str]
        ] = {}  # rank -> the step it was last seen at, and where it runs
        self._last = time.monotonic()
        self._progress: tuple[int, str] | None = None

    def begin(self, rank: int, workers: int) -> str | None:
        """A worker starts; returns why none should, if so."""
        self._beats = {
            known: beat for known, beat in self._beats.items() if known < workers and known != rank
        }
        self._last = time.monotonic()
        return self._verdict

    def beat(self, rank: int, step: int, where: str) -> bool:
        """A worker has this step's data and gradients of its own; returns whether to make a checkpoint and stop."""
        self._beats[rank] = (step, where)
        self._last = time.monotonic()
        return self._stop

    def tell(self, step: int, text: str) -> None:
        """A worker has done this step, and how it goes."""
        self._progress = (step, text)

    def progress(self) -> tuple[int, str] | None:
        """The last that was told, if anything."""
        return self._progress

    def stop(self) -> None:
        self._stop = True

    def give_up(self, reason: str) -> None:
        """What no new start would mend: the driver says it, and workers that are started again end at once."""
        self._verdict = self._verdict or reason

    def verdict(self) -> str | None:
        return self._verdict

    def late(self, seconds: float) -> str | None:
        """Who is to blame if no worker was seen for so long: those that are behind the others, else all. Said once."""
        if not self._beats or time.monotonic() - self._last < seconds:
            return None
        first = min(step for step, _ in self._beats.values())
        behind = [
            f"worker {rank} ({where})" for rank, (step, where) in sorted(self._beats.items()) if step == first
        ]
        self._beats = {}
        return f"no step for {seconds:g} s; {', '.join(behind)} hung after step {first}"


class Pulse:
    """A worker's side of it."""

    def __init__(self, watch: Any, rank: int):
        self._watch, self._rank = watch, rank
        self._where = f"pid {os.getpid()} on {os.uname().nodename}"
        self._asked: Any = None

    def beat(self, step: int) -> bool:
        """Says where this worker is; returns whether the driver wants to stop, as far as that is known by now."""
        stop = False
        if self._asked is not None:
            if not ray.wait([self._asked], timeout=0)[0]:
                return False
            stop = ray.get(self._asked)
        self._asked = self._watch.beat.remote(self._rank, step, self._where)
        return stop
