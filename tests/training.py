"""Small clip datasets, configurations and recorded losses, for tests of training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file

from pipelines import tracking
from pipelines.config import Config
from pipelines.config.parser import load_config
from pipelines.dataset import CLIP_SCHEMA, SCHEMA_VERSION, clip_files
from pipelines.dataset_index import INDEX_FILE, WRITER_OPTIONS, write_index
from pipelines.preprocess.shards import ShardWriter, write_info
from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler

SIZE = 64


def write_dataset(
    folder: Path,
    videos: dict[str, list[tuple[int, int]]],
    height: int,
    width: int,
    vae: str = "",
    buckets: dict[str, tuple[int, int]] | None = None,
) -> Path:
    """Write a dataset whose latents encode frame, video and spatial position.

    Channels: 0 frame index, 1 video index, 2 row, 3 column. The variance is negligible. The reference latent has frame
    index -1.

    Args:
        videos: for each name, its clips as (first frame, number of frames).
        buckets: height and width of each video, instead of `height` and `width`.
    """
    clips = []
    for number, (name, spans) in enumerate(videos.items()):
        height, width = buckets[name] if buckets else (height, width)
        rows, columns = np.mgrid[: height // 8, : width // 8]
        for start, length in spans:
            shape = (length, *rows.shape)
            frames = np.broadcast_to(np.arange(start, start + length)[:, None, None], shape)
            origin = [np.broadcast_to(part, shape) for part in (number, rows, columns)]
            mean = np.stack([frames, *origin], axis=1).astype("<f2")
            reference = mean[0].copy()
            reference[0] = -1
            keypoints = np.zeros((length, 18, 3), "<f4")
            keypoints[:, 1] = (width / 2, height / 2, 1)  # neck
            keypoints[:, 2] = (width / 2 - 15, height / 2 + 5, 1)  # right shoulder
            clips.append(
                {
                    "clip_id": f"{name}-{start:06d}", "video_id": name, "source": name, "split": "train", "start": start,
                    "num_frames": length, "fps": 8.0, "height": height, "width": width, "crop": [0, 0, width, height],
                    "latent_mean": mean.tobytes(), "latent_logvar": np.full_like(mean, -30).tobytes(),
                    "keypoints": keypoints.tobytes(), "reference_latent_mean": reference.tobytes(),
                    "reference_keypoints": keypoints[0].tobytes(),
                }
            )  # fmt: skip
    (folder / "clips").mkdir(parents=True)
    writer = ShardWriter(str(folder), {}, 1 << 30, 1e9)
    middle = len(clips) // 2
    for part in filter(None, (clips[middle:], clips[:middle])):
        writer.add_video(dict.fromkeys(CLIP_SCHEMA.names) | clip for clip in part)
        writer.commit()
    files = {file.removeprefix(f"{folder}/"): 0 for file in clip_files(folder)}
    info = {
        "schema_version": SCHEMA_VERSION, "counts": {}, "files": files, "height": height, "width": width, "clip_frames": 16, "fps": 8,
        "vae_fingerprint": vae, "vae_scaling_factor": 0.5, "pose_fingerprint": "", "settings": {}, "mlflow_run_id": None,
    }  # fmt: skip
    if buckets:
        info |= {"height": None, "width": None, "buckets": sorted(set(buckets.values()))}
    write_info(str(folder), info)
    return folder


def changed_clips(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every row of a dataset, and write the changed rows back to the files."""
    tables = {path: pq.read_table(path).to_pylist() for path in (folder / "clips").glob("*.parquet")}
    for path, rows in sorted(tables.items(), key=lambda item: item[1][0]["clip_id"]):
        yield from rows
        pq.write_table(pa.Table.from_pylist(rows, CLIP_SCHEMA), path, **WRITER_OPTIONS)
    (folder / INDEX_FILE).unlink()
    write_index(str(folder))


def make_sampler(
    dataset: Path, stage: int, seed: int = 0, batch_size: int = 4, size: int | None = SIZE
) -> Sampler:
    return Sampler(
        ClipStore(dataset), stage, seed=seed, batch_size=batch_size, size=size, vae_scaling_factor=0.5, stick_width=2,
        frames=16, drop_reference=0.1,
    )  # fmt: skip


def encoded_value(latents, channel: int) -> int:
    """Value that `write_dataset` encoded in a channel; the latents are scaled by 0.5."""
    return round(float(latents[channel].mean()) * 2)


STEPS = {1: 12, 2: 4}


def arguments(pretrained: Path, folder: Path, *more: str) -> list[str]:
    keys = {
        "size": SIZE, "tracking.folder": folder / "mlflow", "train.log_every": 3, "train.workers": 2, "train.clip_frames": 8,
        **{f"pretrained.{part}": pretrained for part in ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")},
        "train.stage1.steps": STEPS[1], "train.stage1.checkpoint_every": 3, "train.stage1.sample_every": 0,
        "train.stage2.steps": STEPS[2], "train.stage2.checkpoint_every": 2, "train.stage2.sample_every": 4,
        "train.stage1.validate_every": 6, "train.stage2.validate_every": 4, "train.validation_samples": 3,
        **{f"train.stage{n}.batch_size": 4 for n in (1, 2)}, **{f"train.stage{n}.micro_batch": 2 for n in (1, 2)},
    }  # fmt: skip
    return [*(f"--{key}={value}" for key, value in keys.items()), *more]


def make_config(pretrained: Path, folder: Path, *more: str) -> Config:
    return load_config(*arguments(pretrained, folder, *more))


def weights(model: Path) -> dict[str, bytes]:
    """Raw bytes of each tensor, by part/tensor name."""
    return {
        f"{path.parent.name}/{name}": tensor.numpy().tobytes()
        for path in model.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def losses(config: Config, out: Path, stage: int, key: str = "loss") -> dict[int, list[float]]:
    """All recorded values of a metric in the MLflow run of a stage, by step, in ascending order of steps.

    The history of MLflow is in the order of arrival.
    """
    from mlflow import MlflowClient

    run_id = json.loads((out / f"stage{stage}" / "run.json").read_text())["mlflow_run_id"]
    history = MlflowClient(tracking.resolve_uri(config.tracking)).get_metric_history(run_id, key)
    values: dict[int, list[float]] = {}
    for metric in history:
        values.setdefault(metric.step, []).append(metric.value)
    return dict(sorted(values.items()))
