"""Metrics, sample images and traces of a training in MLflow, and progress lines on the terminal."""

import resource
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pipelines import tracking
from pipelines.train.task import Task
from tcan.video import write_video

CLIP_FPS = 8  # of the sample clips
BAR_SECONDS = 0.5  # between updates of the progress bar


class RunLogger:
    """Logs all steps to the MLflow run, from rank 0 and in a thread, so that no step waits. Reports progress as lines or to
    the driver's progress bar.

    No step is logged twice: a step that is repeated after a restart was logged the first time.

    first_step: number of steps before this start.
    """

    def __init__(self, task: Task, rank: int, first_step: int):
        self._task, self._stage, self._rank = task, task.stage_config, rank
        self._unreported: list[tuple[int, dict[str, float]]] = []
        self._writer = ThreadPoolExecutor(1, "tracking")
        self._pending: list[Future] = [self._writer.submit(self._attach)] if rank == 0 else []
        self._started_at, self._first_step = time.perf_counter(), first_step
        self._last_report = -BAR_SECONDS

    def _attach(self) -> None:
        self._run = tracking.attach(self._task.tracking, self._task.run_id)
        self._last_logged = {
            key: self._run.last_step(key) for key in ("loss", "validation_loss", "checkpoint_seconds")
        }

    def steps(self, steps: list[tuple[int, dict[str, float]]]) -> None:
        """Log (step, metrics) of adjacent steps and report their means. Metrics: loss, grad_norm, step_seconds,
        data_wait_seconds, ...
        """
        memory = _peak_memory() / 1e9
        for _, metrics in steps:
            metrics["samples_per_second"] = self._stage.batch_size / metrics["step_seconds"]
            metrics["memory_gb"] = memory
        if self._rank == 0 and steps:
            self._pending.append(self._writer.submit(self._write, steps))
            self._unreported += steps
            if self._is_report_due(steps[-1][0]):
                self._report()

    def metrics(self, metrics: dict[str, float], step: int) -> None:
        if self._rank == 0:
            self._pending.append(self._writer.submit(self._write, [(step, metrics)]))

    def _write(self, steps: list[tuple[int, dict[str, float]]]) -> None:
        last_logged = self._last_logged[next(iter(steps[0][1]))]
        if new := [(step, metrics) for step, metrics in steps if step > last_logged]:
            self._run.step_metrics(new)

    def flush(self) -> None:
        """Waits for the pending writes and raises their errors.

        Called before a checkpoint: a run that resumes from it does not compute these metrics again.
        """
        pending, self._pending = self._pending, []
        for write in pending:
            write.result()

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

        def write() -> None:
            self._run.image(image, "samples", step)
            if len(clip) > 1:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / f"step_{step:06d}.mp4"
                    write_video(iter(clip), path, CLIP_FPS)
                    self._run.file(path, "clips")

        if self._rank == 0:
            self._pending.append(self._writer.submit(write))

    def trace(self, profile: torch.profiler.profile, name: str) -> None:
        """Log a profiler trace as the artifact profile/NAME.json.gz, for ui.perfetto.dev. Only called on rank 0."""
        folder = tempfile.TemporaryDirectory()
        path = Path(folder.name) / f"{name}.json.gz"
        profile.export_chrome_trace(str(path))

        def write() -> None:
            with folder:
                self._run.file(path, "profile")

        self._pending.append(self._writer.submit(write))

    def close(self) -> None:
        """Wait for all writes; raises their errors."""
        self._writer.shutdown()
        self.flush()


def _peak_memory() -> int:
    """Peak memory of this worker in bytes: on the GPU if there is one, else in host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
