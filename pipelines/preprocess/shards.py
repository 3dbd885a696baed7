"""Stage 5, shards: clips -> whole videos -> Parquet files, each video exactly once.

There is no other record of what is done than the files themselves: a shard holds whole videos only, appears under its
name when it is complete, and never changes. So a job may die at any moment; the next one reads which videos are in
`clips/` and `rejected/` and goes on with the others.
"""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dataset import (
    CLIP_SCHEMA,
    CLIPS_FOLDER,
    INFO_FILE,
    REJECTED_FOLDER,
    REJECTED_SCHEMA,
    clip_files,
    rejected_files,
)
from pipelines.preprocess.pose import main_person, unpack_people
from tcan.errors import UserError

IDENTITY_KEY = b"tcan.dataset"  # in each file's metadata: the settings and fingerprints that made it
ROW_GROUP_BYTES = (
    2 * 2**20
)  # a training sample reads one row group: small, yet large enough for a request to S3
# What the person who started the job can mend: the disk is full, over quota, read-only or not theirs.
MENDABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


# --- what is there ---------------------------------------------------------------------------------------------------


@dataclass
class Contents:
    """What a dataset's files hold."""

    kept: dict[str, str] = field(default_factory=dict)
    """video_id -> source."""
    rejected: dict[tuple[str, str | None], tuple[str, str]] = field(default_factory=dict)
    """(source, video_id) -> (stage, reason)."""
    clips: int = 0
    frames: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """sources = videos + rejected, always."""
        videos, rejected = len(self.kept), len(self.rejected)
        return {
            "sources": videos + rejected,
            "videos": videos,
            "clips": self.clips,
            "frames": self.frames,
            "rejected": rejected,
        }

    def histogram(self) -> dict[str, int]:
        """How many sources were rejected for which reason, the most frequent first; numbers and names left out."""
        reasons = (
            f"{stage}: {reason.split(':')[0].split(' of ')[0]}" for stage, reason in self.rejected.values()
        )
        return dict(Counter(reasons).most_common())


def read_contents(folder: Path, identity: Mapping[str, Any]) -> Contents:
    """Reads all files' metadata, and of each only the columns that say which videos it holds.

    Raises:
        UserError: a file was made with other settings or other models than `identity`, with the difference.
    """
    contents = Contents()
    for file in clip_files(folder):
        table = _read(file, ["video_id", "source", "num_frames"], identity, folder)
        contents.clips += len(table)
        contents.frames += int(np.sum(table["num_frames"]))
        contents.kept |= dict(zip(table["video_id"].to_pylist(), table["source"].to_pylist(), strict=True))
    for file in rejected_files(folder):
        for row in _read(file, None, identity, folder).to_pylist():
            contents.rejected[row["source"], row["video_id"]] = row["stage"], row["reason"]
    return contents


