"""`tcan preprocess VIDEOS OUT`: videos -> a clip dataset, on Ray Data.

    sources -> [decoding: tasks] -> [pose and latents: actors] -> complete videos -> Parquet files
    sources.py  decode.py            models.py, pose.py, latents.py  assembly.py       shards.py

`ray_pipeline.py` runs the two operators in brackets. Clips are streamed, so memory holds a few clips and no videos; latents
are stored on disk until their video is complete. Every source becomes a video in `clips/` or a row in `rejected/`. Rerun the
job to process the missing sources.
"""

import dataclasses
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from pipelines import storage, tracking
from pipelines.cluster import connect
from pipelines.config import Config
from pipelines.dataset import DUPLICATE, INFO_FILE, SCHEMA_VERSION, read_info
from pipelines.dataset_index import read_index
from pipelines.gauges import PreprocessingCounters
from pipelines.preprocess.assembly import VideoAssembler
from pipelines.preprocess.models import load_models
from pipelines.preprocess.preview import contact_sheet
from pipelines.preprocess.ray_pipeline import encoded_clips
from pipelines.preprocess.shards import (
    Contents,
    ShardWriter,
    forget_rejected,
    read_contents,
    write_info,
    writing,
)
from pipelines.preprocess.sources import Source, identify, list_sources
from pipelines.progress import LINE_SECONDS, time_left
from tcan.errors import UserError
from tcan.fingerprint import fingerprint


def preprocess(
    videos: str, out: str, config: Config, *, limit: int = 0, retry_rejected: bool = False
) -> dict[str, Any]:
    """Add the videos that are not in the dataset yet.

    Args:
        videos: a folder, a glob pattern, a file or a list (.txt), locally or in a bucket; see `sources.list_sources`.
        out: the dataset: a folder or the URI of a folder in a bucket.
        config: the configuration.
        limit: use the first N sources by name; 0 uses all.
        retry_rejected: process sources again that were rejected before.

    Returns:
        Summary of the dataset: counts {sources, videos, clips, frames, rejected, duplicates} and reasons {reason: count};
        of this run: new_videos, new_rejected, new_frames, seconds, frames_per_second.

    Raises:
        UserError: there are no videos, or none is usable; `out` cannot be written, another job is writing to it, or it was
            created with other settings or models.
    """
    began = time.monotonic()
    folder = _check_out(videos, out)
    if limit < 0:
        raise UserError(f"--limit {limit}: must be at least 0; 0 uses all sources")
    paths = list_sources(videos)
    paths = paths[:limit] if limit else paths
    detector, vae = load_models(config.pretrained, "cpu", config.preprocess.hands, config.preprocess.face)
    identity = dataset_identity(config, fingerprint(vae), detector.fingerprint)
    # These keys exist only if the parts are enabled, so that the identity of datasets without them is stable.
    identity |= {"precision": config.preprocess.precision} if config.preprocess.precision != "fp32" else {}
    identity |= {"people": config.preprocess.people} if config.preprocess.people != "main" else {}
    identity |= {f"{name}_fingerprint": part for name, part in detector.part_fingerprints.items()}

    with writing(folder):
        if retry_rejected and (retried := forget_rejected(folder, identity, set(paths))):
            print(f"{out}: {retried} rejected sources will be processed again", flush=True)
        before = read_contents(folder, identity)
        sources = identify(paths, before.known)
        pending, rejected = plan(sources, before)
        if not pending and not rejected and _is_finished(folder):
            print(f"{out}: all {len(sources)} sources are done, nothing to add")
            return _summary(before, before, began)
        done = len(sources) - len(pending) - len(rejected)
        print(f"{out}: {len(sources)} sources, {done} already done", flush=True)
        existing = set(before.videos.values())
        if changed := sum(source.path in existing for source in pending):
            print(
                f"{out}: {changed} changed sources; clips of their earlier versions remain in the dataset",
                flush=True,
            )
        name = folder.rpartition("/")[2]
        with tracking.run("preprocess", name, config.tracking, dataclasses.asdict(config), folder) as run:
            _write(folder, out, identity, pending, rejected, config, run)
            contents = read_contents(folder, identity)
            summary = _summary(contents, before, began)
            run.metrics({name: value for name, value in summary.items() if name != "reasons"})
            _check_not_empty(videos, contents)
            info = _info(config, identity, contents, vae.config.scaling_factor, run.id)
            write_info(folder, info)
            run.json(info, INFO_FILE)
            run.image(_contact_sheet(folder, vae, config), "clips.png")
    _print(out, summary)
    return summary


