"""All jobs on a Ray cluster of machines that share nothing but a bucket and an MLflow server.

    sudo bash infra/try-cluster.sh [--jobs JOB...] [--faults FAULT...] [--quick]

The machines are Linux namespaces (`tests.infra.machines`): `head` and two workers with one CPU each run Ray; `server` runs an
S3 server (moto), `mlflow` runs MLflow and PostgreSQL; `desk` and `reader` are outside of the cluster. `desk` submits all jobs
to `head`, with three faults per job:

    machine   a worker machine is switched off, and another one is started
    mlflow    MLflow and PostgreSQL are killed, and started again after 20 s
    s3        the S3 server is paused for 10 s

`desk` also runs train, animate and evaluate alone, without faults, after the same job on the cluster.

The exit status is 0 if every clip is stored once, every pair is animated once, with the frames of the undisturbed job; every
training step is recorded once, and all losses and all metrics of the evaluation equal those of the undisturbed jobs; every
job has one finished run in MLflow, and `reader`, which has taken no part in these jobs, can download its artifacts.
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
from typing import Any, NoReturn

from tests.infra import mlflow_stack
from tests.infra.checks import check_results
from tests.infra.machines import NETWORK, ROOT, Machine, Switch, missing_requirement
from tests.infra.steps import ALONE, BUCKET

NUMBERS = {"head": 1, "server": 10, "mlflow": 11, "desk": 20, "reader": 21}  # workers: from 2
HEAD, SERVER, MLFLOW = (f"{NETWORK}.{NUMBERS[name]}" for name in ("head", "server", "mlflow"))
S3_URL, MLFLOW_URL, DASHBOARD = f"http://{SERVER}:9000", f"http://{MLFLOW}:5000", f"http://{HEAD}:8265"
STEP = ("python", "-m", "tests.infra.steps")
STEPS = {1: 12, 2: 4}
MLFLOW_SECONDS, S3_SECONDS = 20, 10
CLIP_FRAMES = 16
TIMEOUT = 900
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "AWS_ENDPOINT_URL": S3_URL,
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "MLFLOW_TRACKING_URI": MLFLOW_URL,
    "MLFLOW_TRACKING_USERNAME": "admin",
    "MLFLOW_TRACKING_PASSWORD": "correct horse",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "PYTHONDONTWRITEBYTECODE": "1",
    # A machine that disappears is noticed after about 10 s. The default is three times as long.
    "RAY_health_check_period_ms": "1000",
    "RAY_memory_monitor_refresh_ms": "0",  # every machine sees the memory that all of them use
}
MLFLOW_SERVER = {
    "MLFLOW_S3_ENDPOINT_URL": S3_URL,
    "POSTGRES_PASSWORD": "of the database",
    "MLFLOW_ADMIN_PASSWORD": ENVIRONMENT["MLFLOW_TRACKING_PASSWORD"],
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs sessions",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes that nothing here needs
    "MLFLOW_BIND": "0.0.0.0",
    "WORKERS": "1",
    "PYTHONPATH": f"/tmp/packages:{ROOT}",
}
PREPROCESS = ["--size=64", f"--preprocess.clip_frames={CLIP_FRAMES}", "--preprocess.validation_fraction=0"]
TRAIN = [
    "--size=64", "--train.workers=2", "--train.zero_stage=2", "--train.clip_frames=8", "--train.log_every=1",
    *(f"--train.stage{n}.steps={steps}" for n, steps in STEPS.items()),
    *(f"--train.stage{n}.{key}" for n in STEPS for key in (
        "batch_size=2", "micro_batch=1", "checkpoint_every=3", "sample_every=0", "validate_every=0"
    )),
]  # fmt: skip
ANIMATE = ["--animate.steps=2", "--animate.guidance_scale=1"]
# Enough steps that the faults after the first video come before the end of the job.
EVALUATE = ["--animate.steps=20", "--animate.guidance_scale=1", "--evaluate.frames=8"]


class Cluster:
    """The machines, and a log of times."""

    desk: Machine
    head: Machine
    server: Machine
    mlflow: Machine
    workers: list[Machine]

    def __init__(
        self,
        folder: Path,
        stack: ExitStack,
        jobs: Sequence[str],
        faults: Sequence[str],
        stages: Sequence[int],
    ) -> None:
        self._folder, self._stack, self._began = folder, stack, time.monotonic()
        self.jobs, self.faults, self.stages = jobs, faults, stages
        self._number = 0
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

    def machine(self, name: str, number: int | None = None) -> Machine:
        machine = Machine(self._switch, self._folder / name, name, number or NUMBERS[name], ENVIRONMENT)
        self._stack.callback(machine.kill)
        return machine

    def start(self) -> None:
        """Start the machines and their services, and upload the inputs."""
        names = ("head", "desk", "server", "mlflow")
        self.head, self.desk, self.server, self.mlflow = map(self.machine, names)
        _start_ray(self.head, "--head", "--num-cpus=0", "--dashboard-host=0.0.0.0")
        self.s3 = self.server.start(
            "python", "-m", "moto.server", "--host", "0.0.0.0", "--port", "9000", log="s3.log"
        )
        mlflow_stack.install_server_packages(self.mlflow.file("/tmp"))
        self._wait_for(f"{S3_URL}/")
        self.start_mlflow()
        self.desk.run(*STEP, "prepare")
        self._wait_for(f"{MLFLOW_URL}/health")
        self._wait_for(f"{DASHBOARD}/api/version")
        self.workers = []
        for _ in range(2):
            self.add_worker()

    def start_mlflow(self) -> None:
        self.mlflow.start(
            "bash", str(mlflow_stack.SCRIPT), "/tmp/stack", "5000", log="mlflow.log", **MLFLOW_SERVER
        )

    def add_worker(self) -> None:
        self._number += 1
        machine = self.machine(f"worker-{self._number}", 1 + self._number)
        _start_ray(machine, f"--address={HEAD}:6379", "--num-cpus=1")
        self.workers.append(machine)

    def _wait_for(self, url: str) -> None:
        code = f"import urllib.request as r; r.urlopen({url!r}, timeout=5)"
        wait_for(lambda: self.desk.start("python", "-c", code, log="probe.log").wait() == 0, url)

    def submit(self, *command: str, faults: dict[str, str] | None = None, status: int = 0) -> None:
        """Submit a job from `desk`, inject faults, and wait for its end and for the end of the faults.

        Args:
            faults: for each fault, in this order, the start of a line in the log of the job, after which it occurs. Those that
                `--faults` excludes do not occur.
            status: expected exit status.

        Raises:
            RuntimeError: the job had another exit status, or ended before a fault.
        """
        log_name = f"{command[0]}.log"
        log = self.desk.file(f"/tmp/{log_name}")
        log.unlink(missing_ok=True)  # of an earlier submission
        job = self.desk.start("tcan", *command, "--submit", DASHBOARD, log=log_name)

        def fail(reason: str) -> NoReturn:
            raise RuntimeError(f"tcan {command[0]}: {reason}\n{log.read_text()[-6000:]}")

        for name, line in (faults or {}).items():
            if name not in self.faults:
                continue
            found = re.compile(line, re.MULTILINE)
            wait_for(lambda found=found: found.search(log.read_text()) or job.poll() is not None, line)
            if job.poll() is not None:
                fail(f"exit status {job.returncode} before a fault")
            FAULTS[name](self)
        if job.wait(TIMEOUT) != status:
            fail(f"exit status {job.returncode}, not {status}")
        for text in log.read_text().splitlines():
            if text.startswith(("tracking:", "tcan:")) or "Traceback" in text:
                self.say(f"  log: {text[:200]}")
        for timer in self._timers:
            timer.join()
        self._timers.clear()
        self._wait_for(f"{MLFLOW_URL}/health")

    def later(self, seconds: float, function: Callable[[], Any]) -> None:
        timer = Timer(seconds, function)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def switch_off_worker(cluster: Cluster) -> None:
    """Switch a worker machine off, the one that runs the driver of the job if there is one, and start another one."""
    drivers = [
        worker
        for worker in cluster.workers
        if any(worker.file("/tmp/ray").glob("session_2*/logs/job-driver-*.log"))
    ]
    machine = drivers[0] if drivers else cluster.workers[-1]
    cluster.workers.remove(machine)
    machine.kill()
    cluster.say(f"fault: {machine.name} switched off{', which ran the job' if drivers else ''}")
    cluster.add_worker()


def stop_mlflow(cluster: Cluster) -> None:
    """Kill MLflow and PostgreSQL, and start them again after `MLFLOW_SECONDS`."""
    cluster.mlflow.kill_processes()
    cluster.say(f"fault: MLflow and PostgreSQL killed for {MLFLOW_SECONDS} s")
    cluster.later(MLFLOW_SECONDS, cluster.start_mlflow)


def pause_s3(cluster: Cluster) -> None:
    """Pause the S3 server for `S3_SECONDS`: it accepts connections and does not respond."""
    os.killpg(cluster.s3.pid, signal.SIGSTOP)
    cluster.say(f"fault: S3 server paused for {S3_SECONDS} s")

    def resume() -> None:
        # nsenter stops when its child does, possibly again after the first signal; then it would not end with its machine.
        for _ in range(3):
            os.killpg(cluster.s3.pid, signal.SIGCONT)
            time.sleep(0.5)

    cluster.later(S3_SECONDS, resume)


FAULTS = {"machine": switch_off_worker, "mlflow": stop_mlflow, "s3": pause_s3}


def _start_ray(machine: Machine, *options: str) -> None:
    """Start Ray. On a busy machine, Ray gives up after 30 s; then it is started again."""
    command = [
        "ray", "start", *options, f"--node-ip-address={machine.address}", "--object-store-memory=100000000",
        "--disable-usage-stats", "--block",
    ]  # fmt: skip
    machine.start("sh", "-c", f"until {shlex.join(command)}; do ray stop --force; done", log="ray.log")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {seconds:g} s")
        time.sleep(0.3)


def preprocess(cluster: Cluster) -> None:
    first_clips = r"^\d+ of \d+ videos, [1-9]"
    faults = dict.fromkeys(("machine", "mlflow", "s3"), first_clips)
    cluster.submit("preprocess", f"{BUCKET}/videos", f"{BUCKET}/dataset", *PREPROCESS, faults=faults)


def train(cluster: Cluster) -> None:
    faults = {"mlflow": "^stage 1: step 1/", "machine": "^stage 1: step 4/", "s3": "^stage 1: step 8/"}
    cluster.submit(*_train_command(cluster, f"{BUCKET}/run"), faults=faults)


def train_alone(cluster: Cluster) -> None:
    cluster.desk.run("tcan", *_train_command(cluster, f"/tmp/{ALONE}"))


def _train_command(cluster: Cluster, out: str) -> list[str]:
    stage = "all" if len(cluster.stages) == len(STEPS) else str(cluster.stages[0])
    return ["train", f"{BUCKET}/dataset", "--out", out, "--stage", stage, *TRAIN]


def animate(cluster: Cluster) -> None:
    faults = dict.fromkeys(("machine", "mlflow", "s3"), "^1 of ")
    cluster.submit(*_animate_command(cluster, "pairs"), faults=faults)


def animate_alone(cluster: Cluster) -> None:
    cluster.desk.run("tcan", *_animate_command(cluster, ALONE))


def _animate_command(cluster: Cluster, table: str) -> list[str]:
    model = f"{BUCKET}/run/model" if "train" in cluster.jobs else "mini"
    return ["animate", "--pairs", f"{BUCKET}/pairs/{table}.csv", "--model", model, *ANIMATE]


def evaluate(cluster: Cluster) -> None:
    """The job runs on one machine. If that machine is switched off, the job fails, and is submitted again."""
    if "machine" in cluster.faults:
        cluster.submit(*_evaluate_command(cluster, "evaluation"), faults={"machine": "^1 of "}, status=1)
    faults = dict.fromkeys(("mlflow", "s3"), "^1 of ")
    cluster.submit(*_evaluate_command(cluster, "evaluation"), faults=faults)


def evaluate_alone(cluster: Cluster) -> None:
    cluster.desk.run("tcan", *_evaluate_command(cluster, ALONE))


def _evaluate_command(cluster: Cluster, out: str) -> list[str]:
    model = "models:/tcan@run" if "train" in cluster.jobs else "mini"
    return ["evaluate", f"{BUCKET}/heldout", "--model", model, "--out", f"{BUCKET}/{out}", *EVALUATE]


JOBS: dict[str, dict[str, Callable[[Cluster], None]]] = {
    "preprocess": {"preprocess, s3 to s3": preprocess},
    "train": {
        "train, checkpoints and models in the bucket": train,
        "the same training on one machine, undisturbed": train_alone,
    },
    "animate": {
        "animate --pairs, table and results in the bucket": animate,
        "the same animations on one machine, undisturbed": animate_alone,
    },
    "evaluate": {
        "evaluate, results in the bucket": evaluate,
        "the same evaluation on one machine, undisturbed": evaluate_alone,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="default: all")
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="preprocess and train stage 1 only")
    arguments = parser.parse_args()
    wanted = ["preprocess", "train"] if arguments.quick else arguments.jobs
    if "train" in wanted and "preprocess" not in wanted:
        parser.error("--jobs train: also needs preprocess")
    if reason := missing_requirement() or mlflow_stack.missing_program():
        print(f"try-cluster: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="machines-") as folder, ExitStack() as stack:
        jobs = [job for job in JOBS if job in wanted]
        stages = [1] if arguments.quick else list(STEPS)
        cluster = Cluster(Path(folder), stack, jobs, arguments.faults, stages)
        with cluster.timed("machines, S3, MLflow with PostgreSQL and Ray started, videos uploaded"):
            cluster.start()
        for job in jobs:
            for title, phase in JOBS[job].items():
                with cluster.timed(title):
                    phase(cluster)
        parts = [
            part for job in jobs for part in ([f"stage{n}" for n in stages] if job == "train" else [job])
        ]
        with cluster.timed("results read on a new machine"):
            output = cluster.machine("reader").run(*STEP, "report", *parts)
        good = check_results(json.loads(output.splitlines()[-1]), STEPS, CLIP_FRAMES)
        cluster.say("all checks passed" if good else "a check failed")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
