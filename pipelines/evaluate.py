"""Self-reconstruction of held-out videos: animate the first frame with the video's poses, then compute metrics.

tcan evaluate held-out/ --model run/model --out evaluation/

OUT/evaluation.json   metrics and controls (means over the videos), configuration, rejected videos
OUT/videos.csv        metrics of each video
OUT/sheet.png         one row per video: reference, then driving pose, truth and result at several times
OUT/videos/*.mp4      reference, driving pose, truth and result side by side
"""

import csv
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines import storage, tracking
from pipelines.config import Config
from pipelines.inference import choose_device, create_folder, driving_poses, load_pipeline
from pipelines.lock import locked
from pipelines.metrics_table import protocol_lines, table, unavailable_lines
from pipelines.network_metrics import (
    SetMetrics,
    face_similarities,
    image_similarities,
    set_metrics,
    video_metrics,
)
from pipelines.preprocess.sources import list_sources
from pipelines.progress import progress
from pipelines.protocol import at_protocol_size, check_videos, published
from pipelines.staging import local_input, local_output
from tcan.atomic_write import atomic_write
from tcan.crop import fit_image
from tcan.errors import UserError
from tcan.metrics import (
    background_mask,
    colour_distance,
    flicker,
    image_metrics,
    l1_disco,
    labelled_region_metrics,
    mean_pose,
    part_colours,
    pose_metrics,
    psnr_uint8_overflow,
    region_metrics,
    ssim_disco,
    warping_error,
)
from tcan.metrics.networks import Networks, load_networks
from tcan.metrics.region_labels import REGIONS_SUFFIX, read_regions
from tcan.pipeline import TCANPipeline
from tcan.pixels import to_uint8
from tcan.pose import PoseDetector, read_poses, track_main_person
from tcan.pose.openpose import body_detector
from tcan.pose.parts import BODY
from tcan.video import read_video, write_image, write_video
from tcan.weights import load_pose_detector

SHEET_TIMES = 4
SHEET_VIDEOS = 8
SHEET_CELL = 128  # pixels


