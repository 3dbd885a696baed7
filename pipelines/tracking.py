"""Recording of configurations, metrics and results in MLflow.

The driver of a job opens the run and logs to it; workers send their metrics to the driver:

    with tracking.run("stage1", "stage 1", config.tracking, dataclasses.asdict(config), OUT, {"dataset": run_id}) as run:
        run.metrics({"loss": 0.1}, step=1)

No call of `Run` waits for MLflow: records go to a spool file in the folder of the job's results (`pipelines.spool`), from
which a thread delivers them (`pipelines.delivery`). If MLflow is not available at the end, the file remains, and
`tcan track sync` delivers it.
"""

import base64
import dataclasses
import getpass
import io
import json
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

from pipelines import storage
from pipelines.config import TrackingConfig
from pipelines.delivery import Delivery, find_run
from pipelines.mlflow_store import (
    DATABASE,
    connect,
    experiment_id,
    masked,
    parent_tags,
    reason,
    resolve,
    resolve_uri,
    store_errors,
)
from pipelines.recovery import ATTEMPTS, OUT_TAG, recover, spool_path
from pipelines.spool import Spool
from pipelines.staging import local_input
from pipelines.system_metrics import SystemMetrics
from tcan.errors import UserError
from tcan.sampling import SamplingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

OUTAGE_SECONDS = 60  # at the end of a job whose spool file is lost with its machine


class Run:
    """An open MLflow run. All methods except `steps` return at once; their records are delivered in order."""

    def __init__(self, config: TrackingConfig, run_id: str, folder: str, local: Path) -> None:
        """folder: of the job's results. local: of the spool file."""
        self.config = config
        self.id = run_id
        self.folder = folder
        local.mkdir(parents=True, exist_ok=True)
        header = {
            "run_id": run_id,
            "folder": folder,
            "config": {**vars(config), "uri": masked(config.uri) if config.uri else None},
        }
        self.spool = Spool(spool_path(local, run_id), header, Delivery(config, run_id))

    def _record(self, kind: str, **fields: Any) -> None:
        self.spool.append({"kind": kind, **fields})

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics; None is step 0."""
        numbers = {key: float(value) for key, value in values.items()}
        self._record("metrics", values=numbers, step=step or 0, time=_now())

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested dicts are flattened to keys such as `train.workers`.

        MLflow parameters are immutable. If a resumed run has another value, the parameter keeps the first value, and the
        tag `tcan.changed_params` records the new one.
        """
        self._record("params", values={key: masked(str(value)) for key, value in _flatten(values).items()})

    def bytes(self, data: bytes, path: str) -> None:
        """Log data as the artifact `path`."""
        self._record("bytes", path=path, data=base64.b64encode(data).decode())

    def image(self, image: np.ndarray | Image.Image, path: str, step: int | None = None) -> None:
        """Log an image (uint8 `[H, W, 3]` or PIL): with `step` in the image series `path`, else as the artifact `path`."""
        from mlflow.tracking.multimedia import compress_image_size

        pil = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if step is None:
            self.bytes(_encoded(pil, Path(path).suffix), path)
            return
        # The names that MLflow's page recognizes as an image series; MlflowClient.log_image would choose a new name per call.
        name = f"images/{path.replace('/', '~')}+step+{step}+timestamp+{_now()}+{uuid.uuid4()}"
        self.bytes(_encoded(pil, ".png"), f"{name}.png")
        self.bytes(_encoded(compress_image_size(pil), ".webp"), f"{name}+compressed.webp")
        self.tag("mlflow.loggedImages", "True")

    def file(self, local: str | Path, folder: str = "") -> None:
        """Log a file, or the contents of a folder, to the artifact folder `folder`. The MLflow page plays mp4 files.

        It may be in a bucket. It must not be deleted before it is delivered; use `bytes` for temporary files.
        """
        self._record("file", local=storage.absolute(local), folder=folder)

    def json(self, values: Mapping[str, Any], path: str) -> None:
        """Log values as the JSON artifact `path`."""
        self.bytes(json.dumps(values, indent=2).encode(), path)

    def model(self, local: str | Path, name: str, alias: str, sampling: SamplingConfig) -> None:
        """Log a model folder as the artifact `model` (for `mlflow.pyfunc`) and register it as a new version of `name`.

        Args:
            local: path, or URI of a folder in a bucket.
            alias: alias of the new version; moved from an older version that has it.
            sampling: defaults of the params of `predict`: every `SamplingConfig` field whose default is not None.
                `predict` also accepts `seed` (default 0) and `retarget` (default robust).
        """
        defaults = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(SamplingConfig)}
        self._record("model", local=storage.absolute(local), name=name, alias=alias, sampling=defaults)

    def link(self, key: str, parent: str) -> None:
        """Record the run of an input as the tag `tcan.<key>_run`, and link the descriptions of both runs."""
        self._record("link", key=key, parent=parent)

    def tag(self, key: str, value: str) -> None:
        self._record("tag", key=key, value=value)

    def end(self, status: str) -> None:
        """Set the final status: FINISHED, FAILED or KILLED."""
        self._record("end", status=status, time=_now())

    def steps(self, key: str) -> set[int]:
        """The steps at which the metric was delivered; none if MLflow is not available."""
        from mlflow.exceptions import MlflowException

        try:
            history = connect(self.config).get_metric_history(self.id, key)
        except (MlflowException, UserError):
            return set()
        return {metric.step for metric in history}


