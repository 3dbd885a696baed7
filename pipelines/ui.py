"""`tcan ui`: MLflow's own page on the tracking folder."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

from pipelines import tracking
from pipelines.config import Config
from tcan.errors import UserError

START_SECONDS = 120  # the server imports for long on a busy machine
HOST = "127.0.0.1"


def ui(config: Config, port: int) -> None:
    """Serves the recorded runs at `http://127.0.0.1:port` until interrupted.

    Raises UserError when nothing has been recorded, the port is in use, or a server already has the runs.
    """
    uri = tracking.resolve_uri(config.tracking)
    if uri.startswith("http"):
        raise UserError(f"the runs are on the MLflow server at {uri}: open that address")
    folder = Path(tracking.resolve(config.tracking).folder)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(
            f"no runs are recorded in {folder}; name the folder that has them with --tracking.folder"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise UserError(f"port {port} {reason}; choose another with --port") from None
        except OverflowError:
            raise UserError(f"port {port} does not exist; choose one up to 65535 with --port") from None

    log = folder / "server.log"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--default-artifact-root",
    ]
    command += [(folder / "artifacts").as_uri(), "--host", HOST, "--port", str(port), "--workers", "1"]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }  # seven processes that we've no use for
    with log.open("w") as output:
        # Its own process group, because the server starts processes that must end with it.
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_it_answers(server, port, log)
        print(f"MLflow shows the runs of {folder} at http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
        server.wait()
        raise UserError(f"the MLflow server ended; its last words are in {log}")
    finally:
        _end(server)


def _wait_until_it_answers(server: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            requests.get(f"http://{HOST}:{port}/health", timeout=5).raise_for_status()
            return
        except requests.RequestException:
            time.sleep(0.5)
    raise UserError(f"the MLflow server did not start; its last words are in {log}")


def _end(server: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
