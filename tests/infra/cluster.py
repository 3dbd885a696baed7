"""All jobs on a Ray cluster of machines that share nothing but a bucket and an MLflow server.

    sudo bash infra/try-cluster.sh [--quick] [--faults NAME...]

The machines are Linux namespaces (`tests.infra.machines`): `head` and two workers with one CPU each run Ray; `server` runs an
S3 server (moto) and MLflow; `desk` and `reader` are outside of the cluster. `desk` submits preprocessing and training, with
the faults of `FAULTS`. Then the same training runs on `desk` alone, without faults.

`--quick` preprocesses and trains stage 1 only.

The exit status is 0 if every clip is stored once, every step is recorded once, in one MLflow run per stage, all losses equal
those of the undisturbed run, and `reader`, which has taken no part in these jobs, can load the model.
"""

import argparse
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Timer
from typing import NamedTuple, NoReturn

from tests.infra.machines import NETWORK, ROOT, Machine, Switch, missing_requirement
from tests.infra.steps import BUCKET, FRAMES, HELD_OUT, HELD_OUT_FRAMES, VIDEOS

SERVER = f"{NETWORK}.10"
HEAD = f"{NETWORK}.1"
MLFLOW = f"http://{SERVER}:5000"
STEP = ("python", "-m", "tests.infra.steps")
ALONE = "/tmp/alone"  # folder of the undisturbed training, on `desk`
STEPS = {1: 12, 2: 4}
MLFLOW_SECONDS, S3_SECONDS = 20, 10
CLIP_FRAMES = 16
TIMEOUT = 900
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "AWS_ENDPOINT_URL": f"http://{SERVER}:9000",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "MLFLOW_TRACKING_URI": MLFLOW,
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes that nothing here needs
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "PYTHONDONTWRITEBYTECODE": "1",
    # A machine that disappears is noticed after about 10 s. The default is three times as long.
    "RAY_health_check_period_ms": "1000",
    "RAY_memory_monitor_refresh_ms": "0",  # every machine sees the memory that all of them use
}
PREPROCESS = ["--size=64", f"--preprocess.clip_frames={CLIP_FRAMES}", "--preprocess.validation_fraction=0"]
TRAIN = [
    "--size=64", "--train.workers=2", "--train.zero_stage=2", "--train.clip_frames=8", "--train.log_every=1",
    *(f"--train.stage{n}.steps={steps}" for n, steps in STEPS.items()),
    *(f"--train.stage{n}.{key}" for n in STEPS for key in (
        "batch_size=2", "micro_batch=1", "checkpoint_every=3", "sample_every=0", "validate_every=0"
    )),
]  # fmt: skip
ANIMATE = ["--animate.steps=2", "--animate.guidance_scale=1", "--evaluate.frames=8"]


class Fault(NamedTuple):
    job: str
    log_line: str
    """Regular expression of a line in the log of the job, after which the fault occurs."""
    inject: Callable[["Cluster"], None]