@dataclass
class Evaluated:
    """A video and its reconstruction, all at the model's size."""

    path: Path
    fps: float
    truth: np.ndarray  # uint8 [F, H, W, 3]
    poses: np.ndarray  # [F, 18, 3], detected in the truth; drives the result, after `animate.pose_errors`
    drawn: np.ndarray  # uint8 [F, H, W, 3], the pose images of the model
    result: np.ndarray  # uint8 [F, H, W, 3]
    found: np.ndarray  # [F, 18, 3], detected in the result
    true_poses: np.ndarray | None  # [F, 18, 3], from the JSON file next to the video
    scored: tuple[np.ndarray, np.ndarray] | None = None  # result and truth at the size of a protocol
    regions: np.ndarray | None = None  # uint8 [F, H, W], labels from the file next to the video
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Result and truth for the metrics that compare images."""
        return self.scored or (self.result, self.truth)


def evaluate(videos: str | Path, model: Path, out: str | Path, config: Config) -> dict[str, Any]:
    """Animate the first frame of each video with the video's poses, compute metrics, write OUT and print a table.

    A video that is damaged or shows no person is skipped, with a message and an entry in evaluation.json.

    Each metric has controls: the first frame as a still for the image metrics; the mean pose of the videos, and the
    result of another video, for the pose metrics; the source for the flicker and the warping error; the reference of
    another video for the likeness.

    Returns:
        the contents of evaluation.json.

    Raises:
        UserError: no video, no usable video, a training video of the protocol, a wrong file of a metric's network, a model
            folder that is incomplete or does not match its pretrained models.
    """
    paths = list_sources(str(videos))
    if config.evaluate.protocol == "tiktok-disco":
        check_videos(paths)
    else:
        paths = paths[: config.evaluate.videos or None]
    tracking.check(config.tracking)
    files = dataclasses.asdict(config.evaluate.networks)
    networks = load_networks(files, choose_device(config), "evaluate.networks.")
    pipe = load_pipeline(model, config)
    scorer = body_detector(pipe.pose_detector)
    if config.evaluate.detector is not None:
        scorer = load_pose_detector(config.evaluate.detector, choose_device(config))
    out = storage.absolute(out)
    with locked(out, "evaluate"):
        return _evaluate(paths, videos, pipe, scorer, networks, model, out, config)


def _evaluate(
    paths: list[str],
    videos: str | Path,
    pipe: TCANPipeline,
    scorer: PoseDetector,
    networks: Networks,
    model: Path,
    out: str,
    config: Config,
) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    parents = {"model": pipe.model_info.get("mlflow_run_id")}
    name = f"evaluate {out.rpartition('/')[2]}"
    with tracking.run("evaluate", name, config.tracking, settings, out, parents) as run:
        with local_output(out) as folder:
            create_folder(folder / "videos")
            evaluated, rejected = _reconstruct_all(paths, pipe, scorer, folder / "videos", config)
            if not evaluated:
                raise UserError(
                    f"{videos}: none of the {len(paths)} videos can be used; see the reasons above"
                )
            compute_metrics(evaluated)
            sets = compute_network_metrics(evaluated, networks)
            metrics = means([video.metrics for video in evaluated]) | sets.values
            report: dict[str, Any] = {
                "schema_version": 1,
                "model": str(Path(model).resolve()),
                "model_run_id": parents["model"],
                "mlflow_run_id": run.id,
                "videos": len(evaluated),
                "frames": sum(len(video.truth) for video in evaluated),
                "metrics": {key: _json_number(value) for key, value in metrics.items()},
                "samples": sets.samples,
                "unavailable": sets.unavailable,
                "rejected": rejected,
                "settings": settings,
            }
            if config.evaluate.protocol == "tiktok-disco":
                rows, frames = (
                    [video.metrics for video in evaluated],
                    [len(video.truth) for video in evaluated],
                )
                report["protocol"] = published(rows, frames, sets.values)
            _write_csv(evaluated, folder / "videos.csv")
            write_image(contact_sheet(evaluated), folder / "sheet.png")
            with atomic_write(folder / "evaluation.json") as partial:
                partial.write_text(json.dumps(report, indent=2) + "\n")
        run.metrics({key: value for key, value in metrics.items() if np.isfinite(value)})
        # At their final location, where they stay until they are delivered.
        for file in ("evaluation.json", "videos.csv", "sheet.png"):
            run.file(f"{out}/{file}")
        run.file(f"{out}/videos", "videos")
    print(table(metrics))
    if lines := unavailable_lines(sets.unavailable, settings["evaluate"]["networks"]):
        print(lines)
    if "protocol" in report:
        print(protocol_lines(report["protocol"]))
    print(f"{len(evaluated)} videos, {report['frames']} frames; results: {out}")
    return report


def _reconstruct_all(
    paths: list[str], pipe: TCANPipeline, scorer: PoseDetector, folder: Path, config: Config
) -> tuple[list[Evaluated], list[dict[str, str]]]:
    """Reconstruct the videos and write the comparisons to the folder; returns also the sources without a result."""
    evaluated: list[Evaluated] = []
    rejected = []
    for number, name in enumerate(progress(paths, "video", len(paths))):
        try:
            path = _local_video(name)
            evaluated.append(reconstruct(pipe, scorer, path, config, number))
        except UserError as error:
            rejected.append({"source": name, "reason": str(error)})
            print(f"skipped: {error}", flush=True)
            continue
        write_comparison(evaluated[-1], folder / f"{len(evaluated) - 1:03d}-{path.stem}.mp4")
    return evaluated, rejected


def _local_video(name: str) -> Path:
    """Local path of a video; downloads it, its true keypoints and its region labels from a bucket."""
    if storage.is_remote(name):
        for suffix in (".json", REGIONS_SUFFIX):
            other = str(PurePosixPath(name).with_suffix(suffix)).replace(":/", "://", 1)
            if storage.exists(other):
                local_input(other)
    return local_input(name)


def reconstruct(
    pipe: TCANPipeline, scorer: PoseDetector, path: Path, config: Config, number: int = 0
) -> Evaluated:
    """Animate the first frame of a video with the video's poses.

    Args:
        scorer: finds the joints in the result.
        number: of the video, for the seed of the pose errors.

    Raises:
        UserError: the video cannot be read or shows no person.
    """
    protocol = config.evaluate.protocol == "tiktok-disco"
    frames, fps = read_video(path, None if protocol else config.evaluate.frames)
    truth = np.stack([fit_image(frame, pipe.height, pipe.width) for frame in frames])
    true_poses = read_true_poses(path.with_suffix(".json"), pipe, len(truth))
    regions = read_regions(path.with_suffix(REGIONS_SUFFIX), len(truth), pipe.height, pipe.width)
    if config.evaluate.poses == "detected":
        poses = pipe.detect_poses(truth, str(path), config.animate.smoothing_window)
    elif true_poses is not None:
        poses = true_poses
    else:
        raise UserError(
            f"{path.with_suffix('.json')}: no such file; evaluate.poses = true requires the poses of each video"
        )
    driving = driving_poses(poses, pipe.height, config, number)
    frames_01, _ = pipe(
        truth[0],
        driving,
        sampling=config.animate,
        retarget="none",  # the poses already are the character's
        generator=torch.Generator().manual_seed(config.seed),
        decode_batch=config.animate.decode_batch,
        return_dict=False,
    )
    result = to_uint8(frames_01)
    people = scorer.detect(result)
    # Without gap filling: undetected joints count as misses.
    found = track_main_person(people, pipe.height, pipe.width)[:, BODY]
    scored = (at_protocol_size(result), at_protocol_size(frames)) if protocol else None
    drawn, joints = pipe.draw(driving), poses[:, BODY]
    return Evaluated(path, fps, truth, joints, drawn, result, found, true_poses, scored, regions)


def read_true_poses(path: Path, pipe: TCANPipeline, num_frames: int) -> np.ndarray | None:
    """Ground-truth keypoints `[F, 18, 3]` in pixels of the output, from a video's JSON file; None if it is missing.

    Raises:
        UserError: the file has another format or fewer frames.
    """
    if not path.is_file():
        return None
    truth = read_poses(path)
    if len(truth.people) < num_frames:
        raise UserError(
            f"{path}: {len(truth.people)} frames, but {num_frames} of the video are evaluated; "
            "add the missing poses, or delete the file"
        )
    nobody = np.zeros((18, 3), np.float32)
    poses = np.stack([people[0, BODY] if len(people) else nobody for people in truth.people[:num_frames]])
    return pipe.scale_poses(poses, truth.height or pipe.height, truth.width or pipe.width)


def compute_metrics(evaluated: list[Evaluated]) -> None:
    """Set each video's metrics and controls. Controls that need a second video are NaN if there is only one."""
    still_pose = mean_pose([video.poses for video in evaluated])
    references = np.stack([part_colours(video.truth[:1], video.poses[:1])[0] for video in evaluated])
    for i, video in enumerate(evaluated):
        height, width = video.truth.shape[1:3]
        m = video.metrics
        result, truth = video.pair
        m |= all_image_metrics(result, truth) | region_metrics(video.result, video.truth, video.poses)
        if len(truth) > 1:  # the first frame equals the still: PSNR inf
            still = np.broadcast_to(truth[:1], truth[1:].shape)
            m |= _suffixed(all_image_metrics(still, truth[1:]), "still")
            still = np.broadcast_to(video.truth[:1], video.truth[1:].shape)
            m |= _suffixed(region_metrics(still, video.truth[1:], video.poses[1:]), "still")
        if video.regions is not None:
            m |= labelled_metrics(video.result, video.truth, video.regions)

        m |= pose_metrics(video.found, video.poses, height)
        m |= _suffixed(
            pose_metrics(np.broadcast_to(still_pose, video.poses.shape), video.poses, height), "mean_pose"
        )
        other = evaluated[(i + 1) % len(evaluated)]
        common = min(len(other.found), len(video.poses))
        control = pose_metrics(other.found[:common], video.poses[:common], height)
        m |= _suffixed(control if other is not video else dict.fromkeys(control, float("nan")), "other")
        if video.true_poses is not None:
            m |= _suffixed(pose_metrics(video.found, video.true_poses, height), "true")

        mask = background_mask(video.poses, height, width)
        m["flicker"], m["flicker_source"] = flicker(video.result, mask), flicker(video.truth, mask)
        m["warping_error"] = warping_error(video.result)
        m["warping_error_source"] = warping_error(video.truth)

        colours = part_colours(video.result, video.poses)
        distances = np.stack([colour_distance(colours, reference) for reference in references])  # [N, F]
        others = np.delete(distances, i, axis=0)
        m["colour_distance"] = float(np.nanmean(distances[i]))
        single = not len(others)
        m["colour_distance_other"] = float("nan") if single else float(np.nanmean(others))
        m["identified"] = float("nan") if single else float((distances[i] < np.nanmin(others, axis=0)).mean())
        m["identified_chance"] = float("nan") if single else 1 / len(evaluated)


