"""Check that an interrupted training reaches the same validation loss as an uninterrupted one.

python -m tests.chaos DATASET FOLDER [--steps 300] [--kills 8] [KEYS OF tcan train ...]

Trains stage 1 into FOLDER/uninterrupted, then into FOLDER/interrupted, each with two workers. In the second run, faults
occur at random steps, alternating between workers and the driver. A worker receives SIGKILL or SIGSTOP (hang); the
driver receives SIGKILL, SIGTERM or SIGINT. After a SIGKILL of the driver, training resumes with one worker until the
next fault of the driver.

Prints each fault with the time until the next new step, and both validation losses at the end. The exit status is 1 if
the losses differ by more than 0.1%. A finished run in FOLDER/uninterrupted is reused.

On one core with 64 x 64 crops of the `make demo` dataset, starting processes dominates the run time:

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

WORKER_SIGNALS = (signal.SIGKILL, signal.SIGSTOP)  # kill; hang
DRIVER_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HANG_SECONDS = 60
TOLERANCE = 1e-3


def fault_schedule(steps: int, kills: int) -> list[tuple[int, bool, signal.Signals]]:
    """(step after which the fault occurs, whether it hits the driver, signal) for each fault.

    The kinds of faults alternate; the steps are drawn with a fixed seed.
    """
    fault_steps = sorted(random.Random(0).sample(range(steps // 20, steps * 19 // 20), kills))
    return [
        (step, bool(n % 2), DRIVER_SIGNALS[n // 2 % 3] if n % 2 else WORKER_SIGNALS[n // 2 % 2])
        for n, step in enumerate(fault_steps)
    ]


def wait_for(training: Stage1, driver: psutil.Popen, step: int) -> None:
    """Wait until the step is recorded.

    Raises:
        SystemExit: the driver exited before the step.
    """
    while training.step() < step:
        if driver.poll() is not None:
            training.finish(driver)
            raise SystemExit(f"driver exited before step {step}; see {training.folder}/output.txt")
        time.sleep(0.5)


def train_with_faults(training: Stage1, steps: int, kills: int) -> None:
    rng, workers = random.Random(1), 2
    driver = training.start(workers)
    for fault_step, on_driver, fault_signal in fault_schedule(steps, kills):
        wait_for(training, driver, fault_step)
        time.sleep(rng.random())
        last_step, started = training.step(), time.monotonic()
        if on_driver:
            orphans = workers_of(driver)
            driver.send_signal(fault_signal)
            driver.wait()
            psutil.wait_procs(orphans)  # orphaned workers may still finish a step
            workers = 1 if workers == 2 and fault_signal == DRIVER_SIGNALS[0] else 2
            last_step = training.step()
            driver = training.start(workers)
        else:
            rng.choice(workers_of(driver)).send_signal(fault_signal)
        wait_for(training, driver, last_step + 1)
        print(
            f"{fault_signal.name} of {'driver' if on_driver else 'worker'} at step {last_step}: "
            f"{time.monotonic() - started:.0f} s to the next new step, {workers} workers",
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
    args, keys = parser.parse_known_args()
    keys += [
        f"--train.stage1.steps={args.steps}", f"--train.stage1.checkpoint_every={max(1, args.steps // 20)}",
        f"--train.stage1.validate_every={args.steps}", "--train.stage1.sample_every=0", "--train.max_failures=99",
        f"--train.hang_timeout={HANG_SECONDS}",
    ]  # fmt: skip
    uninterrupted, interrupted = (
        Stage1(args.dataset, args.folder / name, keys) for name in ("uninterrupted", "interrupted")
    )
    uninterrupted.finish(uninterrupted.start(2))
    train_with_faults(interrupted, args.steps, args.kills)

    steps = [metric.step for metric in interrupted.history("loss")]
    assert sorted(set(steps)) == list(range(1, args.steps + 1)), "steps missing in MLflow"
    assert len(steps) == args.steps, "steps recorded more than once in MLflow"
    loss_pairs = zip(uninterrupted.history("loss"), interrupted.history("loss"), strict=True)
    largest = max(abs(b.value / a.value - 1) for a, b in loss_pairs)
    final_losses = [
        training.history("validation_loss")[-1].value for training in (uninterrupted, interrupted)
    ]
    print(
        f"{args.kills} faults; validation loss {final_losses[0]:.6f} uninterrupted, {final_losses[1]:.6f} interrupted; "
        f"largest relative difference of the {args.steps} training losses {largest:.1e}; each step recorded once",
        flush=True,
    )
    return int(abs(final_losses[1] / final_losses[0] - 1) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
