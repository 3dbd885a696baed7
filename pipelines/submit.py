"""`tcan COMMAND ... --submit http://HEAD:8265`: run the command as a job of a Ray cluster, with Ray's job client.

Code: both packages and the YAML files of `--config` are copied to the cluster as the working directory of the job.

Packages: with `--environment requirements.lock`, Ray's runtime environment installs the file with uv, with hash checks, on
every node that runs a part of the job. It installs into a virtual environment of the job, based on the `python` of the
cluster (a copy, if that `python` is itself in a virtual environment). By default, Ray allows 10 minutes per node. Without
the option, the `python` of the cluster must have the packages.

Not copied: Python and Ray, whose versions must match those of the cluster; videos, datasets, models and MLflow stores,
whose paths are made absolute and must be valid on the cluster.
"""

import asyncio
import importlib.util
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from tcan.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PACKAGES = ("tcan", "pipelines")
# Local environment variables that affect the result of a job. Credentials are never copied.
VARIABLES = ("MLFLOW_TRACKING_URI", "HF_HUB_OFFLINE")

REQUIREMENTS = "requirements.txt"  # in the working directory of the job

PROBE_SECONDS = 5
START_SECONDS = 60  # for a new cluster to accept jobs
RETRY_SECONDS = 1
LOG_SECONDS = 30  # after which a connection to the log is replaced, because lost machines do not close theirs
LOST_SECONDS = 600  # without a response of the cluster, after which the log is no longer followed


def submit(
    address: str,
    argv: Sequence[str],
    environment: str | None = None,
    job_id: str | None = None,
    device: str | None = None,
) -> int:
    """Run `tcan ARGV...` as a job, print its log, and return its exit status.

    On Ctrl-C, a prompt offers to stop the job (exit status 130) or to leave it running (exit status 0).

    Args:
        address: dashboard of the cluster, e.g. http://head:8265.
        argv: command line without `--submit`, with absolute paths or URIs (see `absolute_paths`).
        environment: requirements file for uv, e.g. from `make lock`. Relative paths in it are not valid on the cluster.
        job_id: id of the job; None: Ray chooses one. A job that already has this id is followed instead, so that a submitter
            may retry.
        device: `animate.device` of a command whose networks run in its own process, on a node with this device; None: on the
            head node.

    Raises:
        UserError: the requirements file does not exist; no Ray cluster responds at the address, it runs another version of Ray,
            or it rejects the job.
    """
    if environment is not None and not Path(environment).is_file():
        raise UserError(
            f"--environment {environment}: no such file; pass a requirements file, e.g. requirements.lock"
        )
    if job_id is not None and not re.fullmatch(r"[\w.-]+", job_id):
        raise UserError(f"--job_id {job_id}: letters, digits, dots, - and _ only; set e.g. train-1")
    client = _connect(address)
    _check_version(client, address)
    if job_id is not None and (status := _status(client, job_id)):
        print(f"job {job_id} on {address}: already submitted, {status.lower()}; this is its log", flush=True)
        return _follow_until_interrupted(client, address, job_id)
    with tempfile.TemporaryDirectory() as folder:
        argv = _pack(Path(folder), argv)
        runtime = {
            "working_dir": folder,
            "env_vars": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        }
        if environment is not None:
            shutil.copy(environment, Path(folder) / REQUIREMENTS)
            runtime["uv"] = _uv()
        job = _start(client, address, argv, runtime, job_id, _resources(address, device))
    print(f"job {job} on {address}", flush=True)
    return _follow_until_interrupted(client, address, job)


def manage_jobs(action: Literal["list", "follow", "stop"], address: str, job_id: str | None) -> int:
    """List the jobs of a cluster, or follow or stop one of them; returns the exit status.

    Raises:
        UserError: no cluster responds at the address, or it has no such job.
    """
    if (action == "list") != (job_id is None):
        needs = "omit it" if action == "list" else "pass the id of a job, see tcan jobs list"
        raise UserError(f"--job_id: {'not used' if job_id else 'missing'} with {action}; {needs}")
    client = _connect(address)
    if job_id is None:
        for job in sorted(client.list_jobs(), key=lambda job: job.start_time or 0):
            if job.submission_id:  # not the driver of another program
                began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
                command = job.entrypoint.removeprefix("python -m pipelines.cli ")
                print(job.submission_id, job.status.value.lower(), began, command, sep="\t")
        return 0
    if _status(client, job_id) is None:
        raise UserError(
            f"--job_id {job_id}: no such job on {address}; see tcan jobs list --address {address}"
        )
    if action == "follow":
        return _follow_until_interrupted(client, address, job_id)
    _stop(client, job_id)
    return 0


