"""System metrics of a run: CPU, memory, disk, network and GPU, measured by MLflow's monitors."""

import threading
from collections.abc import Callable
from contextlib import suppress

SECONDS = 5  # gives a curve for a run of one minute at negligible cost for a run of days


class SystemMetrics:
    """Collects metrics `system/*` in a thread, every `SECONDS`.

    Args:
        log: called with the metrics and their step.
        first_step: step of the first metrics.
    """

    def __init__(self, log: Callable[[dict[str, float], int], None], first_step: int) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._log, self._step, self._stop = log, first_step, threading.Event()
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # no GPU, or no package to monitor it
            self._monitors.append(GPUMonitor())
        self._thread = threading.Thread(target=self._measure, name="system metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _measure(self) -> None:
        while not self._stop.wait(SECONDS):
            values: dict[str, float] = {}
            for monitor in self._monitors:
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            with suppress(OSError):  # a full disk; the job will report it
                self._log({f"system/{key}": value for key, value in values.items()}, self._step)
            self._step += 1

    def finish(self) -> None:
        self._stop.set()
        self._thread.join()
