"""Metrics, sample images and traces of a training, sent to the driver for MLflow, and progress lines on the terminal."""

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from pipelines.train.task import Task
from tcan.video import write_video

CLIP_FPS = 8  # of the sample clips
BAR_SECONDS = 0.5  # between updates of the progress bar


class RunLogger:
    """Sends the metrics of every step from rank 0 to the driver's mailbox; no step waits. Reports progress as lines or to the
    driver's progress bar.

    first_step: number of steps before this start.
    """

    def __init__(self, task: Task, rank: int, first_step: int):
        self._task, self._stage, self._rank = task, task.stage_config, rank
        self._unreported: list[tuple[int, dict[str, float]]] = []
        self._started_at, self._first_step = time.perf_counter(), first_step
        self._last_report = -BAR_SECONDS
        self._sent: list[ray.ObjectRef] = []  # since the last flush

    def steps(self, steps: list[tuple[int, dict[str, float]]]) -> None:
        """Log (step, metrics) of adjacent steps and report their means. Metrics: loss, grad_norm, step_seconds,
        data_wait_seconds, ...
        """
        memory = _peak_memory() / 1e9
        for step, metrics in steps:
            metrics["samples_per_second"] = self._stage.batch_size / metrics["step_seconds"]
            metrics["memory_gb"] = memory
            self.metrics(metrics, step)
        if self._rank == 0 and steps:
            self._unreported += steps
            if self._is_report_due(steps[-1][0]):
                self._report()

    def metrics(self, metrics: dict[str, float], step: int) -> None:
        self._send("metrics", metrics, step)

    def _send(self, kind: str, value: Any, where: Any) -> None:
        if self._rank == 0:
            self._sent.append(self._task.mailbox.put.remote(kind, value, where))

    def flush(self) -> None:
        """Wait until the driver has stored everything that was sent.

        Called before a checkpoint: a run that resumes from it does not compute these metrics again.
        """
        if self._rank == 0:
            ray.get(self._sent)  # Ray may run `flush` before calls that were made earlier
            self._sent = []
            ray.get(self._task.mailbox.flush.remote())

    def _is_report_due(self, step: int) -> bool:
        if step == self._stage.steps:
            return True
        if self._task.show_bar:
            return time.perf_counter() - self._last_report >= BAR_SECONDS
        return step % self._task.config.train.log_every == 0

    def _report(self) -> None:
        """Report the means of the steps since the last report."""
        step, rows = self._unreported[-1][0], [metrics for _, metrics in self._unreported]
        self._unreported = []
        mean = {key: sum(metrics[key] for metrics in rows) / len(rows) for key in rows[0]}
        text = (
            f"loss {mean['loss']:.4f}  grad norm {mean['grad_norm']:.3f}  "
            f"{self._stage.batch_size / mean['step_seconds']:.1f} samples/s  "
            f"data wait {mean['data_wait_seconds'] / mean['step_seconds']:.1%}"
        )
        self._last_report = time.perf_counter()
        if self._task.show_bar:
            self._task.monitor.report_progress.remote(step, text)
            return
        seconds_per_step = (self._last_report - self._started_at) / (step - self._first_step)
        remaining = int(seconds_per_step * (self._stage.steps - step))
        print(
            f"stage {self._task.stage}: step {step}/{self._stage.steps}  {text}  "
            f"{remaining // 60}:{remaining % 60:02d} remaining",
            flush=True,
        )

    def samples(self, image: np.ndarray, clip: np.ndarray, step: int) -> None:
        """Log a sample image uint8 `[H, W, 3]`, and the clip uint8 `[F, H, W, 3]` as a video if it has several frames."""

        if self._rank:
            return
        self._send("image", image, ("samples", step))
        if len(clip) > 1:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"step_{step:06d}.mp4"
                write_video(iter(clip), path, CLIP_FPS)
                self._send("file", path.read_bytes(), f"clips/{path.name}")

    def trace(self, profile: torch.profiler.profile, name: str) -> None:
        """Log a profiler trace as the artifact profile/NAME.json.gz, for ui.perfetto.dev. Only called on rank 0."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.json.gz"
            profile.export_chrome_trace(str(path))
            self._send("file", path.read_bytes(), f"profile/{path.name}")


def _peak_memory() -> int:
    """Peak memory of this worker in bytes: on the GPU if there is one, else in host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
