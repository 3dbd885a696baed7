"""`tcan preprocess VIDEOS OUT`: videos -> a clip dataset, on Ray Data.

    sources -> [decode: tasks] -> [pose and latents: actors] -> whole videos -> Parquet shards
    sources.py  decode.py          models.py, pose.py, latents.py  crop.py, shards.py

Clips stream through, so memory holds a few of them, not videos; latents wait on disk until their video is whole. Every
source ends as a video in `clips/` or as a row in `rejected/`; run again, the job does what is missing.
"""

import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
import ray.data
from tqdm import tqdm

from pipelines import storage, tracking
from pipelines.cluster import connect
from pipelines.config import Config
from pipelines.dataset import DUPLICATE, INFO_FILE, SCHEMA_VERSION, read_info
from pipelines.preprocess.decode import decode
from pipelines.preprocess.models import PoseAndLatents, load_models, load_part_detectors
from pipelines.preprocess.preview import contact_sheet
from pipelines.preprocess.quarantine import Quarantine, count_attempts
from pipelines.preprocess.shards import (
    Contents,
    ShardWriter,
    VideoAssembler,
    forget_rejected,
    read_contents,
    write_info,
    writing,
)
from pipelines.preprocess.sources import Source, identify, list_sources
from tcan.errors import UserError
from tcan.fingerprint import fingerprint

# Ray Data moves blocks. Small ones let the models begin while a video is still being decoded and keep what is in
# flight small; a square clip of 64 frames is 3 MiB at 128 px and 48 MiB (a block of its own) at 512.
BLOCK_BYTES = 16 * 2**20
MAX_BLOCKS = 10_000  # a video a task, as long as that is not too much for Ray's bookkeeping
# glibc is to keep what the networks free, whatever thread they run in. By default activations, megabytes each, go back to
# the kernel and come again page after zeroed page, at every layer: a sixth of a clip's time on a CPU.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
LINE_SECONDS = 10  # between two lines of progress in a log


def preprocess(
    videos: str, out: str, config: Config, *, limit: int = 0, retry_rejected: bool = False
) -> dict[str, Any]:
    """Adds what is not there yet of `videos` to the dataset `out`.

    videos: a folder, a glob pattern, a file or a list (.txt); see `sources.list_sources`. out: a folder. Both may be URIs
    in a bucket. limit: only so many of the sources, the first by name; 0: all. retry_rejected: try those again that were
    rejected before.

    Returns the summary: counts {sources, videos, clips, frames, rejected, duplicates} and reasons {reason: count} of the
    whole dataset; of this run new_videos, new_rejected, new_frames, seconds, frames_per_second.

    Raises:
        UserError: no videos there; not one of them usable; `out` cannot be written, is being written by another job, or
            holds a dataset of other settings or models.
    """
    began = time.monotonic()
    folder = storage.absolute(out)
    if not storage.is_remote(folder) and Path(folder).is_file():
        raise UserError(f"{out}: is a file; give a folder for the dataset")
    if folder == storage.absolute(videos):
        raise UserError(f"{out}: is the folder of the videos; give another one for the dataset")
    if limit < 0:
        raise UserError(f"--limit {limit}: must be at least 0, which takes all")
    paths = list_sources(videos)
    paths = paths[:limit] if limit else paths
    detector, vae = load_models(config.pretrained, "cpu")
    parts = load_part_detectors(
        config.pretrained.pose, config.preprocess.hands, config.preprocess.face, "cpu"
    )
    identity = dataset_identity(config, fingerprint(vae), detector.fingerprint)
    # Datasets without them have the identity that they had before there were any.
    identity |= {f"{name.removesuffix('s')}_fingerprint": part.fingerprint for name, part in parts.items()}

    with writing(folder):
        if retry_rejected and (retried := forget_rejected(folder, identity, set(paths))):
            print(f"{out}: {retried} rejected sources are tried again", flush=True)
        before = read_contents(folder, identity)
        sources = identify(paths, before.known)
        pending, rejected = plan(sources, before)
        if not pending and not rejected and _is_finished(folder):
            print(f"{out}: all {len(sources)} sources are done, nothing to add")
            return _summary(before, before, began)
        done = len(sources) - len(pending) - len(rejected)
        print(f"{out}: {len(sources)} sources, {done} of them done before", flush=True)
        taken = set(before.kept.values())
        if changed := sum(source.path in taken for source in pending):
            print(f"{out}: {changed} of them changed since then; their former clips stay too", flush=True)
        settings = config.preprocess
        writer = ShardWriter(folder, identity, settings.shard_megabytes * 2**20, settings.commit_seconds)
        name = folder.rpartition("/")[2]
        with tracking.run("preprocess", name, config.tracking, dataclasses.asdict(config)) as run:
            if pending:
                try:
                    _process(pending, writer, config, run)
                except KeyboardInterrupt:
                    print(f"{out}: stopped; the same command goes on", flush=True)
                    raise
            # After the videos: a job that dies must not leave a duplicate of what it never took.
            for source, stage, reason in rejected:
                writer.add_rejected(source, stage, reason)
            writer.commit()
            contents = read_contents(folder, identity)
            summary = _summary(contents, before, began)
            run.metrics({name: value for name, value in summary.items() if name != "reasons"})
            _check_not_empty(videos, contents)
            info = _info(config, identity, contents, vae.config.scaling_factor, run.id)
            write_info(folder, info)
            run.json(info, INFO_FILE)
            run.image(contact_sheet(folder, vae, config.train.stick_width), "clips.png")
    _print(out, summary)
    return summary


