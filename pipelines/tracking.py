"""Where a job's configuration, metrics and results are recorded: the one module that knows MLflow.

The driver of a job holds its run; a worker logs to the same run by its id:

    with tracking.run("train", "stage 1", config.tracking, dataclasses.asdict(config), {"dataset": run_id}) as run:
        run.metrics({"loss": 0.1}, step=1)
        ...  # elsewhere: tracking.attach(run.config, run.id).metrics({"loss": 0.09}, step=2)
"""

import dataclasses
import getpass
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

from pipelines.config import TrackingConfig
from tcan import __version__
from tcan.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SYSTEM_METRICS_SECONDS = (
    5  # often enough to draw a line in a run of a minute, rare enough not to matter in one of days
)
DATABASE = "mlflow.db"
_MAX_PER_BATCH = 100  # parameters that MLflow takes in one call
_MAX_VALUE = 6000  # characters that MLflow keeps of a parameter


def resolve(config: TrackingConfig) -> TrackingConfig:
    """The same place, named so that any process with any working directory and environment finds it.

    `config.uri` first, then MLFLOW_TRACKING_URI, else `config.folder` as an absolute path.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    return dataclasses.replace(config, uri=uri, folder=str(Path(config.folder).absolute()))


def resolve_uri(config: TrackingConfig) -> str:
    """MLflow's tracking URI: the server's, else the SQLite store in the tracking folder."""
    config = resolve(config)
    return config.uri or f"sqlite:///{config.folder}/{DATABASE}"


class Run:
    """A run that can be logged to. `config` is the resolved tracking configuration, for `attach` in a worker."""

    def __init__(self, client: "MlflowClient", config: TrackingConfig, run_id: str) -> None:
        self._client = client
        self.config = config
        self.id = run_id

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Numbers that change over `step`; written when this returns."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step or 0) for key, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics, synchronous=True)

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings, nested dicts flattened to `train.workers`. MLflow never changes one: a resumed run that has another
        value keeps the first and names the new one in the tag `tcan.changed_params`."""
        from mlflow.entities import Param

        flat = {key: str(value)[:_MAX_VALUE] for key, value in _flatten(values).items()}
        known = self._client.get_run(self.id).data.params
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), _MAX_PER_BATCH):
            self._client.log_batch(self.id, params=new[start : start + _MAX_PER_BATCH], synchronous=True)
        changed = {key: value for key, value in flat.items() if known.get(key, value) != value}
        if changed:
            self.tag(
                "tcan.changed_params",
                ", ".join(f"{key}={value}" for key, value in changed.items())[:_MAX_VALUE],
            )

    def image(self, image: np.ndarray | Image.Image, path: str, step: int | None = None) -> None:
        """A image (uint8 [H, W, 3] or PIL): with `step` one of a series named `path`, else an artifact at `path`."""
        if step is None:
            self._client.log_image(self.id, image, artifact_file=path)
        else:
            self._client.log_image(self.id, image, key=path, step=step, synchronous=True)

    def file(self, local: str | Path, folder: str = "") -> None:
        """A copy of a file (an mp4 plays in the page) into the artifact folder `folder`."""
        self._client.log_artifact(self.id, str(local), folder or None)

    def json(self, values: Mapping[str, Any], path: str) -> None:
        """Values as a JSON artifact at `path`."""
        self._client.log_dict(self.id, dict(values), path)

    def folder(self, local: str | Path, folder: str = "") -> None:
        """A copy of what lies in a folder into the artifact folder `folder`."""
        self._client.log_artifacts(self.id, str(local), folder or None)

    def model(
        self, local: str | Path, name: str, alias: str, options: Mapping[str, bool | int | float]
    ) -> None:
        """A finished model folder as the artifact `model`, which mlflow.pyfunc loads, and as the newest version of the
        registered model `name`; `alias` then means this version, until another run takes it.

        options: of a call of `TCANPipeline`, that `predict` takes as params, with their values unless others are given.
        """
        import mlflow.pyfunc
        from mlflow.exceptions import MlflowException
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

        inputs = Schema([ColSpec("string", name) for name in ("image", "driving")])
        types = {bool: "boolean", int: "long", float: "double"}
        declared = [ParamSpec(key, types[type(value)], value) for key, value in options.items()]
        params = ParamSchema([*declared, ParamSpec("seed", "long", 0)])  # MLflow passes on no others
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "model"
            mlflow.pyfunc.save_model(
                str(saved),
                loader_module="pipelines.mlflow_model",
                data_path=str(local),
                signature=ModelSignature(inputs, params=params),
                # Given whole, else MLflow looks for pip in this environment and warns that there is none.
                conda_env={
                    "dependencies": [
                        f"python={platform.python_version()}",
                        "pip",
                        {"pip": [f"tcan=={__version__}"]},
                    ]
                },
            )
            self.folder(saved, "model")
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self._client.get_run(self.id).info.artifact_uri}/model"
        made = self._client.create_model_version(name, source, self.id)
        self._client.set_registered_model_alias(name, re.sub(r"\W", "-", alias), made.version)

    def last_step(self, key: str) -> int:
        """The last step at which this number was recorded; 0: never."""
        return max((metric.step for metric in self._client.get_metric_history(self.id, key)), default=0)

    def tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.id, key, value)


