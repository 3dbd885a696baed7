"""`--submit` on a real cluster with dashboard: log, exit status, packages and Ctrl-C."""

import asyncio
import contextlib
import hashlib
import json
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from ray.dashboard.modules.version import CURRENT_VERSION

from pipelines.cli import main
from pipelines.dataset import read_info
from pipelines.puppets.world import sample_clip, write_clip
from pipelines.submit import _resources, absolute_paths
from tcan.video import read_video, write_image
from tests.pipelines.test_preprocess import write_video

ROOT = Path(__file__).parents[2]
UV = list(Path(sys.prefix).glob("uv/lib/python*/site-packages"))  # installed there by the Makefile


def test_absolute_paths_changes_only_relative_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
    argv = ["study", "--model=mini", "--model", "mini", "--questions", "appa", "temporal", "--image", "mini"]
    assert absolute_paths(argv, ["--model", "--image"], [], ["--questions"]) == [
        *argv[:-1],
        f"{tmp_path}/mini",
    ]


def test_unreachable_cluster_is_a_user_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "preprocess", "a", "b", "--submit", address],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr.startswith(f"tcan: error: --submit {address}: no Ray cluster responds")
    assert process.stderr.count("\n") == 1


def test_cluster_with_another_version_of_ray_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The server has the version that Ray's own client requires, and reports another release of Ray."""

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            answer = {
                "version": CURRENT_VERSION,
                "ray_version": "2.9.0",
                "ray_commit": "",
                "session_name": "",
            }
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert main(["preprocess", "a", "b", "--submit", address]) == 2
        server.shutdown()
    error = capsys.readouterr().err
    assert error.startswith(
        f"tcan: error: --submit {address}: the cluster runs Ray 2.9.0, this environment has "
    )
    assert error.count("\n") == 1


def test_unusable_environment_option_is_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = f"{tmp_path}/requirements.lock"
    assert main(["preprocess", "a", "b", "--submit=http://head:8265", "--environment", missing]) == 2
    assert capsys.readouterr().err.startswith(f"tcan: error: --environment {missing}: no such file;")
    assert main(["preprocess", "a", "b", "--environment", missing]) == 2
    assert "--environment: only valid with --submit" in capsys.readouterr().err
    assert main(["preprocess", "a", "b", "--job_id=mine"]) == 2
    assert "--job_id: only valid with --submit" in capsys.readouterr().err
    assert main(["preprocess", "a", "b", "--submit=http://head:8265", "--job_id=a b"]) == 2
    assert "--job_id a b: letters, digits" in capsys.readouterr().err
    assert main(["jobs", "stop", "--address=http://head:8265"]) == 2
    assert "--job_id: missing with stop; pass" in capsys.readouterr().err