def _is_finished(folder: str) -> bool:
    try:
        return bool(read_info(folder))
    except UserError:
        return False


def _check_not_empty(videos: str, contents: Contents) -> None:
    if not contents.kept:
        first = [f"{path}: {stage}: {reason}" for (path, _), (stage, reason) in contents.rejected.items()][:3]
        raise UserError(f"{videos}: none of {len(contents.rejected)} sources can be used: {'; '.join(first)}")


def dataset_identity(config: Config, vae_fingerprint: str, pose_fingerprint: str) -> dict[str, Any]:
    """What all clips of a dataset have in common: whatever their numbers depend on, but nothing of how they are made."""
    settings = config.preprocess
    return {
        "schema_version": SCHEMA_VERSION,
        "canvas": config.canvas,
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
    """What there is to do: (videos to process, sources to reject at once with stage and reason).

    A source is done when it is in the dataset with the content it has now. Of equal contents the first is used, by the
    order of paths, and one that is in the dataset already goes before all.
    """
    first = {
        video_id: path
        for (path, video_id), (stage, _) in done.rejected.items()
        if video_id is not None and stage != DUPLICATE
    }
    first |= done.kept
    pending, rejected = [], []
    for source in sources:
        if (source.path, source.video_id) in done.rejected:
            continue
        if source.video_id is None:
            rejected.append((source, "list", source.problem or "cannot be read"))
        elif done.kept.get(source.video_id) == source.path:
            continue
        elif source.video_id in first:
            rejected.append((source, DUPLICATE, first[source.video_id]))
        else:
            first[source.video_id] = source.path
            pending.append(source)
    return pending, rejected


def _process(pending: list[Source], writer: ShardWriter, config: Config, run: tracking.Run) -> None:
    """Streams the videos through Ray and hands every one of them to the writer, kept or rejected."""
    settings = config.preprocess
    assembler = VideoAssembler(
        writer,
        pending,
        min_person_fraction=settings.min_person_fraction,
        min_person_height=settings.min_person_height,
        validation_fraction=settings.validation_fraction,
    )
    progress = _Progress(len(pending), run)
    try:
        with closing(encoded_clips(pending, config)) as rows:  # so that a failed job's actors end with it
            for row in rows:
                progress.add(row["num_frames"] or 0, assembler.add(row))
    finally:
        progress.close()
    lost = [source.path for source in pending if source.video_id not in assembler.finished]
    if lost:
        raise RuntimeError(f"{len(lost)} videos went in and did not come out, such as {lost[:3]}")


def encoded_clips(pending: list[Source], config: Config) -> Generator[dict[str, Any], None, None]:
    """The Ray Data pipeline: rows of ENCODED_SCHEMA, in no order, as they are ready.

    A process or machine that dies is replaced and what it worked on is done again, by Ray, without a limit; a clip that
    the models' process dies at every time is found by `Quarantine`. Ray Data's limits are no help: its operators can be
    fused only with the same options, and a task has none for an actor's retries; a block beyond its retries is dropped
    without a word of which videos were in it.
    """
    connect()
    settings = config.preprocess
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
    # Where the cluster has GPUs, the models are where the time goes: as many actors as the GPUs hold. Decoders are tasks
    # on all CPUs that are left, on whatever machine, since one decoder is too slow for a GPU when videos are large.
    # Without GPUs, an actor a CPU. Decode and models then ask for the same resources, so Ray Data fuses them: an actor
    # reads from its own decoder process, which works on the next clip meanwhile, and no frame enters the object store.
    num_gpus = settings.gpus_per_actor if gpus else 0.0
    actors = max(1, int(gpus / num_gpus if num_gpus else cpus))
    # One CPU for an actor (it feeds its GPU, or is all it has) and for a decoder (it runs with one thread); less
    # where there are not enough for all actors and one decoder, for without it none of them gets on.
    num_cpus = min(1.0, cpus / (actors + 1)) if num_gpus else min(1.0, cpus)

    environment = {"env_vars": ALLOCATOR}  # of both: what differs in it is not fused
    models = functools.partial(
        PoseAndLatents,
        pretrained=config.pretrained,
        batch_frames=settings.batch_frames,
        device="cuda" if num_gpus else "cpu",
        hands=settings.hands,
        face=settings.face,
    )
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with ray.data.DataContext.current(context):
        items = [{"video_id": source.video_id, "source": source.path} for source in pending]
        clips = (
            ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS))
            .map_batches(
                functools.partial(
                    decode,
                    canvas=config.canvas,
                    whole=settings.crop == "person",
                    timeout=settings.decode_timeout,
                    clip_frames=settings.clip_frames,
                    min_clip_frames=settings.min_clip_frames,
                    fps=settings.fps,
                    cut_threshold=settings.cut_threshold,
                    min_seconds=settings.min_seconds,
                    max_seconds=settings.max_seconds,
                ),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.TaskPoolStrategy(),
                num_cpus=num_cpus,
                runtime_env=environment,
            )
            .map_batches(
                Quarantine,
                fn_constructor_args=(models, count_attempts()),
                batch_size=1,  # a clip; the models take it in batches of frames
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    min_size=1, max_size=actors, initial_size=min(actors, len(items))
                ),
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                runtime_env=environment,
            )
        )
        for block in clips.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            yield from block.to_pylist()