@contextmanager
def run(
    kind: str,
    name: str,
    config: TrackingConfig,
    params: Mapping[str, Any],
    parents: Mapping[str, str | None] | None = None,
    run_id: str | None = None,
) -> Iterator[Run]:
    """A run of the one experiment, for as long as the block lasts; system metrics are recorded meanwhile.

    kind: the job ("preprocess", "train", "evaluate", "animate"); name: what the page shows.
    params: the whole resolved configuration, also kept as the artifact `config.yaml`.
    parents: what it was made from, as {"dataset" | "stage1" | "model": run id or None}; each becomes the tag
    `tcan.<key>_run`, and both runs' descriptions link to each other.
    run_id: re-open this run instead of creating one.

    It ends FINISHED, or FAILED by an exception, or KILLED by an interrupt.
    Raises UserError when the store cannot be reached or has no such run.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    config = resolve(config)
    client = _client(config)
    if run_id is None:
        tags = {"tcan.kind": kind, **_origin()}
        created = client.create_run(_experiment(client, config), run_name=name, tags=tags)
        run = Run(client, config, created.info.run_id)
        _link(run, {key: parent for key, parent in (parents or {}).items() if parent})
    else:
        run = attach(config, run_id)
        client.update_run(run_id, status="RUNNING")
    monitor = SystemMetricsMonitor(
        run.id,
        sampling_interval=SYSTEM_METRICS_SECONDS,
        resume_logging=run_id is not None,
        tracking_uri=resolve_uri(config),
    )
    status = "KILLED"
    try:
        run.params(params)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(yaml.safe_dump(dict(params), sort_keys=False))
            run.file(path)
        monitor.start()
        yield run
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        monitor.finish()
        client.set_terminated(run.id, status)


def attach(config: TrackingConfig, run_id: str) -> Run:
    """The run of another process, to log to; ending it stays that process's.

    Raises UserError when the store cannot be reached or has no such run.
    """
    from mlflow.exceptions import MlflowException

    config = resolve(config)
    client = _client(config)
    try:
        client.get_run(run_id)
    except MlflowException:
        raise UserError(
            f"MLflow run {run_id} is not in {resolve_uri(config)}; name the store that has it with --tracking.folder "
            "or MLFLOW_TRACKING_URI, or start again in a new output folder"
        ) from None
    return Run(client, config, run_id)


def local_model(model: str, config: TrackingConfig) -> Path:
    """The model folder that is meant: a folder, or one that MLflow holds, by models:/NAME@ALIAS, models:/NAME/VERSION
    or the id of the run that trained it; brought here when it lies elsewhere.

    Raises UserError when MLflow has no such model.
    """
    of_run = re.fullmatch(r"[0-9a-f]{32}", model) and not Path(model).exists()
    if not of_run and not model.startswith("models:/"):
        return Path(model)
    if not of_run and not re.fullmatch(r"models:/[^/@]+[/@][^/@]+", model):
        raise UserError(f"{model}: names no version; give models:/NAME@ALIAS or models:/NAME/VERSION")

    import mlflow.artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    config = resolve(config)
    if (
        not config.uri and not (Path(config.folder) / DATABASE).exists()
    ):  # looking for a model must not make one
        raise UserError(
            f"{model}: there is no MLflow store in {config.folder}; name it with --tracking.folder or MLFLOW_TRACKING_URI"
        )
    client = _client(config)
    try:
        if of_run:
            source = f"{client.get_run(model).info.artifact_uri}/model"
        else:
            source = client.get_model_version_download_uri(*get_model_name_and_version(client, model))
        folder = Path(mlflow.artifacts.download_artifacts(source, tracking_uri=resolve_uri(config)))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"{model}: not in {resolve_uri(config)} ({str(error).splitlines()[0]}); name a model folder, a run of training "
            "or a registered model, and its store with --tracking.folder or MLFLOW_TRACKING_URI"
        ) from None
    return next((file.parent for file in folder.glob("data/*/tcan.json")), folder)


def _client(config: TrackingConfig) -> "MlflowClient":
    import requests
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):  # the store's migrations and the monitor's start, a screenful
        logging.getLogger(noisy).setLevel(logging.WARNING)
    uri = resolve_uri(config)
    if uri.startswith("http"):  # MLflow itself tries for minutes
        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=10)
        except requests.RequestException:
            raise UserError(
                f"no MLflow server answers at {uri}; start it, or unset MLFLOW_TRACKING_URI"
            ) from None
    elif config.uri is None:
        Path(config.folder).mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _experiment(client: "MlflowClient", config: TrackingConfig) -> str:
    """The experiment's id, made when it isn't there; a folder's artifacts lie beside its database."""
    from mlflow.exceptions import MlflowException

    location = None if config.uri else (Path(config.folder) / "artifacts").as_uri()
    try:
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            # The kind opens the page on runs and curves rather than on traces of language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.create_experiment(config.experiment, artifact_location=location, tags=kind)
    except MlflowException as error:
        experiment = client.get_experiment_by_name(
            config.experiment
        )  # another process may have made it just now
        if experiment is None:
            raise error
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow's experiment {config.experiment} was deleted; restore it or name another one"
        )
    return experiment.experiment_id


