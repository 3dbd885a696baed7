"""Records that wait in spool files after the end of their job, and runs whose job was killed."""

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

from pipelines import storage
from pipelines.config import TrackingConfig
from pipelines.delivery import Delivery
from pipelines.mlflow_store import connect, experiment_id, masked, reason, resolve, resolve_uri, store_errors
from pipelines.spool import SUFFIX, InUse, Record, Spool, read_header
from tcan.errors import UserError

OUT_TAG = "tcan.out"  # folder of the job's results, local or in a bucket
ATTEMPTS = 3  # failed deliveries in a row after which records are left


def spool_path(folder: Path, run_id: str) -> Path:
    return folder / f"tracking-{run_id}{SUFFIX}"


def sync(path: Path, config: TrackingConfig) -> None:
    """Deliver the spool files at a path, or in the folder and the folders below it.

    The store is that of `config` or MLFLOW_TRACKING_URI if one is set, else the one of the job.

    Raises:
        UserError: there are no records, another process delivers them, or the store is not available.
    """
    files = sorted(path.rglob(f"tracking-*{SUFFIX}")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise UserError(
            f"{path}: no undelivered records here; pass the OUT folder of the job, or a .spool file"
        )
    given = resolve(config).uri
    for file in files:
        header = read_header(file)
        stored = TrackingConfig(**header["config"])
        store = resolve(TrackingConfig(**{**vars(stored), "uri": given or stored.uri}))
        _, rejections = _deliver(file, header, store, ATTEMPTS)
        rejected = f"; {len(rejections)} rejected, such as: {rejections[0]}" if rejections else ""
        print(f"{file}: delivered to {masked(resolve_uri(store))}{rejected}", flush=True)


def _deliver(file: Path, header: Record, store: TrackingConfig, failures: int) -> tuple[str, list[str]]:
    """Deliver a spool file; returns the id of its run, and the reasons of rejected records."""
    connect(store)  # reports a store that is not available
    delivery = Delivery(store, header["run_id"])
    spool = Spool(file, header, delivery)
    left = spool.drain(failures)
    error, rejections = spool.error, spool.rejections
    spool.close()
    if left:
        raise UserError(
            f"{file}: {left} records are not delivered ({error}); check the store and rerun the command"
        )
    return delivery.run_id, rejections


def recover(
    folder: str, local: Path, kind: str, name: str, config: TrackingConfig, run_id: str | None
) -> None:
    """Deliver the records of earlier jobs with the same results, and end the runs of those that were killed as KILLED.

    The caller has the lock of the results, so jobs of the same kind and name are not running.

    Args:
        folder: path or URI of the results.
        local: folder of the spool files.
        run_id: run that the caller reopens.

    Raises:
        UserError: the store is not available or does not accept the records of `run_id`, and `config.required` is set.
    """
    from mlflow.exceptions import MlflowException

    with nullcontext() if config.required else suppress(UserError):
        killed = list(_recover_spools(folder, local, config, run_id))
        if not killed and not storage.is_remote(folder):
            return
        client = connect(config)
        with store_errors(config):
            if storage.is_remote(folder):  # the spool may be on another machine
                found = client.search_runs(
                    [experiment_id(client, config)],
                    f"attributes.status = 'RUNNING' and tags.`tcan.kind` = '{kind}' and tags.`{OUT_TAG}` = \"{folder}\"",
                )
                killed += [run.info.run_id for run in found if run.info.run_name == name]
            for killed_id in set(killed) - {run_id}:
                try:
                    if client.get_run(killed_id).info.status == "RUNNING":
                        client.set_terminated(killed_id, "KILLED")
                except MlflowException as error:  # deleted
                    print(f"MLflow run {killed_id}: cannot be ended ({reason(error)})", flush=True)


def _recover_spools(folder: str, local: Path, config: TrackingConfig, run_id: str | None) -> Iterator[str]:
    """Deliver the records of earlier jobs with the same results, and return the ids of their runs."""
    for file in sorted(local.glob(f"tracking-*{SUFFIX}")):
        is_own = run_id is not None and file == spool_path(local, run_id)
        with nullcontext() if is_own else suppress(UserError):
            header = read_header(file)
            if header.get("folder") != folder and not is_own:
                continue
            if masked(resolve_uri(config)) != resolve_uri(TrackingConfig(**header["config"])):
                continue  # of another store: waits for `tcan track sync`
            with suppress(InUse):
                yield _deliver(file, header, config, ATTEMPTS if is_own else 1)[0]
