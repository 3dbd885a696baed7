"""All jobs on a Ray cluster of machines that share nothing but a bucket and an MLflow server.

    sudo bash infra/try-cluster.sh

The machines are Linux namespaces (`tests.infra.machines`): `head` and two workers with one CPU each run Ray; `server` runs an
S3 server (moto) and MLflow; `desk` is outside of the cluster. `desk` submits preprocessing
and training. While stage 1 is training, a worker machine is switched off and another one is started. Then the same training
runs on `desk` alone, without faults.

The exit status is 0 if every clip is stored once, every step is recorded once, all losses equal those of the undisturbed run,
and the results can be read on `desk`.
"""

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.infra.machines import NETWORK, ROOT, Machine, Switch, missing_requirement
from tests.infra.steps import BUCKET, FRAMES, HELD_OUT, HELD_OUT_FRAMES, VIDEOS

SERVER = f"{NETWORK}.10"
HEAD = f"{NETWORK}.1"
MLFLOW = f"http://{SERVER}:5000"
STEP = ("python", "-m", "tests.infra.steps")
SUBMIT = ("--submit", f"http://{HEAD}:8265")
ALONE = "/tmp/alone"  # folder of the undisturbed training, on `desk`
STEPS = {1: 12, 2: 4}
FAULT_STEP = 4
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
}
PREPROCESS = ["--size=64", f"--preprocess.clip_frames={CLIP_FRAMES}", "--preprocess.validation_fraction=0"]
TRAIN = [
    "--size=64", "--train.workers=2", "--train.zero_stage=2", "--train.clip_frames=8", "--train.log_every=1",
    *(f"--train.stage{n}.steps={steps}" for n, steps in STEPS.items()),
    *(f"--train.stage{n}.{key}" for n in STEPS for key in (
        "batch_size=4", "micro_batch=1", "checkpoint_every=3", "sample_every=0", "validate_every=0"
    )),
]  # fmt: skip
ANIMATE = ["--animate.steps=2", "--animate.guidance_scale=1", "--evaluate.frames=8"]