def check(config: TrackingConfig) -> None:
    """Check that the store can be used, before a job starts anything.

    Raises:
        UserError: it cannot, and `config.required` is set.
    """
    if config.required:
        experiment_id(connect(config), resolve(config))


@contextmanager
def run(
    kind: str,
    name: str,
    config: TrackingConfig,
    params: Mapping[str, Any],
    folder: str | Path,
    parents: Mapping[str, str | None] | None = None,
    run_id: str | None = None,
) -> Iterator[Run]:
    """Open a run, with system metrics, for the duration of the block.

    Its final status is FINISHED, FAILED after an exception, or KILLED after an interrupt.

    Args:
        kind: job: "preprocess", "stage1", "stage2", "evaluate", "animate" or "study".
        name: display name.
        params: complete resolved configuration, also logged as the artifact `config.yaml`.
        folder: folder of the job's results, for the spool file; for a bucket, the file is in the local temporary folder. An
            earlier run of the same kind and name whose job was killed is ended.
        parents: runs of the inputs, as {"dataset" | "stage1" | "model": run id or None}.
        run_id: run to reopen; None creates one. If it no longer exists, a new one is created.

    Raises:
        UserError: the store cannot be used, and `config.required` is set.
    """
    config = resolve(config)
    folder = storage.absolute(folder)
    local = Path(tempfile.gettempdir()) if storage.is_remote(folder) else Path(folder)
    recover(folder, local, kind, name, config, run_id)
    tags = {"tcan.kind": kind, OUT_TAG: masked(folder), **parent_tags(), **_origin()}
    opened, local_id = _open(config, name, tags, run_id)
    is_new = opened != run_id
    run = Run(config, opened, folder, local)
    if local_id:
        run._record("create", name=name, tags=tags, time=_now(), local_id=local_id)
    if is_new:
        for key, parent in (parents or {}).items():
            if parent:
                run.link(key, parent)
    run.params(params)
    run.bytes(masked(yaml.safe_dump(dict(params), sort_keys=False)).encode(), "config.yaml")
    if config.required and run.spool.drain(failures=1):
        _abandon(run)
        raise UserError(
            f"MLflow store {masked(resolve_uri(config))}: does not accept this run ({run.spool.error}); check the store "
            "and the access to its artifacts"
        )
    first_step = 0 if is_new else max(run.steps("system/cpu_utilization_percentage"), default=-1) + 1
    monitor = SystemMetrics(run.metrics, first_step)
    status = "KILLED"
    try:
        monitor.start()
        yield run
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        monitor.finish()
        run.end(status)
        _close(run, ATTEMPTS if status != "KILLED" else 1)