def _status(client: "JobSubmissionClient", job: str) -> str | None:
    """Status of a job; None if there is no such job."""
    try:
        return client.get_job_status(job).value
    except RuntimeError as error:
        if "does not exist" in str(error):
            return None
        raise


def _follow_until_interrupted(client: "JobSubmissionClient", address: str, job: str) -> int:
    try:
        return _follow(client, address, job)
    except KeyboardInterrupt:
        return _stop_or_leave(client, address, job)


def absolute_paths(
    argv: Sequence[str], options: Collection[str], flags: Collection[str], lists: Collection[str] = ()
) -> list[str]:
    """Make the relative paths of a command line absolute; URIs, MLflow run ids and `--model mini` do not change.

    Args:
        argv: command, then its arguments. All positional arguments are paths.
        options: options whose values are paths, e.g. `--out`.
        flags: options without a value.
        lists: options with several values, up to the next option.
    """
    command, *arguments = argv
    result, option = [command], ""
    for token in arguments:
        name, equals, value = token.partition("=")
        if token.startswith("--"):
            result.append(f"{name}={_absolute(value, name)}" if equals and name in options else token)
            option = "" if equals or name in flags else name
        else:
            result.append(_absolute(token, option) if option in options or not option else token)
            option = option if option in lists else ""
    return result


def _absolute(path: str, option: str) -> str:
    """Make a path absolute; return URIs, MLflow run ids and the name of the model in this package as they are."""
    is_mini = option == "--model" and path == "mini"
    if is_mini or ":/" in path or re.fullmatch(r"[0-9a-f]{32}", path):
        return path
    return os.path.abspath(os.path.expanduser(path))


def _connect(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    # The terminal shows only the log of the job.
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if (
            url := urlsplit(address)
        ).hostname:  # Ray itself waits for minutes if there is no machine at this address
            port = url.port or {"http": 80, "https": 443}.get(url.scheme, 10001)
            socket.create_connection((url.hostname, port), PROBE_SECONDS).close()
        return JobSubmissionClient(address)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--submit {address}: no Ray cluster responds ({reason}); pass the address of its dashboard, e.g. "
            "http://head:8265, and set RAY_AUTH_MODE=token if it requires a token"
        ) from None


def _check_version(client: "JobSubmissionClient", address: str) -> None:
    """Raise UserError if the cluster runs another version of Ray than this environment.

    The job runs with the Python and the Ray of the cluster, for which this code is not tested.
    """
    import ray

    version = client._do_request("GET", "/api/version").json()["ray_version"]
    if version != ray.__version__:
        raise UserError(
            f"--submit {address}: the cluster runs Ray {version}, this environment has {ray.__version__}; use an image with "
            "the versions of requirements.lock"
        )