class Cluster:
    """The machines, and a log of times. `worker_1` and `worker_2` are the worker machines that run at the start."""

    desk: Machine
    head: Machine
    worker_2: Machine

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack, self._began = folder, stack, time.monotonic()
        self._switch = Switch()
        stack.callback(self._switch.close)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    @contextmanager
    def timed(self, text: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.say(f"{text} ({time.monotonic() - began:.1f} s)")

    def _machine(self, name: str, number: int) -> Machine:
        machine = Machine(self._switch, self._folder / name, name, number, ENVIRONMENT)
        self._stack.callback(machine.kill)
        return machine

    def start(self) -> None:
        """Start the machines and their services, and upload the inputs."""
        self.head, self.desk, server = (
            self._machine(name, number) for name, number in (("head", 1), ("desk", 20), ("server", 10))
        )
        _start_ray(self.head, "--head", "--num-cpus=0", "--dashboard-host=0.0.0.0")
        server.start("python", "-m", "moto.server", "--host", "0.0.0.0", "--port", "9000", log="s3.log")
        server.start(
            "mlflow", "server", "--host", "0.0.0.0", "--workers", "1", "--backend-store-uri",
            "sqlite:////tmp/mlflow.db", "--artifacts-destination", "/tmp/artifacts", log="mlflow.log",
        )  # fmt: skip
        self._wait_for(f"{ENVIRONMENT['AWS_ENDPOINT_URL']}/")
        self.desk.run(*STEP, "prepare")
        self._wait_for(f"{MLFLOW}/health")
        self._wait_for(f"http://{HEAD}:8265/api/version")
        self.add_worker(1)
        self.worker_2 = self.add_worker(2)

    def add_worker(self, number: int) -> Machine:
        machine = self._machine(f"worker-{number}", 1 + number)
        _start_ray(machine, f"--address={HEAD}:6379", "--num-cpus=1")
        return machine

    def _wait_for(self, url: str) -> None:
        code = f"import urllib.request as r; r.urlopen({url!r}, timeout=5)"
        wait_for(lambda: self.desk.start("python", "-c", code, log="probe.log").wait() == 0, url)


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


def step_of(log: Path) -> int:
    """Last step in the log of a training."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("stage 1: step ")]
    return int(lines[-1].split()[3].partition("/")[0]) if lines else 0


def preprocess(cluster: Cluster) -> None:
    cluster.desk.run("tcan", "preprocess", f"{BUCKET}/videos", f"{BUCKET}/dataset", *PREPROCESS, *SUBMIT)


def train_with_fault(cluster: Cluster) -> None:
    """Train both stages; a machine is switched off in stage 1 and replaced."""
    desk = cluster.desk
    job = desk.start(
        "tcan", "train", f"{BUCKET}/dataset", "--out", f"{BUCKET}/run", *TRAIN, *SUBMIT, log="train.log"
    )
    log = desk.file("/tmp/train.log")
    wait_for(lambda: step_of(log) >= FAULT_STEP or job.poll() is not None, f"step {FAULT_STEP}")
    if job.poll() is None:
        cluster.worker_2.kill()
        cluster.say(f"train: {cluster.worker_2.name} switched off after step {step_of(log)}")
        cluster.add_worker(3)
    if job.wait(TIMEOUT):
        raise RuntimeError(f"tcan train: exit status {job.returncode}\n{log.read_text()[-4000:]}")


def train_alone(cluster: Cluster) -> None:
    cluster.desk.run("tcan", "train", f"{BUCKET}/dataset", "--out", ALONE, *TRAIN)


def animate(cluster: Cluster) -> None:
    command = ["tcan", "animate", "--pairs", f"{BUCKET}/pairs/pairs.csv", "--model", f"{BUCKET}/run/model"]
    cluster.head.run(*command, *ANIMATE, RAY_ADDRESS=f"{HEAD}:6379")


def evaluate(cluster: Cluster) -> None:
    command = ["tcan", "evaluate", f"{BUCKET}/heldout", "--model", "models:/tcan@run"]
    cluster.desk.run(*command, "--out", f"{BUCKET}/evaluation", *ANIMATE)


PHASES: dict[str, Callable[[Cluster], None]] = {
    "machines, S3, MLflow and Ray started, videos uploaded": Cluster.start,
    "preprocess, s3 to s3": preprocess,
    "train both stages, checkpoints and models in the bucket": train_with_fault,
    "the same training on one machine, undisturbed": train_alone,
    "animate --pairs, table and results in the bucket": animate,
    "evaluate the registered model outside of the cluster": evaluate,
}


def check_results(cluster: Cluster) -> bool:
    """Print the checks; returns whether all are good."""

    def check(name: str, is_good: bool, detail: str) -> bool:
        print(f"{'ok    ' if is_good else 'FAILED'}  {name}: {detail}", flush=True)
        return is_good

    found = json.loads(cluster.desk.run(*STEP, "report", ALONE).splitlines()[-1])
    clips, expected = found["clips"], VIDEOS * FRAMES // CLIP_FRAMES
    good = check(
        "every clip once", len(clips) == expected and set(clips.values()) == {1}, f"{len(clips)} clips"
    )
    for stage, steps in STEPS.items():
        losses, alone = (found[key][str(stage)] for key in ("losses", "losses_alone"))
        once = [step for step, _ in losses] == list(range(1, steps + 1))
        good &= check(f"stage {stage}, every step recorded once", once, f"{len(losses)} records")
        good &= check(
            f"stage {stage}, losses equal bit for bit", losses == alone, f"last loss {losses[-1][1]!r}"
        )
    frames, evaluation = found["frames"], found["evaluation"]
    good &= check("every pair animated", frames == [HELD_OUT_FRAMES] * HELD_OUT**2, f"frames {frames}")
    detail = f"PSNR {evaluation['metrics']['psnr']:.2f} dB"
    return check("videos evaluated", evaluation["videos"] == HELD_OUT, detail) and good


def main() -> int:
    if reason := missing_requirement():
        print(f"try-cluster: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="machines-") as folder, ExitStack() as stack:
        cluster = Cluster(Path(folder), stack)
        for name, phase in PHASES.items():
            with cluster.timed(name):
                phase(cluster)
        good = check_results(cluster)
        cluster.say("all checks passed" if good else "a check failed")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
