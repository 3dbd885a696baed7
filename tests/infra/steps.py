"""Steps of `tests.infra.cluster` that run on one of its machines: python -m tests.infra.steps STEP ARGUMENTS.

prepare         create s3://corpus, render puppets, upload videos and a table of pairs
report ALONE STAGE...
                print as JSON what the jobs have left in the bucket and in MLflow, and the losses of the training in ALONE
"""

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import requests

from pipelines import storage
from pipelines.staging import local_input, upload

BUCKET = "s3://corpus"
VIDEOS, FRAMES = 6, 48
HELD_OUT, HELD_OUT_FRAMES = 2, 8


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
        rows = [
            f"{image}.png,{BUCKET}/heldout/{driving}.mp4,out/{image}-{driving}.mp4"
            for image in range(HELD_OUT)
            for driving in range(HELD_OUT)
        ]
        (folder / "pairs" / "pairs.csv").write_text("\n".join(("image,driving,out", *rows)) + "\n")
        upload(folder, BUCKET)


def report(alone: str, *stages: str) -> None:
    parts = {
        "clips": stored_clips(f"{BUCKET}/dataset"),
        "losses": {stage: losses(f"{BUCKET}/run/stage{stage}") for stage in stages},
        "losses_alone": {stage: losses(f"{alone}/stage{stage}") for stage in stages},
        "runs": {stage: run_states(f"stage {stage}: run") for stage in stages},
        "frames": animated_frames(),
        "evaluation": evaluation(),
    }
    print(json.dumps(parts))


def animated_frames() -> list[int]:
    """Number of frames of every result of `animate --pairs`."""
    from tcan.video import read_video

    names = [name for name in storage.list_files(f"{BUCKET}/pairs/out") if name.endswith(".mp4")]
    return [len(read_video(local_input(name))[0]) for name in names]


def evaluation() -> dict[str, Any] | None:
    name = f"{BUCKET}/evaluation/evaluation.json"
    return json.loads(storage.read_bytes(name)) if storage.exists(name) else None


def stored_clips(dataset: str) -> dict[str, int]:
    """How often each clip is stored."""
    from pipelines.dataset import clip_files

    clips: Counter[str] = Counter()
    for name in clip_files(dataset):
        with storage.open_parquet(name) as file:
            clips.update(file.read(["clip_id"])["clip_id"].to_pylist())
    return clips


def losses(stage: str) -> list[Any]:
    """Sorted (step, loss) of all records in the MLflow run of a stage."""
    from mlflow import MlflowClient

    run = json.loads(storage.read_bytes(f"{stage}/run.json"))["mlflow_run_id"]
    return sorted((metric.step, metric.value) for metric in MlflowClient().get_metric_history(run, "loss"))


def run_states(name: str) -> list[str]:
    """Status of every MLflow run with this name."""
    from mlflow import MlflowClient

    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"attributes.run_name = '{name}'")
    return [run.info.status for run in runs]


if __name__ == "__main__":
    {"prepare": prepare, "report": report}[sys.argv[1]](*sys.argv[2:])
