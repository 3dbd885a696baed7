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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.infra.machines import NETWORK, ROOT, Machine, Switch, missing_requirement
from tests.infra.steps import BUCKET, FRAMES, HELD_OUT, VIDEOS

SERVER = f"{NETWORK}.10"
HEAD = f"{NETWORK}.1"
MLFLOW = f"http://{SERVER}:5000"
STEPS = {1: 12, 2: 4}
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
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "PYTHONDONTWRITEBYTECODE": "1",
    # A machine that disappears is noticed after 5 s instead of 30 s.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
PREPROCESS = ["--size=64", "--preprocess.clip_frames=16", "--preprocess.validation_fraction=0"]
TRAIN = [
    "--size=64", "--train.workers=2", "--train.zero_stage=2", "--train.clip_frames=8", "--train.log_every=1",
    *(f"--train.stage{n}.steps={steps}" for n, steps in STEPS.items()),
    *(f"--train.stage{n}.{key}" for n in STEPS for key in (
        "batch_size=4", "micro_batch=1", "checkpoint_every=3", "sample_every=0", "validate_every=0"
    )),
]  # fmt: skip
ANIMATE = ["--animate.steps=2", "--animate.guidance_scale=1", "--evaluate.frames=8"]


class Cluster:
    """The machines, each on its first use, and a log of times."""

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

    def machine(self, name: str, number: int) -> Machine:
        machine = Machine(self._switch, self._folder / name, name, number, ENVIRONMENT)
        self._stack.callback(machine.kill)
        return machine

    def worker(self, number: int) -> Machine:
        machine = self.machine(f"worker-{number}", 1 + number)
        _ray(machine, f"--address={HEAD}:6379", "--num-cpus=1")
        return machine


def _ray(machine: Machine, *options: str) -> None:
    machine.start(
        "ray", "start", *options, f"--node-ip-address={machine.address}", "--object-store-memory=100000000",
        "--disable-usage-stats", "--block", log="ray.log",
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {seconds:g} s")
        time.sleep(0.3)


def _responds(machine: Machine, url: str) -> bool:
    code = f"import urllib.request as r; r.urlopen({url!r}, timeout=5)"
    return machine.start("python", "-c", code, log="probe.log").wait() == 0


def start_server(server: Machine) -> None:
    server.start("python", "-m", "moto.server", "--host", "0.0.0.0", "--port", "9000", log="s3.log")
    server.start(
        "mlflow", "server", "--host", "0.0.0.0", "--workers", "1", "--backend-store-uri",
        "sqlite:////tmp/mlflow.db", "--artifacts-destination", "/tmp/artifacts", log="mlflow.log",
    )  # fmt: skip


def step_of(log: Path) -> int:
    """Last step in the log of a training."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("stage 1: step ")]
    return int(lines[-1].split()[3].partition("/")[0]) if lines else 0


def train_with_fault(cluster: Cluster, desk: Machine, victim: Machine) -> None:
    """Train both stages; a machine is switched off in stage 1 and replaced."""
    command = ["tcan", "train", f"{BUCKET}/dataset", "--out", f"{BUCKET}/run", *TRAIN]
    job = desk.start(*command, "--submit", f"http://{HEAD}:8265", log="train.log")
    log = desk.file("/tmp/train.log")
    wait_for(lambda: step_of(log) >= 4 or job.poll() is not None, "training: step 4")
    if job.poll() is None:
        victim.kill()
        cluster.say(f"train: {victim.name} switched off after step {step_of(log)}")
        cluster.worker(3)
    if job.wait(300):
        raise RuntimeError(f"tcan train: exit status {job.returncode}\n{log.read_text()[-4000:]}")


def check(name: str, is_good: bool, detail: str) -> bool:
    print(f"{'ok    ' if is_good else 'FAILED'}  {name}: {detail}", flush=True)
    return is_good


def run(cluster: Cluster) -> bool:
    step = ("python", "-m", "tests.infra.steps")
    with cluster.timed("machines, S3, MLflow and Ray started, videos uploaded"):
        server, desk = cluster.machine("server", 10), cluster.machine("desk", 20)
        head = cluster.machine("head", 1)
        _ray(head, "--head", "--num-cpus=0", "--dashboard-host=0.0.0.0")
        start_server(server)
        wait_for(lambda: _responds(desk, f"{ENVIRONMENT['AWS_ENDPOINT_URL']}/"), "S3")
        desk.run(*step, "prepare")
        wait_for(lambda: _responds(desk, f"{MLFLOW}/health"), "MLflow")
        wait_for(lambda: _responds(desk, f"http://{HEAD}:8265/api/version"), "Ray")
        cluster.worker(1)
        victim = cluster.worker(2)
    submitted = ("--submit", f"http://{HEAD}:8265")
    with cluster.timed("preprocess s3 -> s3"):
        desk.run("tcan", "preprocess", f"{BUCKET}/videos", f"{BUCKET}/dataset", *PREPROCESS, *submitted)
    with cluster.timed("train: both stages, checkpoints and model in the bucket"):
        train_with_fault(cluster, desk, victim)
    with cluster.timed("animate --pairs"):
        command = [
            "tcan",
            "animate",
            "--pairs",
            f"{BUCKET}/pairs/pairs.csv",
            "--model",
            f"{BUCKET}/run/model",
        ]
        head.run(*command, *ANIMATE, RAY_ADDRESS=f"{HEAD}:6379")
    with cluster.timed("evaluate the registered model on a machine outside of the cluster"):
        table = desk.run(
            "tcan", "evaluate", f"{BUCKET}/heldout", "--model", "models:/tcan@run", "--out", f"{BUCKET}/evaluation",
            *ANIMATE,
        )  # fmt: skip
    with cluster.timed("the same training on one machine, undisturbed"):
        desk.run("tcan", "train", f"{BUCKET}/dataset", "--out", "/tmp/alone", *TRAIN)

    stored = json.loads(desk.run(*step, "rows", f"{BUCKET}/dataset"))
    count, repeated = VIDEOS * FRAMES // 16, max(stored["clips"].values())
    good = check(
        "every clip once", len(stored["clips"]) == count and repeated == 1, f"{len(stored['clips'])} clips"
    )
    for stage, steps in STEPS.items():
        found, alone = (
            json.loads(desk.run(*step, "losses", f"{out}/stage{stage}"))
            for out in (f"{BUCKET}/run", "/tmp/alone")
        )
        once = sorted(map(int, found)) == list(range(1, steps + 1)) and {len(v) for v in found.values()} == {
            1
        }
        good &= check(f"stage {stage}, every step recorded once", once, f"{len(found)} steps")
        good &= check(
            f"stage {stage}, losses equal bit for bit", found == alone, f"last loss {found[str(steps)][0]!r}"
        )
    animated = json.loads(desk.run(*step, "results", f"{BUCKET}/pairs/out"))
    good &= check("animate --pairs", list(animated.values()) == [8] * HELD_OUT**2, f"{animated}")
    line = table.splitlines()[-1]
    return good & check("evaluate", f"{HELD_OUT} videos" in line, line)


def main() -> int:
    if reason := missing_requirement():
        print(f"try-cluster: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="machines-") as folder, ExitStack() as stack:
        cluster = Cluster(Path(folder), stack)
        good = run(cluster)
        cluster.say("all checks passed" if good else "a check failed")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