def _read(file: Path, columns: list[str] | None, identity: Mapping[str, Any], folder: Path) -> pa.Table:
    try:
        with pq.ParquetFile(file) as parquet:
            made_with = json.loads((parquet.schema_arrow.metadata or {}).get(IDENTITY_KEY, b"{}"))
            if made_with != identity:
                keys = sorted(k for k in {*made_with, *identity} if made_with.get(k) != identity.get(k))
                difference = ", ".join(f"{k} {made_with.get(k)}, not {identity.get(k)}" for k in keys)
                raise UserError(
                    f"{folder}: was made with {difference}; give another OUT, or the same settings"
                )
            return parquet.read(columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{file}: cannot be read ({_one_line(error)}); delete it, and its videos are made again"
        ) from None


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the dataset's folders, keeps other jobs from writing to it meanwhile, and clears what a killed job left.

    Raises:
        UserError: the folder cannot be made or written to, or another job is writing to it.
    """
    with _mendable(folder):
        for part in (CLIPS_FOLDER, REJECTED_FOLDER):
            (folder / part).mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the folder itself; ends with this process
        except BlockingIOError:
            raise UserError(
                f"{folder}: another preprocess is writing here; wait for it or give another OUT"
            ) from None
        with _mendable(folder):
            for leftover in [*folder.glob(".*.partial"), *folder.glob("*/.*.partial")]:
                leftover.unlink()
        yield
    finally:
        os.close(lock)


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """A temporary path beside the target that becomes the target when the block ends well, and is removed otherwise.

    Raises:
        UserError: the disk is full, or the folder is not to be written to.
    """
    partial = target.with_name(f".{target.name}.partial")
    with _mendable(target):
        try:
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _mendable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        reason = os.strerror(error.errno).lower()
        raise UserError(
            f"{path}: cannot be written: {reason}; make room there or give another OUT, and run again"
        ) from None


def write_info(folder: Path, info: Mapping[str, Any]) -> None:
    """dataset.json, last of all."""
    with atomic(folder / INFO_FILE) as partial:
        partial.write_text(json.dumps(info, indent=2) + "\n")


class ShardWriter:
    """Collects whole videos and rejections, and writes them in files of about `shard_bytes`, or after `seconds`, so that
    a slow job that dies has lost little."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], shard_bytes: int, seconds: float) -> None:
        self.folder = folder
        self.metadata = {IDENTITY_KEY: json.dumps(identity).encode()}
        self.shard_bytes = shard_bytes
        self.seconds = seconds
        self._videos: list[pa.Table] = []
        self._rejected: list[dict[str, Any]] = []
        self._last_commit = time.monotonic()

    def add_video(self, clips: pa.Table) -> None:
        """All clips of one video, rows of CLIP_SCHEMA."""
        self._videos.append(clips)
        self._commit_when_due()

    def add_rejected(self, source: str, video_id: str | None, stage: str, reason: str) -> None:
        self._rejected.append({"source": source, "video_id": video_id, "stage": stage, "reason": reason})
        self._commit_when_due()

    def _commit_when_due(self) -> None:
        waited = time.monotonic() - self._last_commit
        if waited >= self.seconds or sum(video.nbytes for video in self._videos) >= self.shard_bytes:
            self.commit()

    def commit(self) -> None:
        """Writes what has been collected.

        Raises:
            UserError: it cannot be written; each file is whole or not there.
        """
        if self._videos:
            self._write(CLIPS_FOLDER, pa.concat_tables(self._videos), CLIP_SCHEMA, "video_id")
            self._videos = []
        if self._rejected:
            self._write(REJECTED_FOLDER, pa.Table.from_pylist(self._rejected), REJECTED_SCHEMA, "source")
            self._rejected = []
        self._last_commit = time.monotonic()

    def _write(self, part: str, table: pa.Table, schema: pa.Schema, key: str) -> None:
        # While files are added the dataset is not whole.
        with _mendable(self.folder):
            (self.folder / INFO_FILE).unlink(missing_ok=True)
        table = table.cast(schema).replace_schema_metadata(self.metadata)
        # Named by its contents: two files never hold the same video, so never have the same name.
        digest = hashlib.sha256("\n".join(map(str, table[key].to_pylist())).encode()).hexdigest()[:16]
        rows = max(1, ROW_GROUP_BYTES * len(table) // max(1, table.nbytes))
        with atomic(self.folder / part / f"{part}-{digest}.parquet") as partial:
            pq.write_table(table, partial, compression="zstd", row_group_size=rows)


# --- clips -> videos -------------------------------------------------------------------------------------------------


class VideoAssembler:
    """Gathers the clips of each video, in whatever order they come, and hands on whole videos or rejections."""

    def __init__(
        self, writer: ShardWriter, size: int, min_person_share: float, validation_share: float
    ) -> None:
        self.writer = writer
        self.size = size
        self.min_person_share = min_person_share
        self.validation_share = validation_share
        self.finished: set[str] = set()
        self._clips: dict[str, list[dict[str, Any]]] = {}

    def add(self, row: dict[str, Any]) -> str | None:
        """A row of ENCODED_SCHEMA. Returns "kept" or "rejected" when it completes its video, else None."""
        video_id = row["video_id"]
        if video_id in self.finished:  # clips of a video that was rejected for another clip
            return None
        if row["reason"] is not None:
            return self._reject(row, row["stage"], row["reason"])
        clips = self._clips.setdefault(video_id, [])
        clips.append(row)
        if len(clips) < row["num_clips"]:
            return None
        clips.sort(key=lambda clip: clip["start"])
        people = [
            frame for clip in clips for frame in unpack_people(clip["people_per_frame"], clip["people"])
        ]
        keypoints, share = main_person(people, self.size)
        if share < self.min_person_share:
            reason = f"no person: in {share:.0%} of the frames only, fewer than {self.min_person_share:.0%}"
            return self._reject(row, "pose", reason)
        # A table a clip: one column of a long video's latents would pass the 2 GiB that a binary array may hold.
        rows = self._rows(clips, keypoints)
        self.writer.add_video(pa.concat_tables(pa.Table.from_pylist([row], CLIP_SCHEMA) for row in rows))
        self._finish(video_id)
        return "kept"

    def _rows(self, clips: list[dict[str, Any]], keypoints: np.ndarray) -> list[dict[str, Any]]:
        first, video_id = clips[0], clips[0]["video_id"]
        # The id is a digest, so its digits are uniform: a video's split never changes as others come.
        split = "validation" if int(video_id, 16) < self.validation_share * 16 ** len(video_id) else "train"
        shared = {
            "split": split,
            "height": self.size,
            "width": self.size,
            "reference_latent_mean": first["latent_mean"][: len(first["latent_mean"]) // first["num_frames"]],
            "reference_keypoints": keypoints[0].tobytes(),
        }
        ends = np.cumsum([clip["num_frames"] for clip in clips])
        rows = []
        for clip, poses in zip(clips, np.split(keypoints, ends[:-1]), strict=True):
            made = {"clip_id": f"{video_id}-{clip['start']:06d}", "keypoints": poses.tobytes()}
            rows.append({name: (clip | shared | made)[name] for name in CLIP_SCHEMA.names})
        return rows

    def _reject(self, row: dict[str, Any], stage: str, reason: str) -> str:
        self.writer.add_rejected(row["source"], row["video_id"], stage, reason)
        self._finish(row["video_id"])
        return "rejected"

    def _finish(self, video_id: str) -> None:
        self.finished.add(video_id)
        self._clips.pop(video_id, None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