def labelled_metrics(result: np.ndarray, truth: np.ndarray, regions: np.ndarray) -> dict[str, float]:
    """The PSNR of the labelled regions, and that of the first frame as a still in the other frames."""
    metrics = labelled_region_metrics(result, truth, regions)
    if len(truth) > 1:
        still = np.broadcast_to(truth[:1], truth[1:].shape)
        metrics |= _suffixed(labelled_region_metrics(still, truth[1:], regions[1:]), "still")
    return metrics


def all_image_metrics(result: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """L1, PSNR and SSIM, and the same in the conventions of DisCo's scripts."""
    return image_metrics(result, truth) | {
        "l1_disco": l1_disco(result, truth),
        "ssim_disco": ssim_disco(result, truth),
        "psnr_uint8_overflow": psnr_uint8_overflow(result, truth),
    }


def compute_network_metrics(evaluated: list[Evaluated], networks: Networks) -> SetMetrics:
    """Add each video's metrics that need a network, and return those of the set of videos."""
    pairs = [video.pair for video in evaluated]
    images = image_similarities(pairs, networks)
    # At the model's size, that of the poses, also in a protocol.
    faces = face_similarities(
        [(video.result, video.found) for video in evaluated],
        [(video.truth, video.poses) for video in evaluated],
        networks,
    )
    for video, image_row, face_row in zip(evaluated, images, faces, strict=True):
        video.metrics |= video_metrics(video.pair, networks) | image_row | face_row
    sets = set_metrics(pairs, networks)
    if "face" in networks.loaded:
        sets.samples["face_similarity"] = int(sum(row["face_frames"] for row in faces))
    return sets


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the videos where it is defined (not NaN)."""
    result = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row and not np.isnan(row[key])]
        result[key] = float(np.mean(values)) if values else float("nan")
    return result


def contact_sheet(evaluated: list[Evaluated]) -> np.ndarray:
    """uint8 RGB with one row per video: the reference, then driving pose, truth and result at `SHEET_TIMES` times."""
    rows = []
    for video in evaluated[:SHEET_VIDEOS]:
        cells = [video.truth[0]]
        for time in np.linspace(0, len(video.truth) - 1, SHEET_TIMES + 1).round().astype(int)[1:]:
            cells += [video.drawn[time], video.truth[time], video.result[time]]
        rows.append(np.concatenate([_cell(image) for image in cells], axis=1))
    return np.concatenate(rows)


def write_comparison(video: Evaluated, path: Path) -> None:
    """Write a video with the columns reference, driving pose, truth and result."""
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
    with atomic_write(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, ["source", "frames", *columns], restval="")
        writer.writeheader()
        for video in evaluated:
            writer.writerow({"source": str(video.path), "frames": len(video.truth)} | video.metrics)


def _json_number(value: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if np.isfinite(value) else None
