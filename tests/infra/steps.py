"""Steps of `tests.infra.cluster` that run on one of its machines: python -m tests.infra.steps STEP ARGUMENTS.

prepare         create s3://corpus, render puppets, upload videos and tables of pairs
report JOB...   print as JSON what the jobs, and the same jobs without faults, have left in the bucket and in MLflow
"""

import csv
import io
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import requests

from pipelines import storage
from pipelines.staging import local_input, upload

BUCKET = "s3://corpus"
VIDEOS, FRAMES = 6, 48
HELD_OUT, HELD_OUT_FRAMES = 3, 8
ALONE = "alone"  # name of the results, and of the MLflow runs, of the undisturbed jobs


def prepare() -> None:
    from pipelines.puppets.world import sample_clip, write_clip
    from tcan.video import write_image

    requests.put(f"{os.environ['AWS_ENDPOINT_URL']}/corpus", timeout=60).raise_for_status()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("videos", "heldout", "pairs"):
            (folder / part).mkdir()
        for number in range(VIDEOS):
            write_clip(sample_clip("dance", number, FRAMES), folder / "videos" / f"{number}")
            (folder / "videos" / f"{number}.json").unlink()
        for number in range(HELD_OUT):
            clip = sample_clip("dance", 100 + number, HELD_OUT_FRAMES)
            write_clip(clip, folder / "heldout" / f"{number}")
            write_image(clip.frames[0], folder / "pairs" / f"{number}.png")
        for table in ("pairs", ALONE):
            rows = [
                f"{image}.png,{BUCKET}/heldout/{driving}.mp4,{table}/{image}-{driving}.mp4"
                for image in range(HELD_OUT)
                for driving in range(HELD_OUT)
            ]
            (folder / "pairs" / f"{table}.csv").write_text("\n".join(("image,driving,out", *rows)) + "\n")
        upload(folder, BUCKET)


def report(*jobs: str) -> None:
    """jobs: preprocess, stage1, stage2, animate, evaluate."""
    parts: dict[str, Any] = {}
    for job in jobs:
        if job == "preprocess":
            parts[job] = {"runs": states("dataset"), "clips": stored_clips(f"{BUCKET}/dataset")}
            parts[job]["artifacts"] = artifacts("dataset")
        elif job == "animate":
            parts[job] = pairs()
        elif job == "evaluate":
            parts[job] = evaluation()
        else:
            stage = job.removeprefix("stage")
            parts[job] = {
                "runs": states(f"stage {stage}: run"),
                "losses": history(f"stage {stage}: run", "loss"),
                "losses_alone": history(f"stage {stage}: {ALONE}", "loss"),
                "artifacts": artifacts(f"stage {stage}: run"),
            }
            if stage == "2":
                parts[job]["model"] = registered_weights()
    print(json.dumps(parts))


def runs(name: str) -> list[Any]:
    """All MLflow runs with this name."""
    from mlflow import MlflowClient

    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"attributes.run_name = '{name}'"))


def states(name: str) -> list[str]:
    return sorted(run.info.status for run in runs(name))


def finished(name: str) -> str:
    """Id of the run with this name that is finished."""
    return next(run.info.run_id for run in runs(name) if run.info.status == "FINISHED")


def history(name: str, key: str) -> list[Any]:
    """Sorted (step, value) of all records of a metric."""
    from mlflow import MlflowClient

    return sorted(
        (metric.step, metric.value) for metric in MlflowClient().get_metric_history(finished(name), key)
    )


def artifacts(name: str) -> dict[str, int]:
    """Downloads the artifacts of a run; returns the size of each file."""
    from mlflow.artifacts import download_artifacts

    folder = Path(download_artifacts(run_id=finished(name)))
    return {
        str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()
    }


def stored_clips(dataset: str) -> dict[str, int]:
    """How often each clip is stored."""
    from pipelines.dataset import clip_files

    clips: Counter[str] = Counter()
    for name in clip_files(dataset):
        with storage.open_parquet(name) as file:
            clips.update(file.read(["clip_id"])["clip_id"].to_pylist())
    return clips


def pairs() -> dict[str, Any]:
    """The results of `animate --pairs`; `different`: the pairs whose frames are not those of the undisturbed job."""
    rows = list(csv.DictReader(io.StringIO(storage.read_bytes(f"{BUCKET}/pairs/pairs.report.csv").decode())))
    names = sorted(name.rpartition("/")[2] for name in storage.list_files(f"{BUCKET}/pairs/pairs"))
    different = [
        name
        for name in names
        if not np.array_equal(*(_frames(f"{BUCKET}/pairs/{table}/{name}") for table in ("pairs", ALONE)))
    ]
    return {
        "runs": states("animate pairs.csv"),
        "steps": [step for step, _ in history("animate pairs.csv", "pairs_done")],
        "statuses": [row["status"] for row in rows],
        "files": names,
        "frames": [len(_frames(f"{BUCKET}/pairs/pairs/{name}")) for name in names],
        "different": different,
        "artifacts": artifacts("animate pairs.csv"),
    }


def _frames(name: str) -> np.ndarray:
    from tcan.video import read_video

    return read_video(local_input(name))[0]


def evaluation() -> dict[str, Any]:
    """The metrics of both evaluations, which are in the same order, and the artifacts."""
    found = {
        name: json.loads(storage.read_bytes(f"{BUCKET}/{name}/evaluation.json"))
        for name in ("evaluation", ALONE)
    }
    return {
        "runs": states("evaluate evaluation"),
        "videos": found["evaluation"]["videos"],
        "metrics": found["evaluation"]["metrics"],
        "metrics_alone": found[ALONE]["metrics"],
        "artifacts": artifacts("evaluate evaluation"),
    }


def registered_weights() -> dict[str, bool]:
    """For each file of the trained model in the bucket that the registered model also has: whether they are equal.

    The registered model also contains the code of tcan, and not the weights of the `mini` model.
    """
    from pipelines.config import TrackingConfig
    from pipelines.tracking import local_model

    registered, stored = local_model("models:/tcan@run", TrackingConfig()), local_input(f"{BUCKET}/run/model")
    both = [
        file.relative_to(stored)
        for file in stored.rglob("*")
        if file.is_file() and (registered / file.relative_to(stored)).is_file()
    ]
    return {str(name): (registered / name).read_bytes() == (stored / name).read_bytes() for name in both}


if __name__ == "__main__":
    {"prepare": prepare, "report": report}[sys.argv[1]](*sys.argv[2:])
