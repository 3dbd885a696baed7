"""Connection to Ray: the cluster at RAY_ADDRESS if that is set, otherwise a new local Ray instance."""

import os

import ray

_connected = False


def connect() -> None:
    """Connect this process to the cluster at RAY_ADDRESS, or start Ray locally.

    Without RAY_ADDRESS it never joins a cluster that is already running on this machine. Ray messages below the level ERROR
    go to Ray's log files only, so that the terminal shows the output of the job.
    """
    global _connected
    if not ray.is_initialized():
        _connected = True
        ray.init(
            os.environ.get("RAY_ADDRESS", "local"),
            include_dashboard=False,
            logging_level="error",
            logging_config=ray.LoggingConfig(log_level="ERROR"),
        )


def disconnect() -> None:
    """Shut Ray down if `connect` started or joined it. Shutdown flushes the workers' buffered output to the terminal."""
    global _connected
    if _connected:
        ray.shutdown()
        _connected = False
