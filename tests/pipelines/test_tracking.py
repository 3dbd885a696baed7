"""What is logged is read back through MLflow's own client from a real store."""

import dataclasses
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
from pipelines import tracking
from pipelines.config import Config
from pipelines.config_parser import load_config
from pipelines.ui import ui
from tcan.errors import UserError

ROOT = Path(pipelines.__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One store for all of these tests: making one takes MLflow seconds."""
    return load_config("--tracking.folder", str(tmp_path_factory.mktemp("tracking") / "runs"))


def client_of(config: Config) -> MlflowClient:
    return MlflowClient(f"sqlite:///{config.tracking.folder}/mlflow.db")


def test_a_registered_model_is_found(config: Config, tmp_path: Path) -> None:
    contents = {}
    for number in (1, 2):
        folder = tmp_path / f"out{number}" / "model"
        folder.mkdir(parents=True)
        (folder / "tcan.json").write_text(str(number))
        with tracking.run("stage2", "stage 2", config.tracking, {}) as run:
            run.model(folder, "tcan", f"out.{number}", config.animate)
        contents |= {f"models:/tcan@out-{number}": number, f"models:/tcan/{number}": number, run.id: number}
    contents["models:/tcan@latest"] = 2
    for reference, number in contents.items():
        found = tracking.local_model(reference, config.tracking)
        assert (found / "tcan.json").read_text() == str(number), reference
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


def test_round_trip(config: Config, tmp_path: Path) -> None:
    params = dataclasses.asdict(config)
    (tmp_path / "film.mp4").write_bytes(b"film")
    with tracking.run("train", "stage 1", config.tracking, params) as run:
        for step in range(3):
            run.metrics({"loss": 1 / (step + 1), "grad_norm": float(step)}, step=step)
        run.image(np.full((8, 8, 3), 200, np.uint8), "samples", step=2)
        run.image(np.full((8, 8, 3), 200, np.uint8), "sheets/all.png")
        run.file(tmp_path / "film.mp4", "videos")
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
    assert (artifacts / "videos" / "film.mp4").read_bytes() == b"film"
    assert (artifacts / "sheets" / "all.png").exists()
    assert len(list((artifacts / "images").glob("samples+step+2+*.png"))) == 1


def test_runs_point_at_each_other(config: Config) -> None:
    with tracking.run("preprocess", "dataset", config.tracking, {}) as dataset:
        pass
    with tracking.run(
        "train", "stage 2", config.tracking, {}, {"dataset": dataset.id, "stage1": None}
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


def test_a_parent_of_another_store_is_named(config: Config) -> None:
    elsewhere = "0" * 32
    with tracking.run("train", "stage 1", config.tracking, {}, {"dataset": elsewhere}) as run:
        pass
    tags = client_of(config).get_run(run.id).data.tags
    assert tags["tcan.dataset_run"] == elsewhere


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_status_of_a_run_that_was_cut_off(config: Config, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), tracking.run("train", "stage 1", config.tracking, {}) as run:
        raise error
    assert client_of(config).get_run(run.id).info.status == status


def test_reopened_run_goes_on(config: Config) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        tracking.run("train", "reopened", config.tracking, {"train": {"workers": 1, "lr": 0.1}}) as first,
    ):
        first.metrics({"loss": 2.0}, step=0)
        raise KeyboardInterrupt
    resumed = {"train": {"workers": 2, "lr": 0.1}}
    with tracking.run("train", "reopened", config.tracking, resumed, run_id=first.id) as second:
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


def test_several_processes_log_to_one_run_at_once(config: Config, tmp_path: Path) -> None:
    """Each with another working directory than the driver's, as Ray Train's workers have."""
    code = """
import sys
from pipelines import tracking
from pipelines.config import TrackingConfig
folder, run_id, worker = sys.argv[1:]
run = tracking.attach(TrackingConfig(folder=folder), run_id)
for step in range(30):
    run.metrics({f"loss_{worker}": step}, step=step)
"""
    with tracking.run("train", "stage 1", config.tracking, {}) as run:
        command = [sys.executable, "-c", code, run.config.folder, run.id]
        environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
        workers = [subprocess.Popen([*command, str(i)], cwd=tmp_path, env=environment) for i in range(3)]
        for step in range(30):
            run.metrics({"loss_driver": step}, step=step)
        assert [worker.wait() for worker in workers] == [0, 0, 0]
        assert client_of(config).get_run(run.id).info.status == "RUNNING"  # no worker has ended it
    for name in ("driver", "0", "1", "2"):
        history = client_of(config).get_metric_history(run.id, f"loss_{name}")
        assert [point.value for point in history] == list(range(30))


@pytest.mark.slow
def test_system_metrics(config: Config) -> None:
    with tracking.run("train", "stage 1", config.tracking, {}) as run:
        time.sleep(2.5 * tracking.SYSTEM_METRICS_SECONDS)
    history = client_of(config).get_metric_history(run.id, "system/cpu_utilization_percentage")
    assert len(history) >= 2


def test_git_commit_whatever_the_working_directory(tmp_path: Path) -> None:
    """In a fresh repository of these packages, asked from outside of it."""
    repository, outside = tmp_path / "repository", tmp_path / "outside"
    outside.mkdir()
    for package in ("tcan", "pipelines"):
        shutil.copytree(
            ROOT / package, repository / package, ignore=shutil.ignore_patterns("__pycache__", "mini")
        )

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=repository, check=True, capture_output=True, text=True
        ).stdout

    def origin() -> dict[str, str]:
        code = "import json; from pipelines import tracking; print(json.dumps(tracking._origin()))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=outside, env={"PYTHONPATH": str(repository), "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return yaml.safe_load(done.stdout)

    git("init", "--quiet")
    assert (
        "mlflow.source.git.commit" not in origin()
    )  # a repository that doesn't track the package is not its own
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    assert origin()["mlflow.source.git.commit"] == git("rev-parse", "HEAD").strip()
    assert origin()["tcan.git_dirty"] == "false"
    (repository / "pipelines" / "cli.py").write_text("changed")
    assert origin()["tcan.git_dirty"] == "true"


def test_place_of_the_store(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.resolve_uri(config.tracking) == f"sqlite:///{config.tracking.folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:1")
    assert tracking.resolve_uri(config.tracking) == "http://server:1"
    named = dataclasses.replace(config.tracking, uri="http://named:2")
    assert tracking.resolve_uri(named) == "http://named:2"


def test_what_cannot_be_reached(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking.run("train", "stage 1", config.tracking, {}):
        pass
    with pytest.raises(UserError, match=f"run {'0' * 32}: not found in sqlite:///"):
        tracking.attach(config.tracking, "0" * 32)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with (
        pytest.raises(UserError, match="no MLflow server responds"),
        tracking.run("train", "stage 1", config.tracking, {}),
    ):
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_page_on_a_port_in_use(config: Config) -> None:
    with tracking.run("train", "stage 1", config.tracking, {}):
        pass
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use.* --port"):
            ui(config, port)


def test_page_without_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: no recorded runs"):
        ui(load_config("--tracking.folder", str(tmp_path)), free_port())


@pytest.mark.slow
def test_page_shows_the_runs_until_interrupted(config: Config, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"film")
    with tracking.run("train", "stage 1", config.tracking, {}) as run:
        run.file(tmp_path / "film.mp4")
    port = free_port()
    page = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "ui", "--port", str(port), "--tracking.folder", config.tracking.folder],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert page.stdout is not None
    address = f"http://127.0.0.1:{port}"
    assert address in page.stdout.readline()
    try:
        assert "<html" in requests.get(address, timeout=30).text
        found = MlflowClient(address).get_run(run.id)
        assert found.info.run_name == "stage 1"
        film = requests.get(f"{address}/get-artifact", {"path": "film.mp4", "run_uuid": run.id}, timeout=30)
        assert film.content == b"film"
        # A run recorded through that server keeps its artifacts there too.
        through = dataclasses.replace(config.tracking, uri=address)
        with tracking.run("train", "stage 2", through, {"seed": 1}) as second:
            pass
        assert (
            requests.get(
                f"{address}/get-artifact", {"path": "config.yaml", "run_uuid": second.id}, timeout=30
            ).text
            == "seed: 1\n"
        )
    finally:
        page.send_signal(signal.SIGINT)
        assert page.wait(30) == 130
    with pytest.raises(requests.ConnectionError):
        requests.get(address, timeout=5)
    assert page.stderr is not None and page.stderr.read() == ""
