"""Where the jobs run: on the Ray cluster that RAY_ADDRESS names, else on this machine alone."""

import os

import ray

_connected = False


def connect() -> None:
    """Connects this process to Ray, or starts it; never joins a cluster that merely happens to run on this machine.

    Ray's own lines below an error stay in its log files: the terminal shows the jobs'.
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
    """Ends what `connect` began, if it did. Ray prints what it still keeps of the workers' lines, and nothing after it."""
    global _connected
    if _connected:
        ray.shutdown()
        _connected = False
