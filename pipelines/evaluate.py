"""Self-reconstruction on held-out videos: the first frame gives the look, the video the motion; then metrics.

tcan evaluate held-out/ --model run/model --out evaluation/

OUT/evaluation.json   all of it: metrics and controls (means over the videos), settings, rejected videos
OUT/videos.csv        a row a video
OUT/sheet.png         reference, then driving pose, truth and result at a few times, a row a video
OUT/videos/*.mp4      reference, driving pose, truth and result beside each other
"""

import csv
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pipelines import tracking
from pipelines.animate import load_pipeline, make_folder, sampling, to_uint8
from pipelines.config import Config
from pipelines.preprocess.sources import list_sources
from tcan.errors import UserError
from tcan.metrics import (
    background_mask,
    colour_distance,
    flicker,
    image_metrics,
    mean_pose,
    part_colours,
    pose_metrics,
)
from tcan.pipeline import TCANPipeline
from tcan.pose import follow_main_person, read_poses
from tcan.video import fit_image, read_video, write_image, write_video

SHEET_TIMES = 4
SHEET_VIDEOS = 8
SHEET_CELL = 128  # pixels

# What the table shows: line, measure, unit factor and format; each control's key is the measure's with its suffix.
TABLE = (
    ("L1 (0 to 1)", "l1", 1, ".4f"),
    ("PSNR, dB", "psnr", 1, ".2f"),
    ("SSIM", "ssim", 1, ".4f"),
    ("joints within 5 %", "pose_5", 100, ".1f"),
    ("  wrists", "pose_5_wrists", 100, ".1f"),
    ("  elbows", "pose_5_elbows", 100, ".1f"),
    ("  ankles", "pose_5_ankles", 100, ".1f"),
    ("joints within 10 %", "pose_10", 100, ".1f"),
    ("  of the true joints, within 5 %", "pose_5_true", 100, ".1f"),
    ("background flicker, grey levels", "flicker", 1, ".2f"),
    ("colour distance to the reference, dE", "colour_distance", 1, ".2f"),
    ("frames nearest to their own reference", "identified", 100, ".1f"),
)
CONTROLS = {
    "still": "first frame, still",
    "mean_pose": "mean pose",
    "other": "another video's",
    "source": "source",
    "chance": "chance",
}


@dataclass
class Evaluated:
    """One video and what was made of it, all at the model's size."""

    path: Path
    fps: float
    truth: np.ndarray  # uint8 [F, H, W, 3]
    poses: np.ndarray  # [F, 18, 3], found in the truth; what drove the result
    drawn: np.ndarray  # uint8 [F, H, W, 3], the poses as the model saw them
    result: np.ndarray  # uint8 [F, H, W, 3]
    found: np.ndarray  # [F, 18, 3], found in the result
    true_poses: np.ndarray | None  # [F, 18, 3], of the file beside the video
    metrics: dict[str, float] = field(default_factory=dict)


