"""Seconds that a training loses when a worker dies: mini, two workers on this machine.

python -m tests.benchmarks.restart DATASET

With a checkpoint after every step, nothing is repeated: the time is that in which Ray Train notices the loss, ends the other
worker, starts two processes (imports, models, DeepSpeed) and trains the first step. It contains neither the start of a machine nor
the loading and compilation of networks of SD1.5's size.
"""

import argparse
import tempfile
import time
from pathlib import Path

import psutil

from tests.runs import Stage1, workers_of

FIRST_STEPS = 5


def restart_seconds(dataset: Path, folder: Path) -> float:
    """From the death of a worker to the record of the next step.

    Raises:
        RuntimeError: the training ended before that.
    """
    keys = ["--train.stage1.checkpoint_every=1", "--train.log_every=1", "--train.stage1.sample_every=0"]
    training = Stage1(dataset, folder, [*keys, "--train.stage1.validate_every=0"])
    driver = training.start(2)
    try:
        while training.step() < FIRST_STEPS:
            _check(driver, training)
        died = time.time()
        workers_of(driver)[0].kill()
        while True:
            _check(driver, training)
            if after := [
                it.timestamp for it in training.history("loss") if it.timestamp > 1000 * died + 2000
            ]:
                return min(after) / 1000 - died
    finally:
        driver.terminate()
        driver.wait()


def _check(driver: psutil.Popen, training: Stage1) -> None:
    if driver.poll() is not None:
        raise RuntimeError(f"the training has ended: {training.output()[-2000:]}")
    time.sleep(0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    with tempfile.TemporaryDirectory() as name:
        print(f"restart: {restart_seconds(parser.parse_args().dataset, Path(name)):.1f} s")
