"""All jobs on rendered puppets: videos -> clip dataset -> stage 1 -> stage 2 -> animated videos -> metrics.

    OUT/videos/train/            clips of `dance`: few adults, one kind of scene
    OUT/videos/{dance,bizarre}/  held out: characters and dances that are in no training set
    OUT/dataset/ OUT/run/        outputs of `tcan preprocess` and `tcan train`
    OUT/animated/                a held-out dancer and a creature, each with the dance of another character
    OUT/evaluation/{dance,bizarre}/
    OUT/sheet.png                overview of the animated videos
    OUT/mlflow/                  the MLflow runs

Complete parts are skipped, so rerunning the command resumes.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipelines.animate import Animation, animate
from pipelines.config import Config, TrackingConfig
from pipelines.evaluate import evaluate
from pipelines.metrics_table import table
from pipelines.preprocess.job import preprocess
from pipelines.puppets.variations import HeldOut, sample_held_out
from pipelines.puppets.world import DISTRIBUTIONS, FPS, sample_clip, write_clip
from pipelines.train.job import train
from tcan.video import read_video, write_image

TRAIN_CLIPS, TRAIN_FRAMES = 24, 64
HELD_OUT_CLIPS, HELD_OUT_FRAMES = 4, 40
HELD_OUT_SEED = 20_000_000
"""Disjoint from the seeds of the demo's training clips and of the pretraining of the mini weights."""
SHEET_TIMES = 6


def demo(out: Path, config: Config) -> None:
    """Run every job at the size of `config`, then print the metrics and the locations of the results.

    Raises:
        UserError: see the jobs.
    """
    out = Path(out)
    tracking = TrackingConfig(config.tracking.experiment, str(out / "mlflow"), config.tracking.uri)
    config = dataclasses.replace(config, tracking=tracking)

    videos = out / "videos"
    render(videos / "train", "dance", 0, TRAIN_CLIPS, TRAIN_FRAMES, config.size)
    for distribution in ("dance", "bizarre"):
        folder, count = videos / distribution, (HELD_OUT_CLIPS, HELD_OUT_FRAMES)
        render(folder, distribution, HELD_OUT_SEED, *count, config.size, regions=True)
    preprocess(str(videos / "train"), str(out / "dataset"), config)
    model = Path(train(out / "dataset", out / "run", config))

    animated = []
    for character, dance in (("dance", 1), ("bizarre", 2)):
        target = out / "animated" / f"{character}.mp4"
        if target.exists():
            print(f"{target}: already exists, skipped", flush=True)
        else:
            image, driving = videos / character / "00.png", videos / "dance" / f"{dance:02}.mp4"
            animate(Animation(image, target, driving, side_by_side=True), model, config)
        animated.append(target)
    sheet = out / "sheet.png"
    write_image(contact_sheet(animated), sheet)

    tables = []
    for distribution in ("dance", "bizarre"):
        folder = out / "evaluation" / distribution
        if not (folder / "evaluation.json").exists():
            evaluate(videos / distribution, model, folder, config)
        metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
        tables.append(f"Held-out {distribution}:\n{table(metrics)}")

    print("", *tables, sep="\n\n")
    print(f"\nVideos:         {', '.join(map(str, animated))}; the held-out ones in {out / 'evaluation'}")
    print(f"Contact sheet:  {sheet}")
    print(f"Runs in MLflow: tcan ui --tracking.folder {tracking.folder}")


def render(
    folder: Path, kind: HeldOut, first_seed: int, clips: int, frames: int, size: int, regions: bool = False
) -> None:
    """Render clips as mp4, each with its ground-truth keypoints (JSON) and its first frame (PNG).

    Args:
        regions: also write the labels of the regions, for their metrics. Only distributions have them, not the variations.
    """
    missing = [i for i in range(clips) if not (folder / f"{i:02}.png").exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(missing, desc=f"rendering {folder}", disable=None):
        if regions and kind in DISTRIBUTIONS:
            clip = sample_clip(kind, first_seed + i, frames, size, regions=True)
        else:
            clip = sample_held_out(kind, first_seed + i, frames, size)
        write_clip(clip, folder / f"{i:02}", FPS)
        # Written last: marks the clip as complete.
        write_image(clip.frames[0], folder / f"{i:02}.png")


def contact_sheet(videos: list[Path]) -> np.ndarray:
    """uint8 RGB: for each video the image, then driving poses above results at `SHEET_TIMES` times."""

    def rows() -> Iterator[np.ndarray]:
        for path in videos:
            frames, _ = read_video(path)
            image, pose, result = np.split(frames, 3, axis=2)
            times = np.linspace(0, len(frames) - 1, SHEET_TIMES).round().astype(int)
            yield np.concatenate([image[0], *pose[times]], axis=1)
            yield np.concatenate([np.zeros_like(image[0]), *result[times]], axis=1)

    return np.concatenate(list(rows()))
