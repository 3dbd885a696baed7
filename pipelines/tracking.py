"""Recording of configurations, metrics and results in MLflow. Only this module and `pipelines.ui` use MLflow stores.

The driver of a job opens the run; a worker logs to the same run by its id:

    with tracking.run("train", "stage 1", config.tracking, dataclasses.asdict(config), {"dataset": run_id}) as run:
        run.metrics({"loss": 0.1}, step=1)
        ...  # in a worker: tracking.attach(run.config, run.id).metrics({"loss": 0.09}, step=2)
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
from tcan.errors import UserError, first_line
from tcan.sampling import SamplingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

SYSTEM_METRICS_SECONDS = 5  # gives a curve for a run of one minute at negligible cost for a run of days
DATABASE = "mlflow.db"
_MAX_PER_BATCH = 100  # parameters per MLflow call
_MAX_VALUE = 6000  # characters of a parameter that MLflow stores


def resolve(config: TrackingConfig) -> TrackingConfig:
    """Return a configuration of the same store that is valid in any working directory and environment.

    Precedence: `config.uri`, MLFLOW_TRACKING_URI, `config.folder` (made absolute).
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    return dataclasses.replace(config, uri=uri, folder=str(Path(config.folder).absolute()))


def resolve_uri(config: TrackingConfig) -> str:
    """Return the MLflow tracking URI: that of the server if one is set, else the SQLite store in the tracking folder."""
    config = resolve(config)
    return config.uri or f"sqlite:///{config.folder}/{DATABASE}"


class Run:
    """An open MLflow run. `config` is the resolved tracking configuration, for `attach` in a worker."""

    def __init__(self, client: "MlflowClient", config: TrackingConfig, run_id: str) -> None:
        self._client = client
        self.config = config
        self.id = run_id

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics synchronously; None is step 0."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step or 0) for key, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics, synchronous=True)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested dicts are flattened to keys such as `train.workers`.

        MLflow parameters are immutable. If a resumed run has another value, the parameter keeps the first value, and the
        tag `tcan.changed_params` records the new one.
        """
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
        """Log an image (uint8 `[H, W, 3]` or PIL): with `step` in the image series `path`, else as the artifact `path`."""
        if step is None:
            self._client.log_image(self.id, image, artifact_file=path)
        else:
            self._client.log_image(self.id, image, key=path, step=step, synchronous=True)

    def file(self, local: str | Path, folder: str = "") -> None:
        """Log a file to the artifact folder `folder`. The MLflow page plays mp4 files."""
        self._client.log_artifact(self.id, str(local), folder or None)

    def json(self, values: Mapping[str, Any], path: str) -> None:
        """Log values as the JSON artifact `path`."""
        self._client.log_dict(self.id, dict(values), path)

    def folder(self, local: str | Path, folder: str = "") -> None:
        """Log the contents of a folder to the artifact folder `folder`."""
        self._client.log_artifacts(self.id, str(local), folder or None)

    def model(self, local: str | Path, name: str, alias: str, sampling: SamplingConfig) -> None:
        """Log a model folder as the artifact `model` (for `mlflow.pyfunc`) and register it as a new version of `name`.

        Args:
            alias: alias of the new version; moved from an older version that has it.
            sampling: defaults of the params of `predict`: every `SamplingConfig` field whose default is not None.
                `predict` also accepts `seed` (default 0) and `retarget` (default robust).
        """
        import mlflow.pyfunc
        from mlflow.exceptions import MlflowException
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

        inputs = Schema([ColSpec("string", name) for name in ("image", "driving")])
        types = {bool: "boolean", int: "long", float: "double"}
        # MLflow passes only declared params to `predict`, and a declared param needs a default of its type.
        declared = [
            ParamSpec(item.name, types[item.type], item.type(getattr(sampling, item.name)))
            for item in dataclasses.fields(SamplingConfig)
            if isinstance(item.type, type) and item.default is not None
        ]
        params = ParamSchema(
            [*declared, ParamSpec("seed", "long", 0), ParamSpec("retarget", "string", "robust")]
        )
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "model"
            mlflow.pyfunc.save_model(
                str(saved),
                loader_module="pipelines.mlflow_model",
                data_path=str(local),
                signature=ModelSignature(inputs, params=params),
                # Complete; otherwise MLflow looks for pip in this environment and warns that it is missing.
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
        created = self._client.create_model_version(name, source, self.id)
        self._client.set_registered_model_alias(name, re.sub(r"\W", "-", alias), created.version)

    def last_step(self, key: str) -> int:
        """Return the last step at which the metric was logged; 0 if it was not logged."""
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
    """Open a run, with system metrics, for the duration of the block.

    Its final status is FINISHED, FAILED after an exception, or KILLED after an interrupt.

    Args:
        kind: job: "preprocess", "stage1", "stage2", "evaluate" or "animate".
        name: display name.
        params: complete resolved configuration, also logged as the artifact `config.yaml`.
        parents: runs of the inputs, as {"dataset" | "stage1" | "model": run id or None}. Each becomes the tag
            `tcan.<key>_run`, and the descriptions of both runs link to each other.
        run_id: run to reopen; None creates one.

    Raises:
        UserError: the store is not reachable or does not have the run.
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
    """Open the run of another process for logging; that process ends the run.

    Raises:
        UserError: the store is not reachable or does not have the run.
    """
    from mlflow.exceptions import MlflowException

    config = resolve(config)
    client = _client(config)
    try:
        client.get_run(run_id)
    except MlflowException:
        raise UserError(
            f"MLflow run {run_id}: not found in {resolve_uri(config)}; set --tracking.folder or MLFLOW_TRACKING_URI to "
            "the store of the run, or use a new output folder"
        ) from None
    return Run(client, config, run_id)


