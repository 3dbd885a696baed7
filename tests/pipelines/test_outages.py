"""MLflow stores that are away, refuse requests, or are damaged. Servers are real `mlflow server` processes."""

import dataclasses
import http.server
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Run

from pipelines import cli, evaluate, storage, tracking
from pipelines.config import TrackingConfig
from pipelines.puppets.world import sample_clip, write_clip
from tcan.errors import UserError
from tests.pipelines.test_tracking import free_port


class Server:
    """An MLflow server on a store of its own that can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
        ]
        command += [
            "--artifacts-destination",
            f"{self.folder}/artifacts",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        for _ in range(600):
            try:
                requests.get(f"{self.uri}/health", timeout=5).raise_for_status()
                return
            except requests.RequestException:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.2)
        raise TimeoutError("the MLflow server did not start")

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def history(uri: str, run_id: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run_id, "loss")]


@pytest.mark.slow
def test_outage_during_a_job_delays_only_the_delivery(server: Server, tmp_path: Path) -> None:
    config = TrackingConfig(uri=server.uri, folder=str(tmp_path / "unused"))
    slowest = 0.0
    with tracking.run("stage1", "outage", config, {"seed": 1}, tmp_path) as run:
        for step in range(1, 31):
            if step == 10:
                server.kill()
            if step == 25:
                threading.Thread(target=server.start).start()
            began = time.monotonic()
            run.metrics({"loss": 1 / step}, step)
            if step == 15:
                run.image(np.full((8, 8, 3), 200, np.uint8), "samples", step)
                run.tag("when", "during the outage")
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.1)
        while run.spool.error:  # until the server is back
            time.sleep(0.1)
    assert slowest < 0.5
    assert history(server.uri, run.id) == [(step, 1 / step) for step in range(1, 31)]
    client = MlflowClient(server.uri)
    found = client.get_run(run.id)
    assert found.info.status == "FINISHED" and found.data.tags["when"] == "during the outage"
    assert len(client.list_artifacts(run.id, "images")) == 2  # the image and its preview, once
    assert not list(tmp_path.glob("*.spool"))


@pytest.mark.slow
def test_records_left_at_the_end_are_delivered_by_track_sync(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrackingConfig(uri=server.uri, folder=str(tmp_path / "unused"))
    (tmp_path / "out").mkdir()
    (tmp_path / "result.txt").write_text("result")
    with tracking.run("evaluate", "left", config, {}, tmp_path / "out") as run:
        run.metrics({"loss": 0.5}, 1)
        run.spool.drain(failures=1)
        server.kill()
        run.metrics({"loss": 0.25}, 2)
        run.file(tmp_path / "result.txt", "results")
    (spool,) = (tmp_path / "out").glob("*.spool")
    message = capsys.readouterr().out
    assert f"tracking: 3 records are not delivered to {server.uri}" in message
    assert f"tcan track sync {spool}" in message and message.count("\n") == 1
    assert cli.main(["track", "sync", str(tmp_path / "out")]) == 2
    assert "no MLflow server responds" in capsys.readouterr().err
    server.start()
    shutil.copy(spool, tmp_path / spool.name)
    assert cli.main(["track", "sync", str(tmp_path / "out")]) == 0
    assert not spool.exists()
    # A delivery that was interrupted before it was noted is repeated.
    assert cli.main(["track", "sync", str(tmp_path / spool.name)]) == 0
    client = MlflowClient(server.uri)
    assert history(server.uri, run.id) == [(1, 0.5), (2, 0.25)]
    assert client.get_run(run.id).info.status == "FINISHED"
    assert [item.path for item in client.list_artifacts(run.id, "results")] == ["results/result.txt"]


KILLED_JOB = """
import os, signal, sys
from pipelines import tracking
from pipelines.config import TrackingConfig
config = TrackingConfig(uri=sys.argv[1])
with (
    tracking.run("evaluate", "evaluate results", config, {}, sys.argv[2]) as remote,
    tracking.run("evaluate", "evaluate others", config, {}, sys.argv[2]),
    tracking.run("evaluate", "evaluate local", config, {}, sys.argv[3]) as local,
):
    for run in (remote, local):
        run.metrics({"loss": 0.5}, 1)
        run.spool.drain(failures=9)
    local.metrics({"loss": 0.25}, 2)  # delivered by the next job at the latest
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_evaluation_in_a_bucket_survives_kills_and_outages(
    server: Server,
    bucket: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The next job ends the runs of killed ones. Records of an evaluation that ends without MLflow are delivered later."""
    out = f"{bucket}/results"
    temporary = {name: tmp_path / name for name in ("machine1", "machine2")}
    for folder in temporary.values():
        folder.mkdir()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_JOB, server.uri, out, tmp_path / "local"],
        env=os.environ | {"TMPDIR": str(temporary["machine1"]), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert killed.returncode == -signal.SIGKILL
    client = MlflowClient(server.uri)

    def runs() -> dict[tuple[str, str], Run]:
        found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        return {(run.info.run_name, run.info.status): run for run in found if "evaluate" in run.info.run_name}

    assert [status for _, status in runs()] == 3 * ["RUNNING"]
    config = TrackingConfig(uri=server.uri)
    with tracking.run("evaluate", "evaluate local", config, {}, tmp_path / "local"):
        pass
    local = runs()["evaluate local", "KILLED"]
    assert history(server.uri, local.info.run_id) == [(1, 0.5), (2, 0.25)]
    assert ("evaluate local", "FINISHED") in runs() and not list((tmp_path / "local").glob("*.spool"))

    (tmp_path / "held-out").mkdir()
    write_clip(sample_clip("dance", 2, 3), tmp_path / "held-out" / "dance")
    measure = evaluate.compute_metrics

    def measure_and_kill_server(videos: list[evaluate.Evaluated]) -> None:
        assert runs().keys() >= {("evaluate results", "KILLED"), ("evaluate others", "RUNNING")}
        server.kill()
        measure(videos)

    monkeypatch.setattr(evaluate, "compute_metrics", measure_and_kill_server)
    monkeypatch.setattr(tracking, "OUTAGE_SECONDS", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary["machine2"]))
    options = ["--animate.steps=1", "--animate.guidance_scale=1", f"--tracking.uri={server.uri}"]
    command = ["evaluate", str(tmp_path / "held-out"), "--model", str(model_folder), "--out", out, *options]
    assert cli.main(command) == 0
    output = capsys.readouterr().out
    assert "1 of 1 videos" in output and "records are not delivered" in output
    report = json.loads(storage.read_bytes(f"{out}/evaluation.json"))
    server.start()
    assert cli.main(["track", "sync", str(temporary["machine2"])]) == 0
    finished = runs()["evaluate results", "FINISHED"]
    assert finished.info.run_id == report["mlflow_run_id"]
    assert finished.data.metrics["psnr"] == report["metrics"]["psnr"]
    artifacts = {item.path for item in client.list_artifacts(finished.info.run_id)}
    assert artifacts >= {"evaluation.json", "videos.csv", "sheet.png", "videos"}
    assert [item.path for item in client.list_artifacts(finished.info.run_id, "videos")] == [
        "videos/000-dance.mp4"
    ]


@pytest.mark.slow
def test_job_with_results_in_a_bucket_waits_for_the_server_at_its_end(
    server: Server,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The spool file would be lost with the container of the job."""
    monkeypatch.setattr(tracking, "OUTAGE_SECONDS", 300)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def start_after_the_attempts() -> None:
        while "waiting up to 300 s" not in printed[-1]:
            time.sleep(0.1)
            printed.append(capsys.readouterr().out)
        server.start()

    printed = [""]
    starter = threading.Thread(target=start_after_the_attempts)
    with tracking.run("evaluate", "remote", TrackingConfig(uri=server.uri), {}, f"{bucket}/waits") as run:
        run.spool.drain(failures=9)
        server.kill()
        run.metrics({"loss": 0.5}, 1)
        starter.start()
    starter.join()
    assert history(server.uri, run.id) == [(1, 0.5)]
    assert MlflowClient(server.uri).get_run(run.id).info.status == "FINISHED"
    assert not list(tmp_path.glob("*.spool"))
    assert "not delivered" not in "".join(printed) + capsys.readouterr().out


def test_job_without_required_tracking_starts_without_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(
        tmp_path
    )  # MLflow's default for artifacts of a database is a folder in the working directory
    away = TrackingConfig(uri=f"http://user:secret@127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="no MLflow server responds"):
        tracking.check(away)
    optional = dataclasses.replace(away, required=False)
    with tracking.run("stage1", "later", optional, {"tracking": {"uri": away.uri}}, tmp_path) as run:
        run.metrics({"loss": 1.0, "other": float("nan")}, 1)
    (spool,) = tmp_path.glob("*.spool")
    output = capsys.readouterr().out
    assert "the job runs, and its records wait" in output and f"tcan track sync {spool}" in output
    assert "secret" not in output and b"secret" not in spool.read_bytes()
    store = f"sqlite:///{tmp_path}/store.db"
    copy = shutil.copy(spool, tmp_path / "copy.spool")
    for file in (spool, copy):
        assert cli.main(["track", "sync", str(file), f"--tracking.uri={store}"]) == 0
    client = MlflowClient(store)
    (found,) = client.search_runs([item.experiment_id for item in client.search_experiments()])
    assert found.info.run_name == "later" and found.info.status == "FINISHED"
    assert history(store, found.info.run_id) == [(1, 1.0)]
    assert found.data.params == {"tracking.uri": away.uri.replace("user:secret", "***")}


@contextmanager
def answering(status: int) -> Iterator[str]:
    """Address of an HTTP server that answers all requests, apart from the health check, with this status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else status)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://me:secret@127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "error code 401.*; set MLFLOW_TRACKING_USERNAME"),
        (403, "error code 403.*; check the permissions"),
        (404, "error code 404.*; check the address"),
        (500, "500 error responses.*; check the log of the server"),
    ],
)
def test_refusing_server_is_a_user_error(
    status: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with answering(status) as uri, pytest.raises(UserError, match=advice) as error:
        tracking.check(TrackingConfig(uri=uri))
    assert "secret" not in str(error.value) and "***@127.0.0.1" in str(error.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mlflow:5000", "tracking.uri = mlflow:5000: not an MLflow server or database"),
        ("file:///tmp/runs", "tracking.uri = file:///tmp/runs: not an MLflow server or database"),
        ("garbage", "tracking.uri = garbage: not an MLflow server or database"),
        ("postgresql+pg8000://me:secret@127.0.0.1/runs", "install the driver of this database"),
    ],
)
def test_unusable_uri_is_a_user_error(uri: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        tracking.check(TrackingConfig(uri=uri))
    assert message in str(error.value) and "secret" not in str(error.value)


def test_damaged_or_read_only_tracking_folder_is_a_user_error(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "mlflow.db").write_text("not a database" * 100)
    (tmp_path / "foreign").mkdir()
    with sqlite3.connect(tmp_path / "foreign" / "mlflow.db") as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('unknown')")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for folder in (tmp_path / "file", tmp_path / "damaged", tmp_path / "foreign", small_disk / "runs"):
        with pytest.raises(
            UserError, match=f"MLflow store sqlite:///{folder}.*: cannot be used .*; check this store"
        ):
            tracking.check(TrackingConfig(folder=str(folder)))
