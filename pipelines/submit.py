"""`tcan COMMAND ... --submit http://HEAD:8265`: the same command as a job of a Ray cluster, through Ray's job client.

The code travels: both packages and the YAML files that `--config` names are copied to the cluster as the job's working
directory. The environment travels with `--environment requirements.lock`: Ray's runtime environment has uv install what
the file names, its hashes checked, on every node that runs a part of the job, into a virtual environment of the job's own
(the cluster's `python` with what is in it; Ray copies it, where it is a virtual environment itself). A node has 10 minutes
for it by Ray's default. Without the option the cluster's `python` must have those packages. What does not travel: Python
and Ray, which must be of the same versions there, and videos, datasets, models and records, whose paths are made absolute
and must mean the same there.
"""

import asyncio
import importlib.util
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcan.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("tcan", "pipelines")
# Of this machine's environment, what the job's meaning depends on; never its secrets.
VARIABLES = ("MLFLOW_TRACKING_URI", "HF_HUB_OFFLINE")

REQUIREMENTS = "requirements.txt"  # in the job's working directory

START_SECONDS = 60


def submit(address: str, argv: Sequence[str], environment: str | None = None) -> int:
    """Runs `tcan ARGV...` as a job, prints its log as it comes, and returns its exit status.

    address: the cluster's dashboard, such as http://head:8265. argv: without `--submit`, paths absolute or URIs; see
    `absolute_paths`. environment: a file of requirements for uv (a lock of `make lock`, say), whose own relative paths mean
    nothing there. Ctrl-C asks whether to stop the job (130) or to leave it running (0).

    Raises:
        UserError: no such file of requirements; no Ray cluster answers at the address, or it takes no job.
    """
    if environment is not None and not Path(environment).is_file():
        raise UserError(f"--environment {environment}: is no file; give requirements.lock or one of its kind")
    client = _connect(address)
    with tempfile.TemporaryDirectory() as folder:
        argv = _pack(Path(folder), argv)
        runtime = {
            "working_dir": folder,
            "env_vars": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        }
        if environment is not None:
            shutil.copy(environment, Path(folder) / REQUIREMENTS)
            runtime["uv"] = _uv()
        job = _start(client, address, argv, runtime)
    print(f"job {job} on {address}", flush=True)
    try:
        return _follow(client, job)
    except KeyboardInterrupt:
        return _stop_or_leave(client, address, job)


def absolute_paths(argv: Sequence[str], options: Collection[str], flags: Collection[str]) -> list[str]:
    """The command line with its relative paths made absolute: all positional arguments but the command, and the values
    of `options` (such as `--out`). URIs stay. flags: options without a value."""
    command, *rest = argv
    made, option = [command], ""
    for token in rest:
        name, equals, value = token.partition("=")
        if token.startswith("--"):
            made.append(f"{name}={_absolute(value)}" if equals and name in options else token)
            option = "" if equals or name in flags else name
        else:
            made.append(_absolute(token) if option in options or not option else token)
            option = ""
    return made


def _absolute(path: str) -> str:
    """A path made absolute; URIs and the ids of MLflow's runs stay."""
    if ":/" in path or re.fullmatch(r"[0-9a-f]{32}", path):
        return path
    return os.path.abspath(os.path.expanduser(path))


def _connect(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    # The terminal shows the job's lines.
    for noisy in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--submit {address}: no Ray cluster answers there ({reason}); give its dashboard, such as "
            "http://head:8265, and RAY_AUTH_MODE=token where it asks for a token"
        ) from None


def _pack(folder: Path, argv: Sequence[str]) -> list[str]:
    """Copies what travels into the folder; returns the command line with `--config FILE` named as it is there."""
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
    """The `uv` field of Ray's runtime environment.

    It names the file in the working directory rather than its lines: Ray hands the field to the job in an environment
    variable, and with its hashes a lock is longer than one may be. No options: Ray's default one, `--no-cache`, would
    have every change of the code fetch all packages again, because the environment is made anew with the directory.
    """
    return {
        "packages": [f"-r ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{REQUIREMENTS}"],
        "uv_pip_install_options": [],
    }


def _start(client: "JobSubmissionClient", address: str, argv: Sequence[str], runtime: dict[str, Any]) -> str:
    """Submits the job and returns its id. A cluster that has just come up takes none for a few seconds."""
    began = time.monotonic()
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(["python", "-m", "pipelines.cli", *argv]),
                runtime_env=runtime,
            )
        except RuntimeError as error:
            if time.monotonic() - began > START_SECONDS:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"--submit {address}: the cluster takes no job: {reason}") from None
            time.sleep(1)


def _follow(client: "JobSubmissionClient", job: str) -> int:
    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    asyncio.run(tail())
    while not client.get_job_status(job).is_terminal():  # the log ends a moment before the job does
        time.sleep(0.2)
    info = client.get_job_info(job)
    status = info.driver_exit_code
    if status is None:  # it never started, or was stopped
        print(f"tcan: job {job} {info.status.value.lower()}: {info.message}", file=sys.stderr)
        return 1
    return status if status >= 0 else 128 - status


def _stop_or_leave(client: "JobSubmissionClient", address: str, job: str) -> int:
    """After Ctrl-C: asks, and returns the exit status."""
    try:
        answer = input("\nThe job runs on the cluster: [s]top it or [l]eave it running? ")
    except (KeyboardInterrupt, EOFError):  # asked twice, or nobody to ask
        answer = "l"
    if not answer.lower().startswith("s"):
        print(f"job {job} goes on; to stop it: ray job stop --address {address} {job}", flush=True)
        return 0
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    print(f"job {job} stopped", flush=True)
    return 130