class _Progress:
    """Videos, clips, frames/s and rejections: a bar on a terminal, a line now and then in a log, and in the run."""

    def __init__(self, videos: int, run: tracking.Run) -> None:
        self.run = run
        self.total = videos
        self.began = self.last = time.monotonic()
        self.videos = self.clips = self.frames = self.rejected = 0
        self.bar = tqdm(total=videos, unit="video", disable=not sys.stderr.isatty())

    def add(self, frames: int, outcome: str | None) -> None:
        """frames: of a clip; 0 for what is none."""
        self.frames += frames
        self.clips += frames > 0
        self.rejected += outcome == "rejected"
        if outcome is not None:
            self.videos += 1
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
                f"{self.rejected} rejected{self._left()}",
                flush=True,
            )

    def _left(self) -> str:
        if not self.videos or self.videos == self.total:
            return ""
        seconds = (time.monotonic() - self.began) / self.videos * (self.total - self.videos)
        return f", {seconds / 60:.0f} min left"

    def close(self) -> None:
        self.bar.close()
        self._report()


def _summary(contents: Contents, before: Contents, began: float) -> dict[str, Any]:
    seconds = time.monotonic() - began
    frames = contents.frames - before.frames
    return contents.counts | {
        "new_videos": len(contents.kept) - len(before.kept),
        "new_rejected": len(contents.rejected) - len(before.rejected),
        "new_frames": frames,
        "seconds": seconds,
        "frames_per_second": frames / seconds,
        "reasons": contents.histogram(),
    }


def _info(
    config: Config, identity: dict[str, Any], contents: Contents, vae_scaling_factor: float, run_id: str
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "counts": contents.counts,
        "files": contents.files,
        "identity": identity,
        "height": config.canvas,
        "width": config.canvas,
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
        f"of {summary['sources']} sources so far {summary['rejected']} rejected, {summary['duplicates']} duplicates; "
        f"this run: {summary['new_videos']} videos, {summary['new_frames']} frames in {summary['seconds']:.0f} s"
    )
    width = max(map(len, summary["reasons"]), default=0)
    for reason, count in summary["reasons"].items():
        print(f"  {reason:{width}}  {count:6d}  {'#' * min(40, count)}")