def evaluate(videos: Path, model: Path, out: Path, config: Config) -> dict[str, Any]:
    """Animates each video's first frame by its own poses, metrics, writes OUT (see above), prints a table.

    A video that can't be used (damaged, without a person) is named, recorded, and left out.

    Beside each measure its controls: the first frame standing still for the image metrics; the mean pose of the
    videos, and the result of another video, for the pose metrics; the source itself for the flicker; another video's
    reference for the likeness.

    Returns:
        what evaluation.json holds.

    Raises:
        UserError: no video, none that can be used, a model folder that isn't whole or doesn't fit its pretrained.
    """
    paths = [Path(path) for path in list_sources(str(videos))]
    paths = paths[: config.evaluate.videos or None]
    pipe = load_pipeline(model, config)
    out = Path(out)
    make_folder(out / "videos")
    parents = {"model": pipe.model_info.get("mlflow_run_id")}
    with tracking.run(
        "evaluate", f"evaluate {out.name}", config.tracking, dataclasses.asdict(config), parents
    ) as run:
        evaluated, rejected = [], []
        for path in tqdm(paths, desc="videos", disable=None):
            try:
                evaluated.append(reconstruct(pipe, path, config))
            except UserError as error:
                rejected.append({"source": str(path), "reason": str(error)})
                print(f"left out: {error}", flush=True)
                continue
            write_beside(evaluated[-1], out / "videos" / f"{len(evaluated) - 1:03d}-{path.stem}.mp4")
        if not evaluated:
            raise UserError(f"{videos}: none of the {len(paths)} videos can be used; the lines above say why")
        measure(evaluated)
        metrics = means([video.metrics for video in evaluated])
        report = {
            "schema_version": 1,
            "model": str(Path(model).resolve()),
            "model_run_id": parents["model"],
            "mlflow_run_id": run.id,
            "videos": len(evaluated),
            "frames": sum(len(video.truth) for video in evaluated),
            "metrics": {key: _json_number(value) for key, value in metrics.items()},
            "rejected": rejected,
            "settings": dataclasses.asdict(config),
        }
        _write_csv(evaluated, out / "videos.csv")
        write_image(contact_sheet(evaluated), out / "sheet.png")
        _write_text(json.dumps(report, indent=2) + "\n", out / "evaluation.json")
        run.metrics({key: value for key, value in metrics.items() if np.isfinite(value)})
        for name in ("evaluation.json", "videos.csv", "sheet.png"):
            run.file(out / name)
        run.folder(out / "videos", "videos")
    print(table(metrics))
    print(
        f"{len(evaluated)} videos, {report['frames']} frames; all of it in {out}, images in {out / 'sheet.png'}"
    )
    return report


def reconstruct(pipe: TCANPipeline, path: Path, config: Config) -> Evaluated:
    """The video's first frame with the video's own poses.

    Raises:
        UserError: the video can't be read or shows no person.
    """
    frames, fps = read_video(path, config.evaluate.frames)
    truth = np.stack([fit_image(frame, pipe.height, pipe.width) for frame in frames])
    poses = pipe.detect_poses(truth, str(path), config.animate.smooth)
    frames_01, _ = pipe(
        truth[0],
        poses,
        retarget=False,  # it is its own body
        generator=torch.Generator().manual_seed(config.seed),
        decode_batch=config.animate.decode_batch,
        return_dict=False,
        **sampling(config),
    )
    result = to_uint8(frames_01)
    people = pipe.pose_detector.detect(result)
    found = follow_main_person(people, pipe.height, pipe.width)  # no gap filled: what isn't seen is missed
    true_poses = read_true_poses(path.with_suffix(".json"), pipe, len(truth))
    return Evaluated(path, fps, truth, poses, pipe.draw(poses), result, found, true_poses)


def read_true_poses(path: Path, pipe: TCANPipeline, num_frames: int) -> np.ndarray | None:
    """True keypoints `[F, 18, 3]` in pixels of the output, where the file beside a video holds some; else None."""
    if not path.is_file():
        return None
    truth = read_poses(path)
    nobody = np.zeros((18, 3), np.float32)
    poses = np.stack([people[0] if len(people) else nobody for people in truth.people[:num_frames]])
    return pipe.scale_poses(poses, truth.height or pipe.height, truth.width or pipe.width)