HEAD = """
import socket, sys
from ray.cluster_utils import Cluster
with socket.socket() as free:  # another Ray on this machine may use the default port
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
options = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": port}
cluster = Cluster(initialize_head=True, head_node_args=options)
cluster.remove_node(cluster.add_node(num_cpus=1, num_gpus=1), allow_graceful=False)
print(cluster.head_node.webui_url, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Dashboard address of a new Ray cluster that has lost a node, and whose workers cannot import from this checkout.

    Its Python is a small virtual environment with access to the packages of the current one, because Ray copies the
    environment for a job with `--environment`.
    """
    folder = tmp_path_factory.mktemp("head")
    venv.create(folder / "python", symlinks=True)
    packages = [path for path in sys.path if path.endswith("site-packages")] + [str(path) for path in UV]
    (site_packages,) = (folder / "python").glob("lib/python*/site-packages")
    (site_packages / "packages.pth").write_text("\n".join(packages))
    removed = ("PYTHONPATH", "CUDA_VISIBLE_DEVICES")  # empty here, which forbids nodes with GPUs
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment["RAY_AUTH_MODE"] = "disabled"
    environment["PATH"] = f"{folder}/python/bin:{environment['PATH']}"  # `python` of the job
    process = subprocess.Popen(
        [folder / "python" / "bin" / "python", "-c", HEAD], cwd=folder, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address, "the cluster did not start"
    yield f"http://{address}"
    process.communicate("", timeout=60)  # end of input stops the cluster


@pytest.mark.slow
def test_submit_prints_the_log_and_returns_the_exit_status(
    cluster: str, tmp_path: Path, pretrained_folder: Path
) -> None:
    write_video(tmp_path / "videos" / "a b.mp4", 20)
    (tmp_path / "mine.yaml").write_text(
        f"size: 64\npretrained: {{vae: {pretrained_folder}, pose: {pretrained_folder / 'pose'}}}\npreprocess: {{min_person_fraction: 0}}\n"
    )

    def tcan(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines.cli", "preprocess", *arguments, "--submit", cluster]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    failed = tcan("nowhere", "out")
    assert failed.returncode == 2
    assert f"tcan: error: {tmp_path}/nowhere: no such file or folder" in failed.stdout
    succeeded = tcan("videos", "out", "--config", "mine.yaml")
    assert succeeded.returncode == 0, succeeded.stdout + succeeded.stderr
    assert "1 videos in 1 clips (20 frames)" in succeeded.stdout
    assert read_info(tmp_path / "out")["counts"]["videos"] == 1
    assert (tmp_path / "tcan-mlflow").is_dir()


@pytest.mark.slow
def test_animations_and_evaluations_are_submitted_once(
    cluster: str,
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With relative paths, all at the same time; a submission that is repeated after the end computes nothing."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held-out").mkdir()
    write_clip(sample_clip("dance", 2, 3), tmp_path / "held-out" / "dance")
    write_image(sample_clip("dance", 1, 1).frames[0], tmp_path / "hero.png")
    (tmp_path / "pairs.csv").write_text("image,driving,out\nhero.png,held-out/dance.mp4,pair.mp4\n")
    os.symlink(model_folder, "model")
    inputs = ["--image", "hero.png", "--driving=held-out/dance.mp4", "--person", "largest", "--side_by_side"]
    jobs = {
        "one": ["animate", *inputs, "--out", "one.mp4"],
        "pairs": ["animate", "--pairs", "pairs.csv"],
        "evaluation": ["evaluate", "held-out", "--out=evaluation"],
    }
    options = ["--model", "model", "--animate.steps=1", "--animate.guidance_scale=1", "--submit", cluster]
    commands = {name: [*job, *options, f"--job_id=same-{name}"] for name, job in jobs.items()}
    python = [sys.executable, "-m", "pipelines.cli"]
    submitters = [subprocess.Popen([*python, *command]) for command in commands.values()]
    assert [submitter.wait(300) for submitter in submitters] == [0, 0, 0], capfd.readouterr().out
    results = [tmp_path / "one.mp4", tmp_path / "pair.mp4", tmp_path / "evaluation" / "evaluation.json"]
    written = [path.stat().st_mtime_ns for path in results]
    assert [len(read_video(path)[0]) for path in results[:2]] == [3, 3]
    capfd.readouterr()
    for name, command in commands.items():
        assert main(command) == 0
        assert f"job same-{name} on {cluster}: already submitted, succeeded" in capfd.readouterr().out
    assert written == [path.stat().st_mtime_ns for path in results]
    cpu, gpu = ({"entrypoint_num_cpus": 1, "entrypoint_num_gpus": number} for number in (0, 1))
    assert _resources(cluster, "auto") == _resources(cluster, "cpu") == cpu  # only the lost node had a GPU
    assert _resources(cluster, "cuda:0") == gpu and _resources(cluster, None) == {}


@pytest.mark.slow
def test_submitting_an_id_again_follows_its_job(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the job runs (its source is a named pipe), and after its end."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    os.mkfifo(tmp_path / "list.txt")
    job = [
        "preprocess",
        str(tmp_path / "list.txt"),
        str(tmp_path / "out"),
        f"--submit={cluster}",
        "--job_id=mine-1",
    ]
    command = [sys.executable, "-m", "pipelines.cli", *job]
    submitters = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with contextlib.suppress(BrokenPipeError):  # Arrow cannot seek in a pipe, closes it and fails
        (tmp_path / "list.txt").write_text(f"{tmp_path}/nowhere.mp4\n")  # returns when the job reads it
    outputs = [submitter.communicate(timeout=120)[0] for submitter in submitters]
    assert [submitter.returncode for submitter in submitters] == [2, 2], outputs
    assert all("tcan: error: " in output for output in outputs)
    assert main(job) == 2
    assert f"job mine-1 on {cluster}: already submitted, failed; this is its log" in capsys.readouterr().out
    assert main(["jobs", "list", f"--address={cluster}"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    (mine,) = [line for line in lines if line[0] == "mine-1"]
    assert mine[1] == "failed" and mine[3].startswith(f"preprocess {tmp_path}/list.txt")
    assert main(["jobs", "follow", f"--address={cluster}", "--job_id=mine-1"]) == 2
    assert "tcan: error: " in capsys.readouterr().out
    assert main(["jobs", "stop", f"--address={cluster}", "--job_id=other"]) == 2
    assert "--job_id other: no such job on" in capsys.readouterr().err


class Link:
    """A TCP proxy in front of the dashboard that can be cut and repaired."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.writers: set[asyncio.StreamWriter] = set()
        self.is_cut = False
        self.loop = asyncio.new_event_loop()
        server = self.loop.run_until_complete(asyncio.start_server(self.connect, "127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.transport.abort()
            return
        assert self.target.hostname is not None
        back_reader, back_writer = await asyncio.open_connection(self.target.hostname, self.target.port)
        self.writers |= {writer, back_writer}
        await asyncio.gather(self.forward(reader, back_writer), self.forward(back_reader, writer))

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()
        self.writers.discard(writer)

    def cut(self) -> None:
        def abort() -> None:
            self.is_cut = True
            for writer in self.writers:
                writer.transport.abort()

        self.loop.call_soon_threadsafe(abort)

    def repair(self) -> None:
        self.is_cut = False


@pytest.mark.slow
def test_log_is_complete_after_lost_connections(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line is printed once."""
    from ray.job_submission import JobSubmissionClient

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    lines = [f"line {number} of the job" for number in range(60)]
    script = (
        f"import time; [print(line, flush=True) or time.sleep(0.2) for line in {lines}]; raise SystemExit(3)"
    )
    job = JobSubmissionClient(cluster).submit_job(entrypoint=shlex.join(["python", "-c", script]))
    link = Link(cluster)
    command = [sys.executable, "-m", "pipelines.cli", "jobs", "follow", f"--address={link.address}"]
    process = subprocess.Popen([*command, f"--job_id={job}"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line.rstrip())
        if printed[-1] in (lines[10], lines[30]):
            link.cut()
            time.sleep(3)
            link.repair()
    assert process.wait(60) == 3
    assert [line for line in printed if line.startswith("line")] == lines


def make_wheel(folder: Path) -> str:
    """Write a wheel of the package tiny-canary; return its digest. A Python with the package reports it at startup."""
    report = (
        "import sys, tiny_canary; print('canary', tiny_canary.VERSION, 'in', sys.prefix, file=sys.stderr)\n"
    )
    files = {
        "tiny_canary.py": "VERSION = '1.2.3'\n",
        "tiny_canary.pth": report,
        "tiny_canary-1.2.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-canary\nVersion: 1.2.3\n",
        "tiny_canary-1.2.3.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "tiny_canary-1.2.3.dist-info/RECORD"
    files[record] = "".join(f"{name},,\n" for name in [*files, record])
    wheel = folder / "tiny_canary-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not UV, reason="uv is not installed; Ray would download it")
def test_environment_is_installed_with_hash_checks(cluster: str, tmp_path: Path) -> None:
    """The job has the packages of a lock file of realistic length, and a wrong digest fails."""
    digest = make_wheel(tmp_path)

    def tcan(digest: str) -> subprocess.CompletedProcess[str]:
        others = "".join(f" \\\n    --hash=sha256:{i:064x}" for i in range(3000))
        (tmp_path / "some.lock").write_text(
            f"--no-index\n--find-links {tmp_path}\ntiny-canary==1.2.3{others} \\\n    --hash=sha256:{digest}\n"
        )
        command = [sys.executable, "-m", "pipelines.cli", "preprocess", "nowhere", "out"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
        return subprocess.run(
            [*command, "--submit", cluster, "--environment", "some.lock"],
            capture_output=True, text=True, cwd=tmp_path, env=environment,
        )  # fmt: skip

    succeeded = tcan(digest)
    assert "canary 1.2.3 in /" in succeeded.stdout, succeeded.stdout + succeeded.stderr
    assert f"tcan: error: {tmp_path}/nowhere: no such file or folder" in succeeded.stdout
    assert succeeded.returncode == 2
    failed = tcan("f" * 64)
    assert failed.returncode == 1
    assert digest in failed.stderr.partition("Computed:")[2], failed.stderr  # uv prints both digests


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "status", "after"), [("s", 130, "STOPPED"), ("l", 0, "RUNNING")])
def test_ctrl_c_offers_to_stop_the_job_or_leave_it_running(
    cluster: str, tmp_path: Path, answer: str, status: int, after: str
) -> None:
    """Runs on a pseudo-terminal; the job blocks on its source, a video list that is a named pipe."""
    from ray.job_submission import JobSubmissionClient

    os.mkfifo(tmp_path / "list.txt")
    command = [sys.executable, "-m", "pipelines.cli", "preprocess", "list.txt", "out", "--submit", cluster]
    leader, terminal = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=terminal, stdout=subprocess.PIPE, text=True,
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
        assert f"tcan jobs stop --address {cluster} --job_id {job}" in output
        client.stop_job(job)