def _contact_sheet(folder: str, vae: AutoencoderKL, config: Config) -> np.ndarray:
    """The contact sheet, decoded on a GPU of the cluster if there is one: at SD1.5 size a CPU takes minutes for it."""
    gpus = ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0
    if not gpus or config.preprocess.device == "cpu":
        return contact_sheet(folder, vae, config.train.stick_width)

    def decode_on_gpu(vae: AutoencoderKL) -> np.ndarray:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return contact_sheet(folder, vae.to(device), config.train.stick_width)

    fraction = min(gpus, config.preprocess.gpus_per_actor)
    return ray.get(ray.remote(num_gpus=fraction)(decode_on_gpu).remote(vae))


def _check_out(videos: str, out: str) -> str:
    """Absolute path or URI of the dataset."""
    folder = storage.absolute(out)
    if not storage.is_remote(folder) and Path(folder).is_file():
        raise UserError(f"{out}: is a file; give a folder for the dataset")
    if folder == storage.absolute(videos):
        raise UserError(f"{out}: is the folder of the videos; give another folder for the dataset")
    return folder


def _write(
    folder: str,
    out: str,
    identity: dict[str, Any],
    pending: list[Source],
    rejected: list[tuple[Source, str, str]],
    config: Config,
    run: tracking.Run,
) -> None:
    """Process the pending sources and write them and the rejected ones to the dataset."""
    settings = config.preprocess
    writer = ShardWriter(folder, identity, settings.shard_megabytes * 2**20, settings.commit_seconds)
    if pending:
        try:
            _process(pending, writer, config, run)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
            print(f"{out}: interrupted; rerun the same command to resume", flush=True)
            raise
    # Rejections are written after the videos: if the job dies, no duplicate refers to a video that is missing.
    for source, step, reason in rejected:
        writer.add_rejected(source, step, reason)
    writer.commit()


def _is_finished(folder: str) -> bool:
    try:
        return bool(read_info(folder) and read_index(folder))
    except UserError:
        return False


def _check_not_empty(videos: str, contents: Contents) -> None:
    if not contents.videos:
        examples = [f"{path}: {step}: {reason}" for (path, _), (step, reason) in contents.rejected.items()]
        raise UserError(
            f"{videos}: none of {len(contents.rejected)} sources can be used: {', '.join(examples[:3])}; "
            "replace the videos or change the preprocess settings"
        )


def dataset_identity(config: Config, vae_fingerprint: str, pose_fingerprint: str) -> dict[str, Any]:
    """The identity that all clips of a dataset share: settings and models that affect their values.

    Settings that only affect how the clips are computed are excluded.
    """
    settings = config.preprocess
    if settings.buckets is None:
        sizes: dict[str, Any] = {"canvas": config.canvas}
    else:
        sizes = {"buckets": [f"{height}x{width}" for height, width in config.buckets]}
    return {
        "schema_version": SCHEMA_VERSION,
        **sizes,
        "crop": settings.crop,
        "clip_frames": settings.clip_frames,
        "min_clip_frames": settings.min_clip_frames,
        "fps": settings.fps,
        "cut_threshold": settings.cut_threshold,
        "min_seconds": settings.min_seconds,
        "max_seconds": settings.max_seconds,
        "min_person_fraction": settings.min_person_fraction,
        "min_person_height": settings.min_person_height,
        "validation_fraction": settings.validation_fraction,
        "vae_fingerprint": vae_fingerprint,
        "pose_fingerprint": pose_fingerprint,
    }


def plan(sources: list[Source], done: Contents) -> tuple[list[Source], list[tuple[Source, str, str]]]:
    """Return the sources to process, and the sources to reject immediately with step and reason.

    A source is done if the dataset contains it with its current content. Of several sources with the same content, the one
    in the dataset is used, otherwise the first by path.
    """
    first = {
        video_id: path
        for (path, video_id), (step, _) in done.rejected.items()
        if video_id is not None and step != DUPLICATE
    }
    first |= done.videos
    pending, rejected = [], []
    for source in sources:
        if (source.path, source.video_id) in done.rejected:
            continue
        if source.video_id is None:
            rejected.append((source, "list", source.problem or "cannot be read"))
        elif done.videos.get(source.video_id) == source.path:
            continue
        elif source.video_id in first:
            rejected.append((source, DUPLICATE, first[source.video_id]))
        else:
            first[source.video_id] = source.path
            pending.append(source)
    return pending, rejected


