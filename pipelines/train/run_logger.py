"""What can be seen of a training while it runs: numbers, images and traces in MLflow, lines of progress or a bar."""

import resource
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipelines import tracking
from pipelines.config import StageConfig
from tcan.video import write_video

if TYPE_CHECKING:
    from pipelines.train.trainer import Task

CLIP_FPS = 8  # of the sample clips
BAR_SECONDS = 0.5  # between its changes


class Log:
    """Numbers of every step: into the run from rank 0, by a thread so that no step waits; a line now and then, or what the
    driver's bar shows.

    No step is recorded twice: one that is done again after a restart was recorded the first time.
    """

    def __init__(self, task: "Task", stage: StageConfig, rank: int, done: int):
        self._task, self._stage, self._rank = task, stage, rank
        self._rows: list[dict[str, float]] = []
        self._writer = ThreadPoolExecutor(1, "tracking")
        self._written: list[Future] = [self._writer.submit(self._attach)] if rank == 0 else []
        self._began, self._done_before = time.perf_counter(), done
        self._told = -BAR_SECONDS

    def _attach(self) -> None:
        self._run = tracking.attach(self._task.tracking, self._task.run_id)
        self._recorded = {
            key: self._run.last_step(key) for key in ("loss", "validation_loss", "checkpoint_seconds")
        }

    def step(self, step: int, values: dict[str, float], seconds: float, waited: float) -> None:
        """values: loss, grad_norm and more of this step; seconds: that it took, `waited` of them for data."""
        values = {
            **values,
            "samples_per_second": self._stage.batch_size / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "memory_gb": _memory() / 1e9,
        }
        self.metrics(values, step)
        if self._rank == 0:
            self._rows.append(values)
            if self._is_due(step):
                self._tell(step)

    def metrics(self, values: dict[str, float], step: int) -> None:
        if self._rank == 0:
            self._written.append(self._writer.submit(self._write, values, step))

    def _write(self, values: dict[str, float], step: int) -> None:
        if step > self._recorded[next(iter(values))]:
            self._run.metrics(values, step)

    def flush(self) -> None:
        """Before a checkpoint: a run that goes on from it will not make these numbers again."""
        written, self._written = self._written, []
        for one in written:
            one.result()

    def _is_due(self, step: int) -> bool:
        if step == self._stage.steps:
            return True
        if self._task.bar:
            return time.perf_counter() - self._told >= BAR_SECONDS
        return step % self._task.config.train.log_every == 0

    def _tell(self, step: int) -> None:
        """Means of the steps since the last time."""
        rows, self._rows = self._rows, []
        mean = {key: sum(values[key] for values in rows) / len(rows) for key in rows[0]}
        text = (
            f"loss {mean['loss']:.4f}  gradient {mean['grad_norm']:.3f}  "
            f"{self._stage.batch_size / mean['step_seconds']:.1f} samples/s  "
            f"data wait {mean['data_wait_seconds'] / mean['step_seconds']:.1%}"
        )
        self._told = time.perf_counter()
        if self._task.bar:
            self._task.watch.tell.remote(step, text)
            return
        left = (self._told - self._began) / (step - self._done_before) * (self._stage.steps - step)
        print(
            f"stage {self._task.stage}: step {step}/{self._stage.steps}  {text}  "
            f"{int(left) // 60}:{int(left) % 60:02d} left",
            flush=True,
        )

    def samples(self, image: np.ndarray, clip: np.ndarray, step: int) -> None:
        """The image as one of a series, and the clip, where it moves, as a video that plays in the page."""

        def write() -> None:
            self._run.image(image, "samples", step)
            if len(clip) > 1:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / f"step_{step:06d}.mp4"
                    write_video(iter(clip), path, CLIP_FPS)
                    self._run.file(path, "clips")

        if self._rank == 0:
            self._written.append(self._writer.submit(write))

    def trace(self, profile: torch.profiler.profile, name: str) -> None:
        """What a profiler saw as the artifact profile/NAME.json.gz, which ui.perfetto.dev opens. Rank 0's alone."""
        folder = tempfile.TemporaryDirectory()
        path = Path(folder.name) / f"{name}.json.gz"
        profile.export_chrome_trace(str(path))

        def write() -> None:
            with folder:
                self._run.file(path, "profile")

        self._written.append(self._writer.submit(write))

    def close(self) -> None:
        """Waits for what is still being written; an error of it comes out here."""
        self._writer.shutdown()
        self.flush()


def _memory() -> int:
    """Bytes that this worker has taken at most: of the GPU, without one of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