def _pack(folder: Path, argv: Sequence[str]) -> list[str]:
    """Copy code and configuration files into the folder; return the command line with the names of the copies."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        shutil.copytree(
            Path(spec.origin).parent, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    packed = list(argv)
    for i, token in enumerate(argv):
        name, equals, value = token.partition("=")
        if name != "--config":
            continue
        file = Path(value if equals else argv[i + 1])
        if file.is_file():
            shutil.copy(file, folder / f"config-{i}.yaml")
            packed[i if equals else i + 1] = ("--config=" if equals else "") + f"config-{i}.yaml"
    return packed


def _uv() -> dict[str, Any]:
    """Return the `uv` field of Ray's runtime environment.

    It refers to the requirements file in the working directory instead of listing its lines. Ray passes the field to the
    job in an environment variable, whose length limit a lock file with hashes exceeds.

    The options are empty because Ray's default, `--no-cache`, downloads all packages again after every code change: each
    new working directory gets a new environment.
    """
    return {
        "packages": [f"-r ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{REQUIREMENTS}"],
        "uv_pip_install_options": [],
    }


def _resources(address: str, device: str | None) -> dict[str, int]:
    """Resources that the process of the command reserves.

    "auto" is a GPU if a node of the cluster has one. A GPU that is asked for may also be on a node that the cluster has yet
    to add.
    """
    if device is None:
        return {}
    if device == "auto":
        from ray.util.state import list_nodes

        # Ray's own filter of states raises an error if the cluster has lost a node.
        nodes = [node for node in list_nodes(address=address, limit=10_000) if node.state == "ALIVE"]
        device = "cuda" if any(node.resources_total.get("GPU") for node in nodes) else "cpu"
    return {"entrypoint_num_cpus": 1, "entrypoint_num_gpus": int(device != "cpu")}


def _start(
    client: "JobSubmissionClient",
    address: str,
    argv: Sequence[str],
    runtime: dict[str, Any],
    job_id: str | None,
    resources: dict[str, int],
) -> str:
    """Submit the job and return its id. Retries for `START_SECONDS`, because a new cluster rejects jobs at first."""
    began = time.monotonic()
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(["python", "-m", "pipelines.cli", *argv]),
                runtime_env=runtime,
                submission_id=job_id,
                **resources,
            )
        except RuntimeError as error:
            if job_id is not None and "already exists" in str(error):  # another submitter was faster
                return job_id
            if time.monotonic() - began > START_SECONDS:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"--submit {address}: the cluster rejected the job ({reason}); check its state with ray status"
                ) from None
            time.sleep(1)


def _follow(client: "JobSubmissionClient", address: str, job: str) -> int:
    """Print the log of the job until it ends; return its exit status."""
    info = asyncio.run(_print_log(client, address, job))
    status = info.driver_exit_code
    if status is None:  # the job did not start, was stopped, or its node was lost
        print(f"tcan: job {job} {info.status.value.lower()}: {info.message}", file=sys.stderr)
        return 1
    return status if status >= 0 else 128 - status


async def _print_log(client: "JobSubmissionClient", address: str, job: str) -> "JobDetails":
    """Print the log of the job until it ends. Lost connections are replaced, and text that was printed is skipped.

    Raises:
        UserError: the cluster has not responded for `LOST_SECONDS`.
    """
    import aiohttp

    printed, responded = 0, time.monotonic()

    async def print_new_text() -> None:
        nonlocal printed
        position = 0
        async for text in client.tail_job_logs(job):
            print(text[max(0, printed - position) :], end="", flush=True)
            position += len(text)
            printed = max(printed, position)

    while True:
        info, is_complete = None, False
        try:
            info = client.get_job_info(job)
            responded = time.monotonic()
            await asyncio.wait_for(print_new_text(), LOG_SECONDS)
            is_complete = True
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            if info is None and time.monotonic() - responded > LOST_SECONDS:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"job {job}: {address} has not responded for {LOST_SECONDS} s ({reason}); the job may still be running; "
                    f"follow it with: tcan jobs follow --address {address} --job_id {job}"
                ) from None
        if info is not None and info.status.is_terminal():
            if not is_complete:
                print(f"tcan: job {job}: the end of its log cannot be read", file=sys.stderr)
            return info
        await asyncio.sleep(RETRY_SECONDS)  # the log ends shortly before the job


def _stop_or_leave(client: "JobSubmissionClient", address: str, job: str) -> int:
    """Ask whether to stop the job after Ctrl-C; return the exit status."""
    try:
        answer = input("\nThe job is running on the cluster: [s]top it or [l]eave it running? ")
    except (KeyboardInterrupt, EOFError):  # second Ctrl-C, or no terminal
        answer = "l"
    if not answer.lower().startswith("s"):
        command = f"tcan jobs stop --address {address} --job_id {job}"
        print(f"job {job} is still running; stop it with: {command}", flush=True)
        return 0
    _stop(client, job)
    return 130


def _stop(client: "JobSubmissionClient", job: str) -> None:
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    print(f"job {job}: {client.get_job_status(job).value.lower()}", flush=True)
