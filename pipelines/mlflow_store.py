"""Connection to an MLflow store. Everything that can be wrong with a store is a `UserError` here, without credentials."""

import dataclasses
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipelines.config import TrackingConfig
from tcan.errors import UserError, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
SERVERS, DATABASES = ("http", "https"), ("sqlite", "postgresql", "mysql", "mssql")
# MLflow's defaults retry a request for minutes. Ours are retried by the spool, which no job waits for.
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
# By default, clients transfer artifacts directly from and to the S3 server of an MLflow server, which they may not reach.
PROXIED = {"MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false", "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false"}
PROBE_SECONDS = 10
ADVICE = {
    401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    403: "check the permissions of this user on the server",
    404: "check the address and its path",
}

_parent: ContextVar[str | None] = ContextVar("parent", default=None)


@contextmanager
def nested(parent: str) -> Iterator[None]:
    """Make the runs that are created in this context nested runs of the run `parent`."""
    token = _parent.set(parent)
    try:
        yield
    finally:
        _parent.reset(token)


def parent_tags() -> dict[str, str]:
    """Tags of a new run: its parent, if it is nested."""
    parent = _parent.get()
    return {"mlflow.parentRunId": parent} if parent else {}


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


def masked(text: str) -> str:
    """The text without the credentials of URIs: `https://user:password@host` becomes `https://***@host`."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def reason(error: BaseException) -> str:
    """The first line of an error without credentials, at most 200 characters; of a request, its cause."""
    line = masked(first_line(error))
    cause = re.search(r"Caused by \w+\((.+?)\)+$", line)
    return (cause[1] if cause else line)[:200].rstrip(".")


@contextmanager
def store_errors(config: TrackingConfig) -> Iterator[None]:
    """Convert errors of an unusable store to UserError."""
    import requests
    from alembic.util import CommandError  # another version of MLflow's tables
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (
        MlflowException,
        SQLAlchemyError,
        CommandError,
        requests.RequestException,
        ImportError,
        OSError,
    ) as error:
        uri = masked(resolve_uri(config))
        status = re.search(r"error code (\d{3})|^(\d{3}) ", str(error))
        advice = ADVICE.get(int(status[1] or status[2])) if status else None
        if isinstance(error, ImportError):
            advice = (
                "install the driver of this database, or name an installed one, e.g. postgresql+psycopg2://"
            )
        elif advice is None and uri.startswith("http"):
            advice = "check the log of the server"
        elif advice is None:
            advice = "check this store, or set another one with --tracking.folder or --tracking.uri"
        raise UserError(f"MLflow store {uri}: cannot be used ({reason(error)}); {advice}") from None


def connect(config: TrackingConfig) -> "MlflowClient":
    """Open the store; a local one is created if needed.

    Raises:
        UserError: the store cannot be used.
    """
    uri = resolve_uri(config)
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in SERVERS + DATABASES or "://" not in uri:
        raise UserError(
            f"tracking.uri = {masked(uri)}: not an MLflow server or database; set e.g. http://HOST:5000 or "
            "sqlite:////FOLDER/mlflow.db"
        )
    for name, value in (LIMITS | PROXIED).items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # many lines about store migrations and the start of the monitor
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line per retry
    if scheme in SERVERS:
        _probe(uri)
    is_local = config.uri is None and scheme == "sqlite"
    with store_errors(config), _one_at_a_time(resolve(config).folder) if is_local else nullcontext():
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def _one_at_a_time(folder: str) -> Iterator[None]:
    """Create the folder of a store and lock it: MLflow fails if two processes create the tables at the same time."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(f"{folder}/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _probe(uri: str) -> None:
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=PROBE_SECONDS)
    except requests.RequestException:
        raise UserError(
            f"{masked(uri)}: no MLflow server responds; start it, or unset MLFLOW_TRACKING_URI"
        ) from None


def experiment_id(client: "MlflowClient", config: TrackingConfig) -> str:
    """Return the id of the experiment; create it if needed. A local store has its artifacts in the same folder.

    Raises:
        UserError: the experiment was deleted, or the store cannot be written.
    """
    from mlflow.exceptions import MlflowException

    location = None if config.uri else (Path(config.folder) / "artifacts").as_uri()
    with store_errors(config):
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
