"""The MLflow server of infra/mlflow without containers: PostgreSQL, an S3 server (moto), basic authentication."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow.artifacts
import pytest
import requests
from mlflow import MlflowClient

from pipelines import cli, storage, tracking
from pipelines.config import TrackingConfig
from pipelines.config.parser import load_config
from tests.infra.mlflow_stack import SCRIPT, install_server_packages, missing_program
from tests.pipelines.test_tracking import free_port

PASSWORD = "correct horse"
START_SECONDS = 240  # also to stop; on a busy machine


class Stack:
    """PostgreSQL and MLflow, started by the script."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.postgres_port = folder, free_port(), free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.environment = os.environ | {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(folder / "packages"),
            "PGPORT": str(self.postgres_port),
            "MLFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
            "POSTGRES_PASSWORD": "of the database",
            "MLFLOW_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs sessions",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "WORKERS": "1",
        }

    def start(self) -> None:
        script = [SCRIPT, self.folder, str(self.port)]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(script, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self.folder / "log").read_text()[-3000:]
            try:
                requests.get(f"{self.uri}/health", timeout=5).raise_for_status()
                return
            except requests.RequestException:
                time.sleep(0.2)
        raise TimeoutError((self.folder / "log").read_text()[-3000:])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(START_SECONDS) == 0
        for port in (self.port, self.postgres_port):
            with pytest.raises(requests.ConnectionError):
                requests.get(f"http://127.0.0.1:{port}", timeout=5)

    def query(self, text: str) -> str:
        command = ["psql", "-h", "127.0.0.1", "-U", "mlflow", "-tAc", text, "mlflow"]
        environment = self.environment | {"PGPASSWORD": "of the database"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def stack(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    if reason := missing_program():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="mlflow-") as folder:  # tmp_path is closed to the user postgres
        os.chmod(folder, 0o755)
        try:
            install_server_packages(Path(folder))
        except RuntimeError as error:
            pytest.skip(str(error))
        stack = Stack(Path(folder))
        stack.start()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        yield stack
        stack.stop()


@pytest.mark.slow
def test_runs_artifacts_and_models_survive_a_restart_of_server_and_database(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrackingConfig(uri=stack.uri)
    files = {
        "tcan.json": b'{"schema_version": 1, "pretrained": {}}',
        "appa/weights.safetensors": bytes(range(256)) * 4096,
    }  # of a model folder
    for name, data in files.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with tracking.run("stage1", "stack", config, {"train": {"workers": 2}}, tmp_path) as run:
        for step in range(3):
            run.metrics({"loss": 1 / (step + 1)}, step)
        run.bytes("hand and face: 手".encode(), "notes/text.txt")
        run.model(tmp_path / "model", "stack", "best", load_config().animate)
    assert not list(tmp_path.glob("*.spool"))
    stack.stop()
    stack.start()

    client = MlflowClient(stack.uri)
    found = client.get_run(run.id)
    assert found.info.status == "FINISHED" and found.data.params == {"train.workers": "2"}
    history = [(point.step, point.value) for point in client.get_metric_history(run.id, "loss")]
    assert history == [(0, 1.0), (1, 1 / 2), (2, 1 / 3)]
    note = mlflow.artifacts.download_artifacts(
        f"{found.info.artifact_uri}/notes/text.txt", tracking_uri=stack.uri
    )
    assert Path(note).read_text() == "hand and face: 手"
    model = tracking.local_model("models:/stack@best", config)
    assert {name: (model / name).read_bytes() for name in files} == files
    assert stack.query(f"SELECT status FROM runs WHERE run_uuid = '{run.id}'").strip() == "FINISHED"
    stored = storage.list_files("s3://mlflow/artifacts", recursive=True)
    assert any(name.endswith(f"{run.id}/artifacts/notes/text.txt") for name in stored)

    assert "/presigned" not in (stack.folder / "log").read_text()  # a job may not reach the S3 server

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    waiting = tmp_path / f"tracking-{run.id}.spool"
    waiting.write_text(json.dumps({"run_id": run.id, "config": vars(config)}) + "\n")
    capsys.readouterr()
    assert cli.main(["track", "sync", str(waiting)]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"tcan: error: MLflow store {stack.uri}: cannot be used") and error.count("\n") == 1
    )
    assert "MLFLOW_TRACKING_USERNAME" in error and "wrong" not in error
