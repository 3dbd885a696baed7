"""Checks of what the jobs of `tests.infra.cluster` have left in the bucket and in MLflow."""

from collections.abc import Callable, Mapping
from typing import Any

from tests.infra.steps import FRAMES, HELD_OUT, HELD_OUT_FRAMES, VIDEOS

Check = Callable[[str, bool, str], None]


def check_results(found: Mapping[str, Any], steps: Mapping[int, int], clip_frames: int) -> bool:
    """Print the checks; returns whether all are good.

    Args:
        found: job -> results, from `tests.infra.steps report`.
        steps: stage -> number of training steps.
        clip_frames: length of a clip.
    """
    results = []

    def check(name: str, is_good: bool, detail: str) -> None:
        print(f"{'ok    ' if is_good else 'FAILED'}  {name}: {detail}", flush=True)
        results.append(is_good)

    for job, part in found.items():
        if job == "preprocess":
            clips, expected = part["clips"], VIDEOS * FRAMES // clip_frames
            once = len(clips) == expected and set(clips.values()) == {1}
            check("preprocess, every clip once", once, f"{len(clips)} clips")
            _check_run(check, job, part, ["dataset.json", "clips.png"])
        elif job == "animate":
            _check_pairs(check, part)
        elif job == "evaluate":
            _check_evaluation(check, part)
        else:
            _check_training(check, job, part, steps[int(job.removeprefix("stage"))])
    return all(results)


def _check_run(check: Check, job: str, part: Mapping[str, Any], files: list[str]) -> None:
    """files: artifacts that the reader must have downloaded."""
    runs = part["runs"]
    # An evaluation whose machine was switched off is submitted again.
    earlier = ["KILLED"] if job == "evaluate" else []
    is_good = runs in (["FINISHED"], ["FINISHED", *earlier])
    check(f"{job}, one finished MLflow run", is_good, ", ".join(runs))
    missing = [file for file in files if not part["artifacts"].get(file)]
    sizes = f"{len(part['artifacts'])} files, {sum(part['artifacts'].values())} bytes"
    check(f"{job}, artifacts on the reader", not missing, f"{sizes}, missing: {missing}")


def _check_training(check: Check, job: str, part: Mapping[str, Any], steps: int) -> None:
    losses, alone = part["losses"], part["losses_alone"]
    once = [step for step, _ in losses] == list(range(1, steps + 1))
    check(f"{job}, every step recorded once", once, f"{len(losses)} records")
    check(f"{job}, losses equal bit for bit", losses == alone, f"last loss {losses[-1][1]!r}")
    _check_run(check, job, part, ["config.yaml"])
    if "model" in part:
        equal = part["model"]
        weights = [name for name in equal if name.endswith(".safetensors")]
        detail = f"{len(equal)} common files, {len(weights)} of weights"
        check(
            f"{job}, registered weights equal those in the bucket",
            bool(weights) and all(equal.values()),
            detail,
        )


def _check_pairs(check: Check, part: Mapping[str, Any]) -> None:
    number = HELD_OUT**2
    once = part["steps"] == list(range(1, number + 1)) and part["statuses"] == ["done"] * number
    check("animate, every pair once", once, f"{len(part['steps'])} records, {len(part['files'])} files")
    check("animate, frames", part["frames"] == [HELD_OUT_FRAMES] * number, f"{part['frames']}")
    equal = len(part["files"]) == number and not part["different"]
    check("animate, frames equal bit for bit", equal, f"different: {part['different']}")
    _check_run(check, "animate", part, ["pairs.report.csv"])


def _check_evaluation(check: Check, part: Mapping[str, Any]) -> None:
    metrics, alone = part["metrics"], part["metrics_alone"]
    check("evaluate, all videos", part["videos"] == HELD_OUT, f"{part['videos']} videos")
    detail = f"{len(metrics)} metrics, PSNR {metrics['psnr']!r} dB"
    check("evaluate, metrics equal bit for bit", metrics == alone, detail)
    _check_run(check, "evaluate", part, ["evaluation.json", "videos.csv", "sheet.png"])