def local_model(model: str, config: TrackingConfig) -> Path:
    """Resolve a reference to a model folder; downloads remote MLflow artifacts.

    Args:
        model: a folder, models:/NAME@ALIAS, models:/NAME/VERSION, or the id of the training run.

    Raises:
        UserError: MLflow does not have the model.
    """
    is_run_id = re.fullmatch(r"[0-9a-f]{32}", model) and not Path(model).exists()
    if not is_run_id and not model.startswith("models:/"):
        return Path(model)
    if not is_run_id and not re.fullmatch(r"models:/[^/@]+[/@][^/@]+", model):
        raise UserError(f"{model}: no version; use models:/NAME@ALIAS or models:/NAME/VERSION")

    import mlflow.artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    config = resolve(config)
    # A lookup must not create a store.
    if not config.uri and not (Path(config.folder) / DATABASE).exists():
        raise UserError(
            f"{model}: no MLflow store in {config.folder}; set --tracking.folder or MLFLOW_TRACKING_URI to the store"
        )
    client = _client(config)
    try:
        if is_run_id:
            source = f"{client.get_run(model).info.artifact_uri}/model"
        else:
            source = client.get_model_version_download_uri(*get_model_name_and_version(client, model))
        folder = Path(mlflow.artifacts.download_artifacts(source, tracking_uri=resolve_uri(config)))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"{model}: not found in {resolve_uri(config)} ({first_line(error)}); pass a model folder, a training run or a "
            "registered model, and set --tracking.folder or MLFLOW_TRACKING_URI to its store"
        ) from None
    return next((file.parent for file in folder.glob("data/*/tcan.json")), folder)


def _client(config: TrackingConfig) -> "MlflowClient":
    import requests
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # many lines about store migrations and the start of the monitor
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = resolve_uri(config)
    if uri.startswith("http"):  # MLflow itself retries for minutes
        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=10)
        except requests.RequestException:
            raise UserError(
                f"{uri}: no MLflow server responds; start it, or unset MLFLOW_TRACKING_URI"
            ) from None
    elif config.uri is None:
        Path(config.folder).mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _experiment(client: "MlflowClient", config: TrackingConfig) -> str:
    """Return the id of the experiment; create it if needed. A local store has its artifacts in the same folder."""
    from mlflow.exceptions import MlflowException

    location = None if config.uri else (Path(config.folder) / "artifacts").as_uri()
    try:
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            # This kind makes the page open with runs and curves instead of traces of language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.create_experiment(config.experiment, artifact_location=location, tags=kind)
    except MlflowException as error:
        # Another process may have created it in the meantime.
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            raise error
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow experiment {config.experiment}: deleted; restore it or set another tracking.experiment"
        )
    return experiment.experiment_id


def _link(run: Run, parents: dict[str, str]) -> None:
    """Tag the run with its parents, and link both in their descriptions."""
    from mlflow.exceptions import MlflowException

    this = run._client.get_run(run.id)
    for key, parent_id in parents.items():
        run.tag(f"tcan.{key}_run", parent_id)
        try:
            parent = run._client.get_run(parent_id)
        except MlflowException:  # recorded in another store, e.g. for a dataset copied from another machine
            _describe(run._client, run.id, f"{key}: run {parent_id} (not in this store)")
            continue
        _describe(run._client, run.id, f"{key}: {_markdown(parent)}")
        _describe(run._client, parent_id, f"used by: {_markdown(this)}")


def _markdown(run: Any) -> str:
    return f"[{run.info.run_name}](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})"


def _describe(client: "MlflowClient", run_id: str, line: str) -> None:
    text = client.get_run(run_id).data.tags.get("mlflow.note.content", "")
    client.set_tag(run_id, "mlflow.note.content", f"{text}\n- {line}".strip())


def _origin() -> dict[str, str]:
    """Return tags with the user, the command line and the commit of this package."""
    tags = {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": " ".join(sys.argv),
        "mlflow.source.type": "LOCAL",
    }
    here = Path(__file__)
    # An installed copy may be inside an unrelated repository; use only a repository that tracks this file.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name):
        tags["mlflow.source.git.commit"] = _git(here.parent, "rev-parse", "HEAD")
        tags["tcan.git_dirty"] = str(
            bool(_git(here.parent, "status", "--porcelain", "--untracked-files=no"))
        ).lower()
    return {key: value for key, value in tags.items() if value}


def _git(folder: Path, *arguments: str) -> str:
    try:
        process = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return flat
