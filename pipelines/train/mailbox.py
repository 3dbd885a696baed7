"""Metrics and images of the workers on their way to the driver, which logs them to the MLflow run.

Workers need no access to MLflow, and no step waits for it. What a worker has flushed is stored on the driver's disk.
"""

import asyncio
import threading
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import tracking
from pipelines.gauges import TrainingGauges

TAKE_SECONDS = 1.0  # longest wait for messages
CLOSE_SECONDS = 30  # for the last messages; Ray may have been stopped
LOGGED_KEYS = ("loss", "validation_loss", "checkpoint_seconds")  # first key of each kind of metrics


class Mailbox:
    """A Ray actor that keeps messages until the driver has stored them."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, Any, Any]] = []
        self._stored = 0  # messages that the driver has stored and that are no longer here
        self._changed = asyncio.Condition()

    async def put(self, kind: str, value: Any, where: Any) -> None:
        """kind: "metrics" (value: metrics, where: step), "image" (array, (name, step)) or "file" (bytes, artifact path)."""
        async with self._changed:
            self._messages.append((kind, value, where))
            self._changed.notify_all()

    async def take(self, stored: int) -> list[tuple[str, Any, Any]]:
        """The messages after the first `stored` ones of the run, which are deleted; waits for up to `TAKE_SECONDS`."""
        async with self._changed:
            del self._messages[: stored - self._stored]
            self._stored = stored
            self._changed.notify_all()
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._messages), TAKE_SECONDS)
            except TimeoutError:
                return []
            return list(self._messages)

    async def flush(self) -> None:
        """Return when the driver has stored all messages that were put before."""
        async with self._changed:
            last = self._stored + len(self._messages)
            await self._changed.wait_for(lambda: self._stored >= last)


class Recorder:
    """Logs the messages of a mailbox to the run and to the gauges, in a thread of the driver.

    No step is logged twice: a step that is repeated after a restart was logged the first time. Ray does not guarantee the order
    of the messages, so the logged steps are a set.
    """

    def __init__(self, mailbox: Any, run: tracking.Run, gauges: TrainingGauges, resumed: bool) -> None:
        self._mailbox, self._run, self._gauges, self._stored = mailbox, run, gauges, 0
        self._logged: dict[str, set[int]] = {key: run.steps(key) if resumed else set() for key in LOGGED_KEYS}
        self._stop = threading.Event()
        self.error: Exception | None = None
        """The error that ended the thread, e.g. a full disk."""
        self._thread = threading.Thread(target=self._log, name="recorder", daemon=True)
        self._thread.start()

    def _log(self) -> None:
        try:
            while True:
                is_last = self._stop.is_set()
                messages = ray.get(self._mailbox.take.remote(self._stored))
                for kind, value, where in messages:
                    self._log_one(kind, value, where)
                if messages:
                    self._run.spool.sync()
                self._stored += len(messages)
                if is_last and not messages:
                    return
        except Exception as error:
            self.error = error

    def _log_one(self, kind: str, value: Any, where: Any) -> None:
        if kind == "metrics":
            logged = self._logged[next(iter(value))]
            if where not in logged:
                self._run.metrics(value, where)
                self._gauges.set(value, where)
                logged.add(where)
        elif kind == "image":
            self._run.image(value, *where)
        else:
            self._run.bytes(value, where)

    def close(self) -> None:
        """Log the remaining messages.

        Raises:
            OSError: they cannot be stored.
        """
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)
        if self.error:
            raise self.error


def on_driver_node(actor: type) -> Any:
    """Start an actor on the machine of this process, so that it lives as long as the job."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=node)(actor).remote()
