"""A training of stage 1 by `tcan train`, in processes of its own that may be killed, and what it recorded."""

import json
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import psutil
from mlflow import MlflowClient
from mlflow.entities import Metric


class Stage1:
    """Its checkpoints in FOLDER/out, its MLflow store in FOLDER/mlflow, what it printed in FOLDER/said.txt."""

    def __init__(self, dataset: Path, folder: Path, keys: list[str]):
        self.folder, self.stage = folder, folder / "out" / "stage1"
        self._command = [
            sys.executable,
            "-m",
            "pipelines.cli",
            "train",
            str(dataset),
            "--out",
            str(folder / "out"),
        ]
        self._command += ["--stage", "1", f"--tracking.folder={folder}/mlflow", *keys]

    def command(self, workers: int, *more: str) -> list[str]:
        return [*self._command, f"--train.workers={workers}", *more]

    def start(self, workers: int, *more: str) -> psutil.Popen:
        """The driver; the same training again goes on from its last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "said.txt").open("a") as file:
            return psutil.Popen(self.command(workers, *more), stdout=file, stderr=subprocess.STDOUT)

    def finish(self, driver: psutil.Popen) -> None:
        """Waits for its end; SystemExit with its last words when it fails."""
        if driver.wait():
            raise SystemExit(self.said()[-2000:])

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    @cached_property
    def _client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder}/mlflow/mlflow.db")

    def history(self, key: str) -> list[Metric]:
        """All that was recorded under this name, in the order of steps; nothing before the run has begun."""
        if not (self.stage / "run.json").exists():
            return []
        run_id = json.loads((self.stage / "run.json").read_text())["mlflow_run_id"]
        return sorted(self._client.get_metric_history(run_id, key), key=lambda metric: metric.step)

    def step(self) -> int:
        """The last that is recorded."""
        return max((metric.step for metric in self.history("loss")), default=0)


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    """The processes of a driver's workers."""

    def is_worker(process: psutil.Process) -> bool:
        try:
            return "RayTrainWorker" in " ".join(process.cmdline())
        except psutil.Error:  # it has just ended
            return False

    return [process for process in driver.children(recursive=True) if is_worker(process)]
