"""A training that is killed in every way, beside one that is left alone: both must end the same.

python -m tests.chaos DATASET FOLDER [--steps 300] [--kills 8] [KEYS OF tcan train ...]

Trains stage 1 into FOLDER/calm, then into FOLDER/chaos with two workers, where at random moments, in turn, a worker is
killed or hangs, and the driver gets SIGKILL, SIGTERM or Ctrl-C; after a SIGKILL of the driver it goes on with one worker
until the driver's next end. Prints each blow, how long it took to the next new step, and at the end both validation
losses; the exit status is 1 when they differ by more than a thousandth. A calm run that is there is taken as it is.

On one core, with the dataset of `make demo` cut to images of 64 x 64, most of it is starting processes:

python -m tests.chaos demo/dataset chaos --size=64 --train.stage1.batch_size=4 --train.stage1.micro_batch=2
"""

import argparse
import random
import signal
import sys
import time
from pathlib import Path

import psutil

from tests.runs import Stage1, workers_of

WORKER = (signal.SIGKILL, signal.SIGSTOP)  # killed; hangs
DRIVER = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HANG_SECONDS = 60
TOLERANCE = 1e-3


def blows(steps: int, kills: int) -> list[tuple[int, bool, signal.Signals]]:
    """(step after which it falls, on the driver?, signal): all kinds in turn, at moments that a fixed seed draws."""
    moments = sorted(random.Random(0).sample(range(steps // 20, steps * 19 // 20), kills))
    return [
        (moment, bool(n % 2), DRIVER[n // 2 % 3] if n % 2 else WORKER[n // 2 % 2])
        for n, moment in enumerate(moments)
    ]


def wait_for(training: Stage1, driver: psutil.Popen, step: int) -> None:
    while training.step() < step:
        if driver.poll() is not None:
            training.finish(driver)
            raise SystemExit(f"the driver ended before step {step}")
        time.sleep(0.5)


def chaos(training: Stage1, steps: int, kills: int) -> None:
    chance, workers = random.Random(1), 2
    driver = training.start(workers)
    for moment, on_driver, blow in blows(steps, kills):
        wait_for(training, driver, moment)
        time.sleep(chance.random())
        at, began = training.step(), time.monotonic()
        if on_driver:
            orphans = workers_of(driver)
            driver.send_signal(blow)
            driver.wait()
            psutil.wait_procs(orphans)  # they may still finish a step
            workers = 1 if workers == 2 and blow == DRIVER[0] else 2
            at = training.step()
            driver = training.start(workers)
        else:
            chance.choice(workers_of(driver)).send_signal(blow)
        wait_for(training, driver, at + 1)
        print(
            f"{blow.name} of {'the driver' if on_driver else 'a worker'} at step {at}: "
            f"{time.monotonic() - began:.0f} s to the next new step, {workers} workers",
            flush=True,
        )
    training.finish(driver)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=8)
    given, keys = parser.parse_known_args()
    keys += [
        f"--train.stage1.steps={given.steps}", f"--train.stage1.checkpoint_every={max(1, given.steps // 20)}",
        f"--train.stage1.validate_every={given.steps}", "--train.stage1.sample_every=0", "--train.max_failures=99",
        f"--train.hang_timeout={HANG_SECONDS}",
    ]  # fmt: skip
    calm, wild = (Stage1(given.dataset, given.folder / name, keys) for name in ("calm", "chaos"))
    calm.finish(calm.start(2))
    chaos(wild, given.steps, given.kills)

    steps = [metric.step for metric in wild.history("loss")]
    assert sorted(set(steps)) == list(range(1, given.steps + 1)), "a step is missing in MLflow"
    assert len(steps) == given.steps, "a step was recorded twice"
    pairs = zip(calm.history("loss"), wild.history("loss"), strict=True)
    largest = max(abs(b.value / a.value - 1) for a, b in pairs)
    ends = [training.history("validation_loss")[-1].value for training in (calm, wild)]
    print(
        f"{given.kills} kills; validation loss {ends[0]:.6f} calm, {ends[1]:.6f} in chaos; losses of the {given.steps} "
        f"steps differ by at most {largest:.1e}, relatively; each was recorded once",
        flush=True,
    )
    return int(abs(ends[1] / ends[0] - 1) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
