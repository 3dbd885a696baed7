"""Stage 5, shards: clips -> whole videos -> Parquet files, each video exactly once.

There is no other record of what is done than the files themselves: a shard holds whole videos only, appears under its
name when it is complete, and never changes. So a job may die at any moment; the next one reads which videos are in
`clips/` and `rejected/` and goes on with the others.
"""

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.dataset import (
    CLIP_SCHEMA,
    CLIPS_FOLDER,
    DUPLICATE,
    IDENTITY_KEY,
    INFO_FILE,
    REJECTED_FOLDER,
    REJECTED_SCHEMA,
    clip_files,
    file_name,
    rejected_files,
)
from pipelines.preprocess.pose import main_person, person_height, unpack_people
from pipelines.preprocess.sources import Source
from tcan.errors import UserError

ROW_GROUP_BYTES = (
    2 * 2**20
)  # a training sample reads one row group: small, yet large enough for a request to S3
FILES_AT_ONCE = 16  # read, when a dataset is opened: a bucket answers slowly, but many at a time


# --- what is there ---------------------------------------------------------------------------------------------------


@dataclass
class Contents:
    """What a dataset's files hold."""

    kept: dict[str, str] = field(default_factory=dict)
    """video_id -> source."""
    rejected: dict[tuple[str, str | None], tuple[str, str]] = field(default_factory=dict)
    """(source, video_id) -> (stage, reason), the duplicates among them."""
    known: dict[tuple[str, str], str] = field(default_factory=dict)
    """(source, source_version) -> video_id: what need not be read to know its content."""
    files: dict[str, int] = field(default_factory=dict)
    """Name in the dataset's folder -> rows."""
    clips: int = 0
    frames: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """sources = videos + rejected + duplicates, always."""
        duplicates = sum(stage == DUPLICATE for stage, _ in self.rejected.values())
        return {
            "sources": len(self.kept) + len(self.rejected),
            "videos": len(self.kept),
            "clips": self.clips,
            "frames": self.frames,
            "rejected": len(self.rejected) - duplicates,
            "duplicates": duplicates,
        }

    def histogram(self) -> dict[str, int]:
        """How many sources were rejected for which reason, the most frequent first; numbers and names left out."""
        reasons = (
            DUPLICATE if stage == DUPLICATE else f"{stage}: {reason.split(':')[0]}"
            for stage, reason in self.rejected.values()
        )
        return dict(Counter(reasons).most_common())


def read_contents(folder: str, identity: Mapping[str, Any]) -> Contents:
    """Reads all files' metadata, and of each only the columns that say which videos it holds.

    Raises:
        UserError: a file was made with other settings or other models than `identity`, with the difference.
    """
    contents = Contents()
    columns = ["video_id", "source", "source_version", "num_frames"]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        clips, rejected = clip_files(folder), rejected_files(folder)
        for file, table in zip(
            clips, pool.map(lambda file: _read(file, columns, identity, folder), clips), strict=True
        ):
            contents.files[file[len(folder) + 1 :]] = len(table)
            contents.clips += len(table)
            contents.frames += int(np.sum(table["num_frames"]))
            for video_id, source, version, _ in zip(
                *(table[name].to_pylist() for name in columns), strict=True
            ):
                contents.kept[video_id] = source
                contents.known[source, version] = video_id
        for file, table in zip(
            rejected, pool.map(lambda file: _read(file, None, identity, folder), rejected), strict=True
        ):
            contents.files[file[len(folder) + 1 :]] = len(table)
            for row in table.to_pylist():
                contents.rejected[row["source"], row["video_id"]] = row["stage"], row["reason"]
                if row["video_id"] is not None:
                    contents.known[row["source"], row["source_version"]] = row["video_id"]
    return contents