def _open(
    config: TrackingConfig, name: str, tags: dict[str, str], run_id: str | None
) -> tuple[str, str | None]:
    """Create or reopen a run; returns its id, and the same id again if the run must be created later."""
    try:
        client = connect(config)
        experiment = experiment_id(client, config)
        if run_id and (reopened := _reopen(client, config, experiment, run_id)):
            return reopened, None
        with store_errors(config):
            return client.create_run(experiment, run_name=name, tags=tags).info.run_id, None
    except UserError as error:
        if config.required:
            raise
        print(f"tracking: {error}; the job runs, and its records wait", flush=True)
        return (run_id, None) if run_id else (local := uuid.uuid4().hex, local)


def _reopen(client: "MlflowClient", config: TrackingConfig, experiment: str, run_id: str) -> str | None:
    """Reopen a run, which is restored if it was deleted; None if it no longer exists."""
    from mlflow.exceptions import MlflowException

    with store_errors(config):
        try:
            found = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            created_later = find_run(client, experiment, run_id)
            if created_later is None:
                where = masked(resolve_uri(config))
                print(f"MLflow run {run_id}: not in {where}; a new run records from here on", flush=True)
                return None
            found = client.get_run(created_later)
        if found.info.lifecycle_stage == "deleted":
            print(
                f"MLflow run {found.info.run_id}: was deleted; it is restored, because its job resumes",
                flush=True,
            )
            client.restore_run(found.info.run_id)
        client.update_run(found.info.run_id, status="RUNNING")
    return found.info.run_id


def _abandon(run: Run) -> None:
    """End a run whose job does not start."""
    with suppress(Exception):  # the store has just refused another request
        connect(run.config).set_terminated(run.id, "FAILED")
    run.spool.close()
    run.spool.path.unlink(missing_ok=True)


def _close(run: Run, failures: int) -> None:
    """Deliver the remaining records; what cannot be delivered stays in the spool file, and a line says so.

    If the results are in a bucket, the machine may be a container whose files disappear with the job. Then the job waits for
    MLflow to come back, unless it was interrupted.
    """
    left = run.spool.drain(failures)
    uri, path = masked(resolve_uri(run.config)), run.spool.path
    if left and storage.is_remote(run.folder) and failures > 1:
        error = masked(run.spool.error or "busy")
        print(f"tracking: waiting up to {OUTAGE_SECONDS} s for {uri} ({error})", flush=True)
        left = run.spool.drain(1, OUTAGE_SECONDS)
    if left:
        print(
            f"tracking: {left} records are not delivered to {uri} ({masked(run.spool.error or 'interrupted')}); they wait in "
            f"{path}; deliver them with: tcan track sync {path}",
            flush=True,
        )
    if rejections := run.spool.rejections:
        print(f"tracking: {uri} rejected {len(rejections)} records, such as: {rejections[0]}", flush=True)
    run.spool.close()


def _now() -> int:
    return int(time.time() * 1000)


def _encoded(image: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[suffix.lower()])
    return buffer.getvalue()


def local_model(model: str, config: TrackingConfig) -> Path:
    """Resolve a reference to a model folder; downloads remote MLflow artifacts.

    Args:
        model: a local folder or its URI in a bucket, models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or the id
            of the training run.

    Raises:
        UserError: MLflow or the bucket does not have the model.
    """
    if run := re.fullmatch(r"runs:/([0-9a-f]{32})/model/?", model):
        model = run[1]
    is_run_id = re.fullmatch(r"[0-9a-f]{32}", model) and not Path(model).exists()
    if not is_run_id and not model.startswith("models:/"):
        return local_input(model)
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
    client = connect(config)
    try:
        if is_run_id:
            source = f"{client.get_run(model).info.artifact_uri}/model"
        else:
            source = client.get_model_version_download_uri(*get_model_name_and_version(client, model))
        folder = Path(mlflow.artifacts.download_artifacts(source, tracking_uri=resolve_uri(config)))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"{model}: not found in {masked(resolve_uri(config))} ({reason(error)}); pass a model folder, a training run or a "
            "registered model, and set --tracking.folder or MLFLOW_TRACKING_URI to its store"
        ) from None
    return next((file.parent for file in folder.glob("data/*/tcan.json")), folder)


def _origin() -> dict[str, str]:
    """Return tags with the user, the command line and the commit of this package."""
    tags = {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": masked(" ".join(sys.argv)),
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
