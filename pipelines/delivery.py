"""Deliver the records of a spool to an MLflow run. Delivering a record twice has the same effect as delivering it once:

metrics have the time of their record, and MLflow stores equal metrics once; artifacts have fixed names; tags, parameters and
the final status are set; models and runs are looked up before they are created.
"""

import base64
import re
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import storage
from pipelines.config import TrackingConfig
from pipelines.mlflow_model import save_model
from pipelines.mlflow_store import connect, experiment_id, reason
from pipelines.spool import Record, Rejected
from pipelines.staging import local_input

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCAL_ID = "tcan.local_id"  # tag of a run that was begun while the store was not reachable
_MAX_PER_BATCH = 100  # parameters per MLflow call
_MAX_VALUE = 6000  # characters of a parameter or tag that MLflow stores
_INVALID = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class Delivery:
    """Delivers records to one run; called from a single thread."""

    def __init__(self, config: TrackingConfig, run_id: str) -> None:
        self._config, self.run_id = config, run_id

    @cached_property
    def _client(self) -> "MlflowClient":
        return connect(self._config)

    def __call__(self, records: Sequence[Record]) -> int:
        """Deliver the first record, or all metrics up to the next other record; returns the number of records.

        Raises:
            Rejected: MLflow will never accept the first record, e.g. because the run was deleted.
        """
        from mlflow.exceptions import MlflowException

        count = 1
        if records[0]["kind"] == "metrics":
            others = (i for i, record in enumerate(records) if record["kind"] != "metrics")
            count = next(others, len(records))
        try:
            self._deliver(records[:count])
        except MlflowException as error:
            if error.error_code not in _INVALID:
                raise
            if count > 1:
                return self(records[:1])
            raise Rejected(reason(error)) from error
        return count

    def _deliver(self, records: Sequence[Record]) -> None:
        if records[0]["kind"] == "metrics":
            self._metrics(records)
        else:
            arguments = dict(records[0])
            getattr(self, f"_{arguments.pop('kind')}")(**arguments)

    def _metrics(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, record["time"], record["step"])
            for record in records
            for key, value in record["values"].items()
        ]
        for start in range(0, len(metrics), 1000):  # MLflow's limit
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000], synchronous=True)

    def _create(self, name: str, tags: dict[str, str], time: int, local_id: str) -> None:
        """Create the run that was begun without a connection."""
        experiment = experiment_id(self._client, self._config)
        found = find_run(self._client, experiment, local_id)
        if found is None:
            tags = tags | {LOCAL_ID: local_id}
            found = self._client.create_run(experiment, start_time=time, run_name=name, tags=tags).info.run_id
        self.run_id = found

    def _params(self, values: dict[str, str]) -> None:
        from mlflow.entities import Param

        flat = {key: value[:_MAX_VALUE] for key, value in values.items()}
        known = self._client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), _MAX_PER_BATCH):
            self._client.log_batch(self.run_id, params=new[start : start + _MAX_PER_BATCH], synchronous=True)
        changed = {key: value for key, value in flat.items() if known.get(key, value) != value}
        if changed:
            self._tag("tcan.changed_params", ", ".join(f"{key}={value}" for key, value in changed.items()))

    def _tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.run_id, key, value[:_MAX_VALUE])

    def _bytes(self, path: str, data: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / Path(path).name
            local.write_bytes(base64.b64decode(data))
            self._client.log_artifact(
                self.run_id, str(local), str(Path(path).parent) if "/" in path else None
            )

    def _file(self, local: str, folder: str) -> None:
        path = _existing(local)
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log(self.run_id, str(path), folder or None)

    def _model(self, local: str, name: str, alias: str, sampling: dict[str, Any]) -> None:
        from mlflow.exceptions import MlflowException

        path = _existing(local)
        found = self._client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'")
        if not found:
            with tempfile.TemporaryDirectory() as folder:
                save_model(path, Path(folder) / "model", sampling)
                self._client.log_artifacts(self.run_id, f"{folder}/model", "model")
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"{self._client.get_run(self.run_id).info.artifact_uri}/model"
            found = [self._client.create_model_version(name, source, self.run_id)]
        self._client.set_registered_model_alias(name, re.sub(r"\W", "-", alias), found[0].version)

    def _link(self, key: str, parent: str) -> None:
        """Tag the run with its parent, and link both in their descriptions.

        The parent may have been deleted, or be in another store, e.g. for a dataset copied from another machine.
        """
        from mlflow.exceptions import MlflowException

        self._tag(f"tcan.{key}_run", parent)
        this = self._client.get_run(self.run_id)
        try:
            found = self._client.get_run(parent)
            self._describe(parent, f"used by: {_markdown(this)}")
        except MlflowException as error:
            if error.error_code not in (*_INVALID, "RESOURCE_DOES_NOT_EXIST"):
                raise
            self._describe(self.run_id, f"{key}: run {parent} (deleted, or not in this store)")
        else:
            self._describe(self.run_id, f"{key}: {_markdown(found)}")

    def _describe(self, run_id: str, line: str) -> None:
        text = self._client.get_run(run_id).data.tags.get("mlflow.note.content", "")
        if f"- {line}" not in text.splitlines():
            self._client.set_tag(run_id, "mlflow.note.content", f"{text}\n- {line}".strip())

    def _end(self, status: str, time: int) -> None:
        self._client.set_terminated(self.run_id, status, time)


def _existing(name: str) -> Path:
    """Local path of a file or folder of the job's results; downloads it from a bucket.

    Raises:
        Rejected: it was deleted.
    """
    if not storage.exists(name):
        raise Rejected(f"{name} was deleted")
    return local_input(name)


def find_run(client: "MlflowClient", experiment: str, local_id: str) -> str | None:
    """Id of the run that was begun without a connection under a local id."""
    found = client.search_runs([experiment], f"tags.`{LOCAL_ID}` = '{local_id}'", max_results=1)
    return found[0].info.run_id if found else None


def _markdown(run: Any) -> str:
    return f"[{run.info.run_name}](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})"
