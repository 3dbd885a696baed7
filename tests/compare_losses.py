"""Compare the training losses of two runs, for example before and after a change that must not alter results.

python -m tests.compare_losses A B [--tolerance 1e-4] [--store FOLDER]

A, B: stage folder of a run (OUT/stage1), or JSON file {step: loss}. Losses of a run are read from the MLflow store in
FOLDER (default: tcan-mlflow). Prints the step with the largest relative difference. The exit status is 1 if the
difference exceeds the tolerance.
"""

import argparse
import json
import sys
from pathlib import Path

from pipelines import tracking
from pipelines.config.parser import load_config


def losses(source: Path, store: str) -> dict[int, float]:
    """Losses by step."""
    if source.is_file():
        return {int(step): loss for step, loss in json.loads(source.read_text()).items()}
    from mlflow import MlflowClient

    run_id = json.loads((source / "run.json").read_text())["mlflow_run_id"]
    config = load_config(f"--tracking.folder={store}").tracking
    history = MlflowClient(tracking.resolve_uri(config)).get_metric_history(run_id, "loss")
    return {metric.step: metric.value for metric in history}


def largest_difference(a: dict[int, float], b: dict[int, float]) -> tuple[float, int]:
    """Largest difference relative to b, and its step, over the common steps.

    Raises:
        ValueError: the runs have no common step.
    """
    return max((abs(a[step] - b[step]) / abs(b[step]), step) for step in a.keys() & b.keys())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--store", default="tcan-mlflow")
    args = parser.parse_args()
    a, b = losses(args.a, args.store), losses(args.b, args.store)
    difference, step = largest_difference(a, b)
    num_unmatched = len(a.keys() ^ b.keys())
    print(
        f"{len(a.keys() & b.keys())} common steps, {num_unmatched} in one run only; largest difference at step {step}: "
        f"{a[step]:.8g} and {b[step]:.8g}, relative difference {difference:.1e}"
    )
    return int(difference > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
