"""`tcan ui`: MLflow server for the tracking folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import requests

from pipelines import tracking
from pipelines.config import Config
from pipelines.port import check_port
from tcan.errors import UserError

START_SECONDS = 120  # imports of the server are slow on a busy machine
HOST = "127.0.0.1"


def ui(config: Config, port: int) -> None:
    """Serve the recorded runs at `http://127.0.0.1:port` until interrupted.

    Raises:
        UserError: no runs are recorded, the port is invalid or in use, the runs are on an MLflow server, or the server
            stopped.
    """
    check_port(HOST, port)
    uri = tracking.resolve_uri(config.tracking)
    if uri.startswith("http"):
        raise UserError(f"{uri}: the runs are on this MLflow server; open the address in a browser")
    folder = Path(tracking.resolve(config.tracking).folder)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"{folder}: no recorded runs; set --tracking.folder to the folder of the runs")
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
    }  # avoids seven unused processes
    with log.open("w") as output:
        # A new session, so that the processes that the server starts end with it.
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_ready(server, port, log)
        print(f"MLflow serves the runs of {folder} at http://{HOST}:{port} (stop with Ctrl-C)", flush=True)
        server.wait()
        raise UserError(f"the MLflow server stopped; see the log {log}")
    finally:
        _stop(server)


def _wait_until_ready(server: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            requests.get(f"http://{HOST}:{port}/health", timeout=5).raise_for_status()
            return
        except requests.RequestException:
            time.sleep(0.5)
    raise UserError(f"the MLflow server did not start; see the log {log}")


def _stop(server: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