def _read(file: str, columns: list[str] | None, identity: Mapping[str, Any], folder: str) -> pa.Table:
    try:
        with storage.open_parquet(file) as parquet:
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
            f"{file}: cannot be read ({storage.one_line(error)}); delete it, and its videos are made again"
        ) from None


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """Makes the dataset's folders, keeps other jobs from writing to it meanwhile, and clears what a killed job left.

    A bucket has no locks: there, that no other job is writing is the user's to see to.

    Raises:
        UserError: the folder cannot be made or written to, or another job is writing to it.
    """
    if storage.is_remote(folder):
        storage.check_bucket(folder)
        yield
        return
    local = Path(folder)
    with storage.mendable(folder):
        for part in (CLIPS_FOLDER, REJECTED_FOLDER):
            (local / part).mkdir(parents=True, exist_ok=True)
        lock = os.open(local, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the folder itself; ends with this process
        except BlockingIOError:
            raise UserError(
                f"{folder}: another preprocess is writing here; wait for it or give another OUT"
            ) from None
        with storage.mendable(folder):
            for leftover in [*local.glob(".*.partial"), *local.glob("*/.*.partial")]:
                leftover.unlink()
        yield
    finally:
        os.close(lock)


def write_info(folder: str, info: Mapping[str, Any]) -> None:
    """dataset.json, last of all."""
    storage.write(f"{folder}/{INFO_FILE}", json.dumps(info, indent=2).encode() + b"\n")


def forget_rejected(folder: str, identity: Mapping[str, Any], sources: set[str]) -> int:
    """Takes the rejections of these sources out of the dataset, so that they are tried again; returns how many.

    Duplicates stay. What is to stay is written before what is to go is deleted: a job that dies in between has lost
    nothing.
    """
    files = rejected_files(folder)
    if not files:
        return 0
    rows = pa.concat_tables(_read(file, None, identity, folder) for file in files).to_pylist()
    stay = [row for row in rows if row["stage"] == DUPLICATE or row["source"] not in sources]
    if len(stay) < len(rows):
        writer = ShardWriter(folder, identity, 0, 0)
        kept = writer.write(REJECTED_FOLDER, pa.Table.from_pylist(stay, REJECTED_SCHEMA)) if stay else None
        for file in files:
            if file != kept:
                storage.delete(file)
    return len(rows) - len(stay)


class ShardWriter:
    """Collects whole videos and rejections, and writes them in files of about `shard_bytes`, or after `seconds`, so that
    a slow job that dies has lost little."""

    def __init__(self, folder: str, identity: Mapping[str, Any], shard_bytes: int, seconds: float) -> None:
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

    def add_rejected(self, source: Source, stage: str, reason: str) -> None:
        self._rejected.append(
            {
                "source": source.path,
                "source_version": source.version,
                "video_id": source.video_id,
                "stage": stage,
                "reason": reason,
            }
        )
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
            self.write(CLIPS_FOLDER, pa.concat_tables(self._videos).cast(CLIP_SCHEMA))
            self._videos = []
        if self._rejected:
            self.write(REJECTED_FOLDER, pa.Table.from_pylist(self._rejected, REJECTED_SCHEMA))
            self._rejected = []
        self._last_commit = time.monotonic()

    def write(self, part: str, table: pa.Table) -> str:
        """Writes a file of the dataset and returns its name."""
        # While files are added the dataset is not whole.
        storage.delete(f"{self.folder}/{INFO_FILE}")
        rows = max(1, ROW_GROUP_BYTES * len(table) // max(1, table.nbytes))
        buffer = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata(self.metadata), buffer, compression="zstd", row_group_size=rows
        )
        content = buffer.getvalue()
        name = f"{self.folder}/{part}/{file_name(part, content)}"
        storage.write(name, content)
        return name


# --- clips -> videos -------------------------------------------------------------------------------------------------


class VideoAssembler:
    """Gathers the clips of each video, in whatever order they come, and hands on whole videos or rejections."""

    def __init__(
        self,
        writer: ShardWriter,
        sources: list[Source],
        *,
        size: int,
        min_person_share: float,
        min_person_height: float,
        validation_share: float,
    ) -> None:
        self.writer = writer
        self.sources = {source.video_id: source for source in sources}
        self.size = size
        self.min_person_share = min_person_share
        self.min_person_height = min_person_height
        self.validation_share = validation_share
        self.finished: set[str] = set()
        self._clips: dict[str, dict[int, dict[str, Any]]] = {}  # video -> start -> clip
        self._num_clips: dict[str, int] = {}

    def add(self, row: dict[str, Any]) -> str | None:
        """A row of ENCODED_SCHEMA. Returns "kept" or "rejected" when it completes its video, else None."""
        video_id = row["video_id"]
        if video_id in self.finished:  # clips of a video that was rejected for another clip
            return None
        if row["reason"] is not None:
            return self._reject(video_id, row["stage"], row["reason"])
        clips = self._clips.setdefault(video_id, {})
        if row["num_clips"] is not None:
            self._num_clips[video_id] = row["num_clips"]
        else:
            clips[row["start"]] = row
        if len(clips) != self._num_clips.get(video_id):
            return None
        in_order = [clips[start] for start in sorted(clips)]
        people = [
            frame for clip in in_order for frame in unpack_people(clip["people_per_frame"], clip["people"])
        ]
        keypoints, which = main_person(people, self.size)
        if reason := self._too_little(keypoints, which):
            return self._reject(video_id, "pose", reason)
        # A table a clip: one column of a long video's latents would pass the 2 GiB that a binary array may hold.
        rows = self._rows(in_order, keypoints, which)
        self.writer.add_video(pa.concat_tables(pa.Table.from_pylist([row], CLIP_SCHEMA) for row in rows))
        self._finish(video_id)
        return "kept"

    def _too_little(self, keypoints: np.ndarray, which: list[int]) -> str | None:
        share = float(np.mean(np.array(which) >= 0))
        if share < self.min_person_share:
            return f"no person: in {share:.0%} of the frames only, fewer than {self.min_person_share:.0%}"
        height = person_height(keypoints, self.size)
        if height < self.min_person_height:
            return f"person too small: {height:.0%} of the canvas's height, less than {self.min_person_height:.0%}"
        return None

    def _rows(
        self, clips: list[dict[str, Any]], keypoints: np.ndarray, which: list[int]
    ) -> list[dict[str, Any]]:
        first, video_id = clips[0], clips[0]["video_id"]
        shared = {
            "source_version": self.sources[video_id].version,
            "split": split_of(video_id, self.validation_share),
            "height": self.size,
            "width": self.size,
            "reference_latent_mean": first["latent_mean"][: len(first["latent_mean"]) // first["num_frames"]],
            "reference_keypoints": keypoints[0].tobytes(),
        }
        rows, at = [], 0
        for clip in clips:
            span = slice(at, at := at + clip["num_frames"])
            made = {
                "clip_id": f"{video_id}-{clip['start']:06d}",
                "keypoints": keypoints[span].tobytes(),
                "main_person": which[span],
            }
            rows.append({name: (clip | shared | made)[name] for name in CLIP_SCHEMA.names})
        return rows

    def _reject(self, video_id: str, stage: str, reason: str) -> str:
        self.writer.add_rejected(self.sources[video_id], stage, reason)
        self._finish(video_id)
        return "rejected"

    def _finish(self, video_id: str) -> None:
        self.finished.add(video_id)
        self._clips.pop(video_id, None)


def split_of(video_id: str, validation_share: float) -> str:
    """The id is a digest, so its digits are uniform: a video's split never changes as others come."""
    return "validation" if int(video_id, 16) < validation_share * 16 ** len(video_id) else "train"