def _link(run: Run, parents: dict[str, str]) -> None:
    """Tags that name the parents, and descriptions that lead there and back."""
    from mlflow.exceptions import MlflowException

    this = run._client.get_run(run.id)
    for key, parent_id in parents.items():
        run.tag(f"tcan.{key}_run", parent_id)
        try:
            parent = run._client.get_run(parent_id)
        except MlflowException:  # made elsewhere, such as a dataset copied from another machine
            _describe(run._client, run.id, f"{key}: run {parent_id}, which is not in this store")
            continue
        _describe(run._client, run.id, f"{key}: {_markdown(parent)}")
        _describe(run._client, parent_id, f"used by: {_markdown(this)}")


def _markdown(run: Any) -> str:
    return f"[{run.info.run_name}](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})"


def _describe(client: "MlflowClient", run_id: str, line: str) -> None:
    text = client.get_run(run_id).data.tags.get("mlflow.note.content", "")
    client.set_tag(run_id, "mlflow.note.content", f"{text}\n- {line}".strip())


def _origin() -> dict[str, str]:
    """Who started what, at which commit of this package, wherever that was done."""
    tags = {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": " ".join(sys.argv),
        "mlflow.source.type": "LOCAL",
    }
    here = Path(__file__)
    # An installed copy may lie inside somebody else's repository: ask only the one that tracks this file.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name):
        tags["mlflow.source.git.commit"] = _git(here.parent, "rev-parse", "HEAD")
        tags["tcan.git_dirty"] = str(
            bool(_git(here.parent, "status", "--porcelain", "--untracked-files=no"))
        ).lower()
    return {key: value for key, value in tags.items() if value}


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return flat
