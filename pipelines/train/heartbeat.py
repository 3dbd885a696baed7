"""Messages between the driver and the workers of a run; no training step waits for them."""

import os
import time
from typing import Any

import ray


class RunMonitor:
    """A Ray actor, one per run, that outlives replaced workers."""

    def __init__(self) -> None:
        self._stop = False
        self._abort_reason: str | None = None
        self._heartbeats: dict[int, tuple[int, str]] = {}  # rank -> (last step, process and host)
        self._last_heartbeat = time.monotonic()
        self._progress: tuple[int, str] | None = None
        self._micro_batch_limit: int | None = None

    def limit_micro_batch(self, limit: int) -> None:
        """Set the upper bound of `micro_batch: auto` for restarted workers."""
        self._micro_batch_limit = limit

    def micro_batch_limit(self) -> int | None:
        return self._micro_batch_limit

    def register(self, rank: int, workers: int) -> str | None:
        """Register a starting worker; returns the reason to abort, if there is one."""
        self._heartbeats = {
            known: heartbeat
            for known, heartbeat in self._heartbeats.items()
            if known < workers and known != rank
        }
        self._last_heartbeat = time.monotonic()
        return self._abort_reason

    def heartbeat(self, rank: int, step: int, location: str) -> bool:
        """Record that a worker has computed its gradients of a step; returns whether to save a checkpoint and stop."""
        self._heartbeats[rank] = (step, location)
        self._last_heartbeat = time.monotonic()
        return self._stop

    def is_training(self) -> bool:
        """Whether a worker has made a step since it started."""
        return bool(self._heartbeats)

    def report_progress(self, step: int, text: str) -> None:
        self._progress = (step, text)

    def progress(self) -> tuple[int, str] | None:
        """The last reported (step, text)."""
        return self._progress

    def stop(self) -> None:
        self._stop = True

    def abort(self, reason: str) -> None:
        """End the run for a reason that a restart would not fix. The driver reports it; restarted workers end at once."""
        self._abort_reason = self._abort_reason or reason

    def abort_reason(self) -> str | None:
        return self._abort_reason

    def hung_workers(self, seconds: float) -> str | None:
        """If there was no heartbeat for this long, a message with the workers behind the others, or all. Given once."""
        if not self._heartbeats or time.monotonic() - self._last_heartbeat < seconds:
            return None
        slowest = min(step for step, _ in self._heartbeats.values())
        hung = [
            f"worker {rank} ({location})"
            for rank, (step, location) in sorted(self._heartbeats.items())
            if step == slowest
        ]
        self._heartbeats = {}
        return f"no step for {seconds:g} s; {', '.join(hung)} hung after step {slowest}"


class Heartbeat:
    """Sends a worker's heartbeats to the `RunMonitor`."""

    def __init__(self, monitor: Any, rank: int):
        self._monitor, self._rank = monitor, rank
        self._location = f"pid {os.getpid()} on {os.uname().nodename}"
        self._reply: Any = None

    def send(self, step: int) -> bool:
        """Send a heartbeat; returns whether the driver wants to stop, as far as replies have arrived."""
        stop = False
        if self._reply is not None:
            if not ray.wait([self._reply], timeout=0)[0]:
                return False
            stop = ray.get(self._reply)
        self._reply = self._monitor.heartbeat.remote(self._rank, step, self._location)
        return stop
