"""Steps of `tests.infra.cluster` that run on one of its machines: python -m tests.infra.steps STEP ARGUMENTS.

prepare    create s3://corpus, render puppets, upload videos and a table of pairs
losses     print {step: [recorded losses]} of the MLflow run of a stage (path or URI of its folder), as JSON
rows       print {clip id: times stored} and the frames of a dataset, as JSON
results    print {name: frames} of the animated videos in a folder of the bucket, as JSON
"""

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import requests

from pipelines import storage
from pipelines.staging import local_input, upload

BUCKET = "s3://corpus"
VIDEOS, FRAMES, HELD_OUT = 4, 32, 2


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
            clip = sample_clip("dance", 100 + number, 8)
            write_clip(clip, folder / "heldout" / f"{number}")
            write_image(clip.frames[0], folder / "pairs" / f"{number}.png")
        rows = [
            f"{image}.png,{BUCKET}/heldout/{driving}.mp4,out/{image}-{driving}.mp4"
            for image in range(HELD_OUT)
            for driving in range(HELD_OUT)
        ]
        (folder / "pairs" / "pairs.csv").write_text("\n".join(("image,driving,out", *rows)) + "\n")
        upload(folder, BUCKET)


def losses(stage: str) -> None:
    from mlflow import MlflowClient

    run = json.loads(storage.read_bytes(f"{stage}/run.json"))["mlflow_run_id"]
    values: dict[int, list[float]] = {}
    for metric in MlflowClient().get_metric_history(run, "loss"):
        values.setdefault(metric.step, []).append(metric.value)
    print(json.dumps(values))


def rows(dataset: str) -> None:
    from pipelines.dataset import clip_files

    clips: Counter[str] = Counter()
    frames = 0
    for name in clip_files(dataset):
        with storage.open_parquet(name) as file:
            for row in file.read(["clip_id", "num_frames"]).to_pylist():
                clips[row["clip_id"]] += 1
                frames += row["num_frames"]
    print(json.dumps({"clips": clips, "frames": frames}))


def results(folder: str) -> None:
    from tcan.video import read_video

    names = [name for name in storage.list_files(folder) if name.endswith(".mp4")]
    print(json.dumps({name.rpartition("/")[2]: len(read_video(local_input(name))[0]) for name in names}))


def read(name: str) -> None:
    print(json.dumps(json.loads(storage.read_bytes(name))))


if __name__ == "__main__":
    {"prepare": prepare, "losses": losses, "rows": rows, "read": read, "results": results}[sys.argv[1]](
        *sys.argv[2:]
    )
