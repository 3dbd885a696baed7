"""Connection to Ray: the cluster at RAY_ADDRESS if that is set, otherwise a new local Ray instance."""

import os
import re
import signal
import socket
import threading

import ray

from tcan.errors import UserError, first_line

PROBE_SECONDS = 5
_connected = False
_is_local = False


def connect() -> None:
    """Connect this process to the cluster at RAY_ADDRESS, or start Ray locally.

    Without RAY_ADDRESS it never joins a cluster that is already running on this machine. Ray messages below the level ERROR
    go to Ray's log files only, so that the terminal shows the output of the job.

    Raises:
        UserError: no cluster responds at RAY_ADDRESS, or it has other versions of Ray or Python.
    """
    global _connected
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or _start_local()
    if not _is_local:
        _probe(address)
    _connected = True
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            "local" if _is_local else address,
            include_dashboard=False if _is_local else None,
            logging_level="error",
            logging_config=ray.LoggingConfig(log_level="ERROR"),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        if _is_local:
            raise
        raise UserError(
            f"RAY_ADDRESS = {address}: cannot be joined ({first_line(error)}); start the cluster with the same versions of "
            "Ray and Python, or unset RAY_ADDRESS to run on this machine"
        ) from None
    if threading.current_thread() is threading.main_thread():
        # Ray's handlers exit with status 15, and print a stack and abort the process 3 s after SIGTERM.
        signal.signal(signal.SIGTERM, on_sigterm)


def _start_local() -> str:
    """Choose the address of a new local Ray, which its processes inherit.

    Otherwise Ray Train's monitor would search for the address, and fail if another Ray runs on this machine.
    """
    global _is_local
    _is_local = True
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    os.environ["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
    return os.environ["RAY_ADDRESS"]


def _probe(address: str) -> None:
    """Check that the address is valid and accepts connections; Ray itself tries for minutes."""
    if address == "auto":
        return
    found = re.fullmatch(r"(?:ray://)?([^\s/]+):(\d{1,5})/?", address)
    advice = "set HOST:6379 of a cluster's head, or unset RAY_ADDRESS to run on this machine"
    if found is None:
        raise UserError(f"RAY_ADDRESS = {address}: not an address; {advice}")
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"RAY_ADDRESS = {address}: no Ray cluster responds ({error}); {advice}") from None


def is_local() -> bool:
    """Whether `connect` has started a Ray of this machine, whose resources never grow."""
    return _is_local


def disconnect() -> None:
    """Shut Ray down if `connect` started or joined it. Shutdown flushes the workers' buffered output to the terminal."""
    global _connected, _is_local
    if _connected:
        ray.shutdown()
        _connected = False
    if _is_local:
        _is_local = False
        del os.environ["RAY_ADDRESS"], os.environ["RAY_GCS_SERVER_PORT"]
