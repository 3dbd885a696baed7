"""Logged data is read back from a real store with the MLflow client."""

import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import yaml
from mlflow import MlflowClient

import pipelines
from pipelines import system_metrics, tracking
from pipelines.config import Config
from pipelines.config.parser import load_config
from pipelines.ui import ui
from tcan.errors import UserError

ROOT = Path(pipelines.__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Configuration with one store for all tests of this module, because MLflow needs seconds to create a store."""
    return load_config("--tracking.folder", str(tmp_path_factory.mktemp("tracking") / "runs"))


def client_of(config: Config) -> MlflowClient:
    return MlflowClient(f"sqlite:///{config.tracking.folder}/mlflow.db")


def test_registered_models_resolve_by_alias_version_and_run(config: Config, tmp_path: Path) -> None:
    contents = {}
    for number in (1, 2):
        folder = tmp_path / f"out{number}" / "model"
        folder.mkdir(parents=True)
        info = {"schema_version": 1, "pretrained": {}, "number": number}
        (folder / "tcan.json").write_text(json.dumps(info))
        with tracking.run("stage2", "stage 2", config.tracking, {}, config.tracking.folder) as run:
            run.model(folder, "tcan", f"out.{number}", config.animate)
        contents |= {f"models:/tcan@out-{number}": number, f"models:/tcan/{number}": number, run.id: number}
    contents["models:/tcan@latest"] = 2
    for reference, number in contents.items():
        found = tracking.local_model(reference, config.tracking)
        assert json.loads((found / "tcan.json").read_text())["number"] == number, reference
    assert tracking.local_model("some/folder", config.tracking) == Path("some/folder")
    for unknown in ("models:/tcan@other", "models:/nothing@latest", "0" * 32):
        with pytest.raises(UserError, match=f"{unknown}: not found in .*--tracking.folder"):
            tracking.local_model(unknown, config.tracking)
    with pytest.raises(UserError, match="models:/tcan: no version"):
        tracking.local_model("models:/tcan", config.tracking)
    nowhere = dataclasses.replace(config.tracking, folder=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"models:/tcan@latest: no MLflow store in .*nowhere"):
        tracking.local_model("models:/tcan@latest", nowhere)
    assert not (tmp_path / "nowhere").exists()


def test_logged_metrics_params_and_artifacts_are_read_back(config: Config, tmp_path: Path) -> None:
    params = dataclasses.asdict(config)
    (tmp_path / "video.mp4").write_bytes(b"video")
    with tracking.run("train", "stage 1", config.tracking, params, config.tracking.folder) as run:
        for step in range(3):
            run.metrics({"loss": 1 / (step + 1), "grad_norm": float(step)}, step=step)
        run.image(np.full((8, 8, 3), 200, np.uint8), "samples", step=2)
        run.image(np.full((8, 8, 3), 200, np.uint8), "sheets/all.png")
        run.file(tmp_path / "video.mp4", "videos")
        assert client_of(config).get_run(run.id).info.status == "RUNNING"
    client = client_of(config)
    found = client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "stage 1"
    assert found.data.tags["tcan.kind"] == "train"
    history = client.get_metric_history(run.id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert found.data.params["size"] == "128"
    assert found.data.params["train.workers"] == str(config.train.workers)
    artifacts = Path(config.tracking.folder) / "artifacts" / run.id / "artifacts"
    assert yaml.safe_load((artifacts / "config.yaml").read_text()) == params
    assert (artifacts / "videos" / "video.mp4").read_bytes() == b"video"
    assert (artifacts / "sheets" / "all.png").exists()
    assert len(list((artifacts / "images").glob("samples+step+2+*.png"))) == 1


def test_parent_and_child_runs_are_linked(config: Config) -> None:
    with tracking.run("preprocess", "dataset", config.tracking, {}, config.tracking.folder) as dataset:
        pass
    with tracking.run(
        "train",
        "stage 2",
        config.tracking,
        {},
        config.tracking.folder,
        {"dataset": dataset.id, "stage1": None},
    ) as run:
        pass
    client = client_of(config)
    tags = client.get_run(run.id).data.tags
    assert tags["tcan.dataset_run"] == dataset.id
    assert "tcan.stage1_run" not in tags
    assert f"/runs/{dataset.id})" in tags["mlflow.note.content"]
    assert (
        f"[stage 2](#/experiments/1/runs/{run.id})"
        in client.get_run(dataset.id).data.tags["mlflow.note.content"]
    )


def test_parent_run_of_another_store_is_recorded_as_tag(config: Config) -> None:
    elsewhere = "0" * 32
    with tracking.run(
        "train", "stage 1", config.tracking, {}, config.tracking.folder, {"dataset": elsewhere}
    ) as run:
        pass
    tags = client_of(config).get_run(run.id).data.tags
    assert tags["tcan.dataset_run"] == elsewhere


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_exception_sets_run_status(config: Config, error: type[BaseException], status: str) -> None:
    with (
        pytest.raises(error),
        tracking.run("train", "stage 1", config.tracking, {}, config.tracking.folder) as run,
    ):
        raise error
    assert client_of(config).get_run(run.id).info.status == status


def test_reopened_run_continues_and_records_changed_params(config: Config) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        tracking.run(
            "train", "reopened", config.tracking, {"train": {"workers": 1, "lr": 0.1}}, config.tracking.folder
        ) as first,
    ):
        first.metrics({"loss": 2.0}, step=0)
        raise KeyboardInterrupt
    resumed = {"train": {"workers": 2, "lr": 0.1}}
    with tracking.run(
        "train", "reopened", config.tracking, resumed, config.tracking.folder, run_id=first.id
    ) as second:
        assert client_of(config).get_run(first.id).info.status == "RUNNING"
        second.metrics({"loss": 1.0}, step=1)
    client = client_of(config)
    found = client.get_run(first.id)
    assert second.id == first.id
    assert found.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(first.id, "loss")] == [0, 1]
    assert found.data.params["train.workers"] == "1"
    assert found.data.tags["tcan.changed_params"] == "train.workers=2"
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    named = client.search_runs([experiment.experiment_id], "attributes.run_name = 'reopened'")
    assert [found.info.run_id for found in named] == [first.id]


@pytest.mark.slow
def test_system_metrics_are_recorded(config: Config) -> None:
    with tracking.run("train", "stage 1", config.tracking, {}, config.tracking.folder) as run:
        time.sleep(2.5 * system_metrics.SECONDS)
    history = client_of(config).get_metric_history(run.id, "system/cpu_utilization_percentage")
    assert len(history) >= 2


def test_git_commit_is_independent_of_working_directory(tmp_path: Path) -> None:
    """The packages are copied to a new repository and queried from a directory outside of it."""
    repository, outside = tmp_path / "repository", tmp_path / "outside"
    outside.mkdir()
    for package in ("tcan", "pipelines"):
        shutil.copytree(
            ROOT / package, repository / package, ignore=shutil.ignore_patterns("__pycache__", "mini")
        )

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=repository, check=True, capture_output=True, text=True
        ).stdout

    def origin() -> dict[str, str]:
        code = "import json; from pipelines import tracking; print(json.dumps(tracking._origin()))"
        completed = subprocess.run(
            [sys.executable, "-c", code], cwd=outside, env={"PYTHONPATH": str(repository), "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return yaml.safe_load(completed.stdout)

    git("init", "--quiet")
    assert "mlflow.source.git.commit" not in origin()  # the repository does not track the package yet
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    assert origin()["mlflow.source.git.commit"] == git("rev-parse", "HEAD").strip()
    assert origin()["tcan.git_dirty"] == "false"
    (repository / "pipelines" / "cli.py").write_text("changed")
    assert origin()["tcan.git_dirty"] == "true"


def test_deleted_runs_never_stop_a_job(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    folder, client = config.tracking.folder, client_of(config)
    with tracking.run("preprocess", "dataset", config.tracking, {}, folder) as dataset:
        pass
    client.delete_run(dataset.id)
    with tracking.run("stage1", "stage 1", config.tracking, {}, folder, {"dataset": dataset.id}) as run:
        run.metrics({"loss": 1.0}, step=1)
    tags = client.get_run(run.id).data.tags
    assert tags["tcan.dataset_run"] == dataset.id
    assert f"dataset: run {dataset.id} (deleted" in tags["mlflow.note.content"]
    client.delete_run(run.id)
    with tracking.run("stage1", "stage 1", config.tracking, {}, folder, run_id=run.id) as reopened:
        reopened.metrics({"loss": 2.0}, step=2)
    assert reopened.id == run.id and "was deleted; it is restored" in capsys.readouterr().out
    assert client.get_run(run.id).info.lifecycle_stage == "active"
    assert [point.value for point in client.get_metric_history(run.id, "loss")] == [1.0, 2.0]
    with tracking.run("stage1", "stage 1", config.tracking, {}, folder, run_id="0" * 32) as other:
        other.metrics({"loss": 3.0}, step=3)
    assert f"MLflow run {'0' * 32}: not in sqlite:///" in capsys.readouterr().out
    assert client.get_run(other.id).info.status == "FINISHED"


def test_store_uri_precedence_is_config_environment_folder(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking.resolve_uri(config.tracking) == f"sqlite:///{config.tracking.folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:1")
    assert tracking.resolve_uri(config.tracking) == "http://server:1"
    explicit = dataclasses.replace(config.tracking, uri="http://named:2")
    assert tracking.resolve_uri(explicit) == "http://named:2"


def test_unreachable_server_is_a_user_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with (
        pytest.raises(UserError, match="no MLflow server responds"),
        tracking.run("train", "stage 1", config.tracking, {}, config.tracking.folder),
    ):
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ui_on_occupied_port_raises_user_error(config: Config) -> None:
    with tracking.run("train", "stage 1", config.tracking, {}, config.tracking.folder):
        pass
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use.* --port"):
            ui(config, port)


def test_ui_without_runs_raises_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: no recorded runs"):
        ui(load_config("--tracking.folder", str(tmp_path)), free_port())


@pytest.mark.slow
def test_ui_serves_runs_and_artifacts_until_interrupted(config: Config, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"video")
    with tracking.run("train", "stage 1", config.tracking, {}, config.tracking.folder) as run:
        run.file(tmp_path / "video.mp4")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "ui", "--port", str(port), "--tracking.folder", config.tracking.folder],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert server.stdout is not None
    address = f"http://127.0.0.1:{port}"
    assert address in server.stdout.readline()
    try:
        assert "<html" in requests.get(address, timeout=30).text
        found = MlflowClient(address).get_run(run.id)
        assert found.info.run_name == "stage 1"
        video = requests.get(f"{address}/get-artifact", {"path": "video.mp4", "run_uuid": run.id}, timeout=30)
        assert video.content == b"video"
        # Artifacts of a run that is recorded through this server are stored on the server.
        server_config = dataclasses.replace(config.tracking, uri=address)
        with tracking.run("train", "stage 2", server_config, {"seed": 1}, config.tracking.folder) as second:
            pass
        assert (
            requests.get(
                f"{address}/get-artifact", {"path": "config.yaml", "run_uuid": second.id}, timeout=30
            ).text
            == "seed: 1\n"
        )
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130
    with pytest.raises(requests.ConnectionError):
        requests.get(address, timeout=5)
    assert server.stderr is not None and server.stderr.read() == ""


def test_metrics_that_arrive_out_of_order_are_all_recorded_once(config: Config, ray_cluster: None) -> None:
    """Also by a second driver, to which a step is missing that was on its way when the first one was killed."""
    import ray

    from pipelines.gauges import TrainingGauges
    from pipelines.train.mailbox import Mailbox, Recorder, on_driver_node

    run_id = None
    for resumed, steps in ((False, (2, 1, 2, 4)), (True, (3, 4, 5))):
        mailbox = on_driver_node(Mailbox)
        with tracking.run(
            "stage1", "order", config.tracking, {}, config.tracking.folder, run_id=run_id
        ) as run:
            recorder = Recorder(mailbox, run, TrainingGauges("order", 1, run.id, 5), resumed)
            for step in steps:
                ray.get(mailbox.put.remote("metrics", {"loss": float(step)}, step))
            recorder.close()
            run_id = run.id
        ray.kill(mailbox)
    history = MlflowClient(tracking.resolve_uri(config.tracking)).get_metric_history(run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [
        (step, float(step)) for step in range(1, 6)
    ]
