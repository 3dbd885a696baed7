"""Are two runs' losses the same? A change that should move no number leaves them so.

python -m tests.compare_losses A B [--tolerance 1e-4] [--store FOLDER]

A, B: the stage folder of a run (OUT/stage1), whose losses are in the MLflow store in FOLDER (tcan-mlflow unless named),
or a JSON file of losses by step. Prints where they differ most; the exit status is 1 when that is beyond the tolerance.
"""

import argparse
import json
import sys
from pathlib import Path

from pipelines import tracking
from pipelines.config_parser import load_config


def losses(source: Path, store: str) -> dict[int, float]:
    """Step -> loss."""
    if source.is_file():
        return {int(step): loss for step, loss in json.loads(source.read_text()).items()}
    from mlflow import MlflowClient

    run_id = json.loads((source / "run.json").read_text())["mlflow_run_id"]
    config = load_config(f"--tracking.folder={store}").tracking
    history = MlflowClient(tracking.resolve_uri(config)).get_metric_history(run_id, "loss")
    return {metric.step: metric.value for metric in history}


def largest_difference(a: dict[int, float], b: dict[int, float]) -> tuple[float, int]:
    """Relative to b, and its step, over the steps that both have; ValueError when there are none."""
    return max((abs(a[step] - b[step]) / abs(b[step]), step) for step in a.keys() & b.keys())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--store", default="tcan-mlflow")
    given = parser.parse_args()
    a, b = losses(given.a, given.store), losses(given.b, given.store)
    difference, step = largest_difference(a, b)
    only = len(a.keys() ^ b.keys())
    print(
        f"{len(a.keys() & b.keys())} steps in both, {only} in one alone; differ most at step {step}: "
        f"{a[step]:.8g} and {b[step]:.8g}, by {difference:.1e}"
    )
    return int(difference > given.tolerance)


if __name__ == "__main__":
    sys.exit(main())
