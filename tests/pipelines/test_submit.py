"""`--submit`, on a real cluster with its dashboard: the log is followed, the exit status passed on, Ctrl-C asks."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.dataset import read_info
from pipelines.submit import absolute_paths
from tests.pipelines.test_preprocess import write_video

ROOT = Path(__file__).parents[2]


def test_relative_paths_become_absolute_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [
        "animate",
        "--image=a.png",
        "--out",
        "b.mp4",
        "--side_by_side",
        "c",
        "--config",
        "mini",
        "--size=64",
        "s3://x/y",
        "models:/tcan@latest",
        32 * "a",
    ]
    assert absolute_paths(argv, ["--image", "--out"], ["--side_by_side"]) == [
        "animate", f"--image={tmp_path}/a.png", "--out", f"{tmp_path}/b.mp4", "--side_by_side", f"{tmp_path}/c",
        "--config", "mini", "--size=64", "s3://x/y", "models:/tcan@latest", 32 * "a",
    ]  # fmt: skip


def test_no_cluster_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "preprocess", "a", "b", "--submit", address],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"tcan: error: --submit {address}: no Ray cluster answers there")
    assert done.stderr.count("\n") == 1


HEAD = """
import socket, sys
from ray.cluster_utils import Cluster
with socket.socket() as free:  # another Ray may run on this machine, and has the default
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
options = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": port}
cluster = Cluster(initialize_head=True, head_node_args=options)
print(cluster.head_node.webui_url, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard's address of a Ray of its own, whose workers do not know where this checkout is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["RAY_AUTH_MODE"] = "disabled"
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # the job's `python`
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD], cwd=tmp_path_factory.mktemp("head"), env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address, "the cluster did not come up"
    yield f"http://{address}"
    process.communicate("", timeout=60)  # its input ends, and so does it


@pytest.mark.slow
def test_a_job_is_followed_and_its_exit_status_passed_on(
    cluster: str, tmp_path: Path, bases_folder: Path
) -> None:
    write_video(tmp_path / "videos" / "a b.mp4", 20)
    (tmp_path / "mine.yaml").write_text(
        f"size: 64\nbases: {{vae: {bases_folder}, pose: {bases_folder / 'pose'}}}\npreprocess: {{min_person_share: 0}}\n"
    )

    def tcan(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines.cli", "preprocess", *arguments, "--submit", cluster]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    bad = tcan("nowhere", "out")
    assert bad.returncode == 2
    assert f"tcan: error: {tmp_path}/nowhere: no such file or folder" in bad.stdout
    good = tcan("videos", "out", "--config", "mine.yaml")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "1 videos in 1 clips (20 frames)" in good.stdout
    assert read_info(tmp_path / "out")["counts"]["videos"] == 1
    assert (tmp_path / "tcan-mlflow").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "status", "after"), [("s", 130, "STOPPED"), ("l", 0, "RUNNING")])
def test_ctrl_c_stops_the_job_or_leaves_it(
    cluster: str, tmp_path: Path, answer: str, status: int, after: str
) -> None:
    """On a terminal, and with a source that the job waits for without end: a list that is a pipe."""
    from ray.job_submission import JobSubmissionClient

    os.mkfifo(tmp_path / "list.txt")
    command = [sys.executable, "-m", "pipelines.cli", "preprocess", "list.txt", "out", "--submit", cluster]
    leader, terminal = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=terminal, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )  # fmt: skip
    assert process.stdout is not None
    job = process.stdout.readline().split()[1]
    client = JobSubmissionClient(cluster)
    while client.get_job_status(job) == "PENDING":
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    os.write(leader, f"{answer}\n".encode())
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert client.get_job_status(job) == after
    if after == "RUNNING":
        assert f"ray job stop --address {cluster} {job}" in output
        client.stop_job(job)
