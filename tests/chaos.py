"""A training that is killed in every way, beside one that is left alone: both must end the same.

python -m tests.chaos DATASET FOLDER [--steps 300] [--kills 8] [KEYS OF tcan train ...]

Trains stage 1 into FOLDER/calm, then into FOLDER/chaos with two workers, where at random moments, in turn, a worker is
killed, a worker hangs, and the driver gets SIGKILL, SIGTERM and Ctrl-C; after the first of the driver's ends it goes on
with one worker until the next. Prints each kill, how long it took to the next finished step, and at the end both
validation losses; the exit status is 1 when they differ by more than a thousandth.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from mlflow import MlflowClient

WORKER_KILLED, WORKER_HANGS = signal.SIGKILL, signal.SIGSTOP
DRIVER = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HANG_SECONDS = 60


class Training:
    def __init__(self, dataset: Path, out: Path, keys: list[str]):
        self.out = out
        self._command = [
            sys.executable,
            "-m",
            "pipelines.cli",
            "train",
            str(dataset),
            "--out",
            str(out),
            "--stage",
            "1",
        ]
        self._command += [f"--tracking.folder={out}/mlflow", f"--train.hang_seconds={HANG_SECONDS}", *keys]

    def start(self, workers: int) -> psutil.Popen:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "said.txt").open("a") as file:
            command = [*self._command, f"--train.workers={workers}"]
            return psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def history(self, key: str) -> dict[int, list[float]]:
        """Step -> the values recorded."""
        run = self.out / "stage1" / "run.json"
        if not run.exists():
            return {}
        client = MlflowClient(f"sqlite:///{self.out}/mlflow/mlflow.db")
        values: dict[int, list[float]] = {}
        for metric in client.get_metric_history(json.loads(run.read_text())["mlflow_run_id"], key):
            values.setdefault(metric.step, []).append(metric.value)
        return values

    def step(self) -> int:
        return max(self.history("loss"), default=0)


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    return [p for p in driver.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def wait(training: Training, driver: psutil.Popen, step: int) -> None:
    while training.step() < step and driver.poll() is None:
        time.sleep(1)


def chaos(training: Training, steps: int, kills: int) -> int:
    """Returns how many blows fell."""
    chance = random.Random(0)
    blows: list[tuple[str, signal.Signals]] = []
    for kill in range(kills):
        on_driver = kill % 2
        blows.append(
            ("driver", DRIVER[kill // 2 % 3])
            if on_driver
            else ("worker", (WORKER_KILLED, WORKER_HANGS)[kill // 2 % 2])
        )
    moments = sorted(chance.sample(range(steps // 20, steps * 19 // 20), kills))
    workers, struck = 2, 0
    driver = training.start(workers)
    for (whom, blow), moment in zip(blows, moments, strict=True):
        wait(training, driver, moment)
        time.sleep(chance.random())
        at, began = training.step(), time.monotonic()
        struck += 1
        if whom == "worker":
            chance.choice(workers_of(driver)).send_signal(blow)
        else:
            driver.send_signal(blow)
            driver.wait()
            workers = 1 if workers == 2 and struck == 2 else 2
            at = training.step()
            driver = training.start(workers)
        wait(training, driver, at + 1)
        seconds = time.monotonic() - began
        print(
            f"{blow.name} of the {whom} at step {at}: {seconds:.0f} s to the next new step, {workers} workers",
            flush=True,
        )
    if driver.wait():
        raise SystemExit((training.out / "said.txt").read_text()[-2000:])
    return struck


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=8)
    given, keys = parser.parse_known_args()
    every = max(1, given.steps // 20)
    keys += [
        f"--train.stage1.steps={given.steps}", f"--train.stage1.checkpoint_every={every}",
        f"--train.stage1.validate_every={given.steps}", "--train.stage1.picture_every=0", "--train.max_failures=99",
    ]  # fmt: skip
    calm = Training(given.dataset, given.folder / "calm", keys)
    if calm.start(2).wait():
        raise SystemExit((calm.out / "said.txt").read_text()[-2000:])
    wild = Training(given.dataset, given.folder / "chaos", keys)
    struck = chaos(wild, given.steps, given.kills)
    ends = [training.history("validation_loss")[given.steps][0] for training in (calm, wild)]
    values = wild.history("loss")
    print(f"{struck} kills; validation loss {ends[0]:.6f} calm, {ends[1]:.6f} in chaos")
    assert sorted(values) == list(range(1, given.steps + 1)), "a step is missing in MLflow"
    assert all(len(recorded) == 1 for recorded in values.values()), "a step was recorded twice"
    return int(abs(ends[1] / ends[0] - 1) > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
