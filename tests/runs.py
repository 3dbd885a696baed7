"""Stage-1 training by `tcan train` in separate, killable processes, with access to the recorded metrics."""

import json
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import psutil
from mlflow import MlflowClient
from mlflow.entities import Metric


class Stage1:
    """One stage-1 training run.

    Locations: MLflow store in FOLDER/mlflow, process output in FOLDER/output.txt.

    dataset: path or URI.
    out: path or URI; default FOLDER/out.
    """

    def __init__(self, dataset: Path | str, folder: Path, keys: list[str], out: str | None = None):
        self.folder, self.stage = folder, folder / "out" / "stage1"
        self._command = [
            sys.executable,
            "-m",
            "pipelines.cli",
            "train",
            str(dataset),
            "--out",
            out or str(folder / "out"),
        ]
        self._command += ["--stage", "1", f"--tracking.folder={folder}/mlflow", *keys]

    def command(self, workers: int, *more: str) -> list[str]:
        return [*self._command, f"--train.workers={workers}", *more]

    def start(self, workers: int, *more: str) -> psutil.Popen:
        """Start the driver. Calling this again resumes from the last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output.txt").open("a") as file:
            return psutil.Popen(self.command(workers, *more), stdout=file, stderr=subprocess.STDOUT)

    def finish(self, driver: psutil.Popen) -> None:
        """Wait for the driver to exit.

        Raises:
            SystemExit: the driver failed; the message is the end of its output.
        """
        if driver.wait():
            raise SystemExit(self.output()[-2000:])

    def output(self) -> str:
        """Output (stdout and stderr) of all drivers so far."""
        return (self.folder / "output.txt").read_text()

    @cached_property
    def _client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder}/mlflow/mlflow.db")

    def history(self, key: str) -> list[Metric]:
        """All recorded values of a metric, ordered by step; empty before the run starts."""
        if not (self.stage / "run.json").exists():
            return []
        run_id = json.loads((self.stage / "run.json").read_text())["mlflow_run_id"]
        return sorted(self._client.get_metric_history(run_id, key), key=lambda metric: metric.step)

    def step(self) -> int:
        """Last recorded step; 0 if none."""
        return max((metric.step for metric in self.history("loss")), default=0)


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    """Ray Train worker processes of a driver."""

    def is_worker(process: psutil.Process) -> bool:
        try:
            return "RayTrainWorker" in " ".join(process.cmdline())
        except psutil.Error:  # the process has just exited
            return False

    return [process for process in driver.children(recursive=True) if is_worker(process)]