class Cluster:
    """The machines, and a log of times."""

    desk: Machine
    head: Machine
    server: Machine
    workers: list[Machine]

    def __init__(self, folder: Path, stack: ExitStack, faults: Sequence[str], stages: Sequence[int]) -> None:
        self._folder, self._stack, self._began = folder, stack, time.monotonic()
        self._faults, self._number = [FAULTS[name] for name in faults], 0
        self.stages = stages
        self._timers: list[Timer] = []
        self._switch = Switch()
        stack.callback(self._switch.close)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    @contextmanager
    def timed(self, text: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.say(f"{text} ({time.monotonic() - began:.1f} s)")

    def machine(self, name: str, number: int) -> Machine:
        machine = Machine(self._switch, self._folder / name, name, number, ENVIRONMENT)
        self._stack.callback(machine.kill)
        return machine

    def start(self) -> None:
        """Start the machines and their services, and upload the inputs."""
        self.head, self.desk, self.server = (
            self.machine(name, number) for name, number in (("head", 1), ("desk", 20), ("server", 10))
        )
        _start_ray(self.head, "--head", "--num-cpus=0", "--dashboard-host=0.0.0.0")
        self.s3 = self.server.start(
            "python", "-m", "moto.server", "--host", "0.0.0.0", "--port", "9000", log="s3.log"
        )
        self.start_mlflow()
        self._wait_for(f"{ENVIRONMENT['AWS_ENDPOINT_URL']}/")
        self.desk.run(*STEP, "prepare")
        self._wait_for(f"{MLFLOW}/health")
        self._wait_for(f"http://{HEAD}:8265/api/version")
        self.workers = []
        for _ in range(2):
            self.add_worker()

    def start_mlflow(self) -> None:
        self.mlflow = self.server.start(
            "mlflow", "server", "--host", "0.0.0.0", "--workers", "1", "--backend-store-uri",
            "sqlite:////tmp/mlflow.db", "--artifacts-destination", "/tmp/artifacts", log="mlflow.log",
        )  # fmt: skip

    def add_worker(self) -> None:
        self._number += 1
        machine = self.machine(f"worker-{self._number}", 1 + self._number)
        _start_ray(machine, f"--address={HEAD}:6379", "--num-cpus=1")
        self.workers.append(machine)

    def _wait_for(self, url: str) -> None:
        code = f"import urllib.request as r; r.urlopen({url!r}, timeout=5)"
        wait_for(lambda: self.desk.start("python", "-c", code, log="probe.log").wait() == 0, url)

    def submit(self, *command: str) -> None:
        """Submit a job from `desk`, inject its faults, and wait for its end.

        Raises:
            RuntimeError: the job failed, or ended before a fault.
        """
        log_name = f"{command[0]}.log"
        job = self.desk.start("tcan", *command, "--submit", f"http://{HEAD}:8265", log=log_name)
        log = self.desk.file(f"/tmp/{log_name}")

        def fail(reason: str) -> NoReturn:
            raise RuntimeError(f"tcan {command[0]}: {reason}\n{log.read_text()[-6000:]}")

        for fault in self._faults:
            if fault.job != command[0]:
                continue
            found = re.compile(fault.log_line, re.MULTILINE)
            wait_for(
                lambda found=found: bool(found.search(log.read_text())) or job.poll() is not None,
                fault.log_line,
            )
            if job.poll() is not None:
                fail(f"exit status {job.returncode} before a fault")
            fault.inject(self)
        if job.wait(TIMEOUT):
            fail(f"exit status {job.returncode}")
        for timer in self._timers:
            timer.join()

    def later(self, seconds: float, function: Callable[[], None]) -> None:
        timer = Timer(seconds, function)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def switch_off_worker(cluster: Cluster) -> None:
    """Switch a worker machine off and start another one."""
    machine = cluster.workers.pop()
    machine.kill()
    cluster.say(f"fault: {machine.name} switched off")
    cluster.add_worker()


def stop_mlflow(cluster: Cluster) -> None:
    """Kill the MLflow server and start it again after `MLFLOW_SECONDS`."""
    os.killpg(cluster.mlflow.pid, signal.SIGKILL)
    cluster.say(f"fault: MLflow server killed for {MLFLOW_SECONDS} s")
    cluster.later(MLFLOW_SECONDS, cluster.start_mlflow)


def pause_s3(cluster: Cluster) -> None:
    """Pause the S3 server for `S3_SECONDS`: it accepts connections and does not respond."""
    os.killpg(cluster.s3.pid, signal.SIGSTOP)
    cluster.say(f"fault: S3 server paused for {S3_SECONDS} s")
    cluster.later(S3_SECONDS, lambda: os.killpg(cluster.s3.pid, signal.SIGCONT))


FAULTS = {
    "preprocess": Fault("preprocess", r"^\d+ of \d+ videos, [1-9]", switch_off_worker),
    "mlflow": Fault("train", "^stage 1: step 1/", stop_mlflow),
    "machine": Fault("train", "^stage 1: step 4/", switch_off_worker),
    "s3": Fault("train", "^stage 2: step 1/", pause_s3),
}
"""In the order in which they occur."""


def _start_ray(machine: Machine, *options: str) -> None:
    """Start Ray. On a busy machine, Ray gives up after 30 s; then it is started again."""
    command = [
        "ray", "start", *options, f"--node-ip-address={machine.address}", "--object-store-memory=100000000",
        "--disable-usage-stats", "--block",
    ]  # fmt: skip
    machine.start("sh", "-c", f"until {shlex.join(command)}; do ray stop --force; done", log="ray.log")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {seconds:g} s")
        time.sleep(0.3)


def preprocess(cluster: Cluster) -> None:
    cluster.submit("preprocess", f"{BUCKET}/videos", f"{BUCKET}/dataset", *PREPROCESS)


def train(cluster: Cluster) -> None:
    cluster.submit(*_train_command(cluster, f"{BUCKET}/run"))


def train_alone(cluster: Cluster) -> None:
    cluster.desk.run("tcan", *_train_command(cluster, ALONE))


def _train_command(cluster: Cluster, out: str) -> list[str]:
    stage = "all" if len(cluster.stages) == len(STEPS) else str(cluster.stages[0])
    return ["train", f"{BUCKET}/dataset", "--out", out, "--stage", stage, *TRAIN]


def animate(cluster: Cluster) -> None:
    command = ["tcan", "animate", "--pairs", f"{BUCKET}/pairs/pairs.csv", "--model", f"{BUCKET}/run/model"]
    cluster.head.run(*command, *ANIMATE, RAY_ADDRESS=f"{HEAD}:6379")


def evaluate(cluster: Cluster) -> None:
    command = ["tcan", "evaluate", f"{BUCKET}/heldout", "--model", "models:/tcan@run"]
    cluster.machine("reader", 21).run(*command, "--out", f"{BUCKET}/evaluation", *ANIMATE)


Phase = Callable[[Cluster], None]
QUICK: dict[str, Phase] = {
    "machines, S3, MLflow and Ray started, videos uploaded": Cluster.start,
    "preprocess, s3 to s3": preprocess,
    "train, checkpoints and models in the bucket": train,
    "the same training on one machine, undisturbed": train_alone,
}
MORE: dict[str, Phase] = {
    "animate --pairs, table and results in the bucket": animate,
    "evaluate the registered model on a new machine outside of the cluster": evaluate,
}


def check_results(cluster: Cluster) -> bool:
    """Print the checks; returns whether all are good."""

    def check(name: str, is_good: bool, detail: str) -> bool:
        print(f"{'ok    ' if is_good else 'FAILED'}  {name}: {detail}", flush=True)
        return is_good

    found = json.loads(cluster.desk.run(*STEP, "report", ALONE, *map(str, cluster.stages)).splitlines()[-1])
    clips, expected = found["clips"], VIDEOS * FRAMES // CLIP_FRAMES
    good = check(
        "every clip once", len(clips) == expected and set(clips.values()) == {1}, f"{len(clips)} clips"
    )
    for stage in cluster.stages:
        steps = STEPS[stage]
        losses, alone = (found[key][str(stage)] for key in ("losses", "losses_alone"))
        once = [step for step, _ in losses] == list(range(1, steps + 1))
        good &= check(f"stage {stage}, every step recorded once", once, f"{len(losses)} records")
        good &= check(
            f"stage {stage}, losses equal bit for bit", losses == alone, f"last loss {losses[-1][1]!r}"
        )
        runs = found["runs"][str(stage)]
        good &= check(f"stage {stage}, one MLflow run", runs == ["FINISHED"], ", ".join(runs))
    if len(cluster.stages) < len(STEPS):
        return good
    frames, evaluation = found["frames"], found["evaluation"]
    good &= check("every pair animated", frames == [HELD_OUT_FRAMES] * HELD_OUT**2, f"frames {frames}")
    detail = f"PSNR {evaluation['metrics']['psnr']:.2f} dB"
    return check("videos evaluated", evaluation["videos"] == HELD_OUT, detail) and good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="preprocess and train stage 1 only")
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS), help="default: all")
    arguments = parser.parse_args()
    if reason := missing_requirement():
        print(f"try-cluster: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="machines-") as folder, ExitStack() as stack:
        faults = [name for name in FAULTS if name in arguments.faults]
        cluster = Cluster(Path(folder), stack, faults, [1] if arguments.quick else list(STEPS))
        for name, phase in (QUICK if arguments.quick else QUICK | MORE).items():
            with cluster.timed(name):
                phase(cluster)
        good = check_results(cluster)
        cluster.say("all checks passed" if good else "a check failed")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