def measure(evaluated: list[Evaluated]) -> None:
    """Fills in every video's metrics and controls; those that need a second video are NaN where there is none."""
    still_pose = mean_pose([video.poses for video in evaluated])
    references = np.stack([part_colours(video.truth[:1], video.poses[:1])[0] for video in evaluated])
    for i, video in enumerate(evaluated):
        height, width = video.truth.shape[1:3]
        m = video.metrics
        m |= image_metrics(video.result, video.truth)
        if len(video.truth) > 1:  # the first frame would equal itself, at a PSNR of infinity
            still = np.broadcast_to(video.truth[:1], video.truth[1:].shape)
            m |= _suffixed(image_metrics(still, video.truth[1:]), "still")

        m |= pose_metrics(video.found, video.poses, height)
        m |= _suffixed(
            pose_metrics(np.broadcast_to(still_pose, video.poses.shape), video.poses, height), "mean_pose"
        )
        other = evaluated[(i + 1) % len(evaluated)]
        common = min(len(other.found), len(video.poses))
        mistaken = pose_metrics(other.found[:common], video.poses[:common], height)
        m |= _suffixed(mistaken if other is not video else dict.fromkeys(mistaken, float("nan")), "other")
        if video.true_poses is not None:
            m |= _suffixed(pose_metrics(video.found, video.true_poses, height), "true")

        mask = background_mask(video.poses, height, width)
        m["flicker"], m["flicker_source"] = flicker(video.result, mask), flicker(video.truth, mask)

        colours = part_colours(video.result, video.poses)
        distances = np.stack([colour_distance(colours, reference) for reference in references])  # [N, F]
        others = np.delete(distances, i, axis=0)
        m["colour_distance"] = float(np.nanmean(distances[i]))
        m["colour_distance_other"] = float(np.nanmean(others)) if len(others) else float("nan")
        alone = not len(others)
        m["identified"] = float("nan") if alone else float((distances[i] < np.nanmin(others, axis=0)).mean())
        m["identified_chance"] = float("nan") if alone else 1 / len(evaluated)


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each measure over the videos that have it."""
    result = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row and not np.isnan(row[key])]
        result[key] = float(np.mean(values)) if values else float("nan")
    return result


def table(metrics: dict[str, float]) -> str:
    """The metrics as lines of text, each with its controls."""
    lines = [f"{'measure':<38}{'result':>8}   controls"]
    for label, key, factor, form in TABLE:
        if key not in metrics:
            continue
        controls = [
            f"{name} {format(metrics[f'{key}_{suffix}'] * factor, form)}"
            for suffix, name in CONTROLS.items()
            if np.isfinite(metrics.get(f"{key}_{suffix}", np.nan))
        ]
        lines.append(f"{label:<38}{format(metrics[key] * factor, form):>8}   {', '.join(controls)}".rstrip())
    return "\n".join(lines)


def contact_sheet(evaluated: list[Evaluated]) -> np.ndarray:
    """uint8 RGB: a row a video; the reference, then driving pose, truth and result at a few times."""
    rows = []
    for video in evaluated[:SHEET_VIDEOS]:
        cells = [video.truth[0]]
        for time in np.linspace(0, len(video.truth) - 1, SHEET_TIMES + 1).round().astype(int)[1:]:
            cells += [video.drawn[time], video.truth[time], video.result[time]]
        rows.append(np.concatenate([_cell(image) for image in cells], axis=1))
    return np.concatenate(rows)


def write_beside(video: Evaluated, path: Path) -> None:
    """reference | driving pose | truth | result."""
    frames = (
        np.concatenate([video.truth[0], pose, truth, result], axis=1)
        for pose, truth, result in zip(video.drawn, video.truth, video.result, strict=True)
    )
    write_video(frames, path, video.fps)


def _cell(image: np.ndarray) -> np.ndarray:
    width = round(image.shape[1] * SHEET_CELL / image.shape[0])
    return np.array(Image.fromarray(image).resize((width, SHEET_CELL), Image.Resampling.LANCZOS))


def _suffixed(metrics: dict[str, float], suffix: str) -> dict[str, float]:
    return {f"{key}_{suffix}": value for key, value in metrics.items()}


def _write_csv(evaluated: list[Evaluated], path: Path) -> None:
    columns = list(dict.fromkeys(key for video in evaluated for key in video.metrics))
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, ["source", "frames", *columns], restval="")
        writer.writeheader()
        for video in evaluated:
            writer.writerow({"source": str(video.path), "frames": len(video.truth)} | video.metrics)
    os.replace(partial, path)


def _write_text(text: str, path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(text)
    os.replace(partial, path)


def _json_number(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if np.isfinite(value) else None