def _process(pending: list[Source], writer: ShardWriter, config: Config, run: tracking.Run) -> None:
    """Stream the videos through Ray and pass each of them to the writer as clips or as a rejection."""
    settings = config.preprocess
    assembler = VideoAssembler(
        writer,
        pending,
        min_person_fraction=settings.min_person_fraction,
        min_person_height=settings.min_person_height,
        validation_fraction=settings.validation_fraction,
        only_main=settings.people == "main",
    )
    connect()  # Ray exports only metrics that are set after its start
    counters = PreprocessingCounters(os.path.basename(writer.folder), len(pending))
    progress = _Progress(len(pending), run, counters)
    try:
        with closing(encoded_clips(pending, config)) as rows:  # closes the actors if the job fails
            for row in rows:
                progress.add(row["num_frames"] or 0, assembler.add(row))
    finally:
        progress.close()
    lost = [source.path for source in pending if source.video_id not in assembler.finished]
    if lost:
        raise RuntimeError(f"{len(lost)} videos were not returned by the pipeline, such as {lost[:3]}")


class _Progress:
    """Progress of videos, clips, frames/s and rejections: a bar on a terminal, otherwise log lines; also logged to MLflow
    and counted for Prometheus.
    """

    def __init__(self, videos: int, run: tracking.Run, counters: PreprocessingCounters) -> None:
        self.run, self.counters = run, counters
        self.total = videos
        self.began = self.last = time.monotonic()
        self.videos = self.clips = self.frames = self.rejected = 0
        self.bar = tqdm(total=videos, unit="video", disable=not sys.stderr.isatty())

    def add(self, frames: int, outcome: str | None) -> None:
        """frames: frames of a clip, or 0 for a row without a clip. outcome: return value of `VideoAssembler.add`."""
        self.frames += frames
        if frames:
            self.clips += 1
            self.counters.clip(frames)
        if outcome is not None:
            self.videos += 1
            self.rejected += outcome != "kept"
            self.counters.video(outcome)
            self.bar.set_postfix_str(
                f"{self.clips} clips, {self.frames_per_second:.0f} frames/s, {self.rejected} rejected"
            )
            self.bar.update()
        if time.monotonic() - self.last >= LINE_SECONDS:
            self._report()

    @property
    def frames_per_second(self) -> float:
        return self.frames / max(1e-9, time.monotonic() - self.began)

    def _report(self) -> None:
        self.last = time.monotonic()
        metrics = {
            "videos_done": self.videos,
            "clips_done": self.clips,
            "rejected_so_far": self.rejected,
            "stream_frames_per_second": self.frames_per_second,
        }
        self.run.metrics(metrics, step=self.videos)
        if self.bar.disable:
            print(
                f"{self.videos} of {self.total} videos, {self.clips} clips, {self.frames_per_second:.0f} frames/s, "
                f"{self.rejected} rejected{time_left(self.began, self.videos, self.total)}",
                flush=True,
            )

    def close(self) -> None:
        self.bar.close()
        self._report()


def _summary(contents: Contents, before: Contents, began: float) -> dict[str, Any]:
    seconds = time.monotonic() - began
    frames = contents.frames - before.frames
    return contents.counts | {
        "new_videos": len(contents.videos) - len(before.videos),
        "new_rejected": len(contents.rejected) - len(before.rejected),
        "new_frames": frames,
        "seconds": seconds,
        "frames_per_second": frames / seconds,
        "reasons": contents.histogram(),
    }


def _info(
    config: Config, identity: dict[str, Any], contents: Contents, vae_scaling_factor: float, run_id: str
) -> dict[str, Any]:
    buckets = None if config.preprocess.buckets is None else config.buckets
    return {
        "schema_version": SCHEMA_VERSION,
        "counts": contents.counts,
        "files": contents.files,
        "identity": identity,
        "height": config.canvas if buckets is None else None,
        "width": config.canvas if buckets is None else None,
        "buckets": buckets,
        "clip_frames": config.preprocess.clip_frames,
        "fps": config.preprocess.fps,
        "vae_fingerprint": identity["vae_fingerprint"],
        "vae_scaling_factor": vae_scaling_factor,
        "pose_fingerprint": identity["pose_fingerprint"],
        "settings": dataclasses.asdict(config.preprocess),
        "mlflow_run_id": run_id,
    }


def _print(out: str, summary: dict[str, Any]) -> None:
    print(
        f"{out}: {summary['videos']} videos in {summary['clips']} clips ({summary['frames']} frames), "
        f"{summary['rejected']} of {summary['sources']} sources rejected, {summary['duplicates']} duplicates; "
        f"this run: {summary['new_videos']} videos, {summary['new_frames']} frames in {summary['seconds']:.0f} s"
    )
    width = max(map(len, summary["reasons"]), default=0)
    for reason, count in summary["reasons"].items():
        print(f"  {reason:{width}}  {count:6d}  {'#' * min(40, count)}")
