"""Where the jobs run: on the Ray cluster that RAY_ADDRESS names, else on this machine alone."""

import os

import ray


def connect() -> None:
    """Connects this process to Ray, or starts it; never joins a cluster that merely happens to run on this machine.

    Ray's own lines below an error stay in its log files: the terminal shows the jobs'.
    """
    if not ray.is_initialized():
        ray.init(
            os.environ.get("RAY_ADDRESS", "local"),
            include_dashboard=False,
            logging_level="error",
            logging_config=ray.LoggingConfig(log_level="ERROR"),
        )
