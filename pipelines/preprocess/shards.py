"""Reading and writing of a dataset's Parquet files.

The files are the only record of progress. A file contains complete videos only, appears under its name when it is complete,
and never changes. So a job may die at any time: the next job reads which videos are in `clips/` and `rejected/`, and processes
the others.
"""

import io
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
    CLIPS_FOLDER,
    DUPLICATE,
    IDENTITY_KEY,
    INFO_FILE,
    REJECTED_FOLDER,
    REJECTED_SCHEMA,
    clip_files,
    clip_schema,
    file_name,
    rejected_files,
)
from pipelines.dataset_index import READ_THREADS, WRITER_OPTIONS, write_index
from pipelines.lock import locked
from pipelines.preprocess.sources import Source
from tcan.errors import UserError

ROW_GROUP_BYTES = 2 * 2**20  # memory of the writer, and size of a request of readers that read row groups


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Contents:
    """Index of the videos and sources in a dataset's files."""

    videos: dict[str, str] = field(default_factory=dict)
    """video_id -> source."""
    rejected: dict[tuple[str, str | None], tuple[str, str]] = field(default_factory=dict)
    """(source, video_id) -> (step, reason), including duplicates."""
    known: dict[tuple[str, str], str] = field(default_factory=dict)
    """(source, source_version) -> video_id: sources whose content need not be hashed again."""
    files: dict[str, int] = field(default_factory=dict)
    """File name relative to the dataset's folder -> number of rows."""
    clips: int = 0
    frames: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Counts, for which sources = videos + rejected + duplicates."""
        duplicates = sum(step == DUPLICATE for step, _ in self.rejected.values())
        return {
            "sources": len(self.videos) + len(self.rejected),
            "videos": len(self.videos),
            "clips": self.clips,
            "frames": self.frames,
            "rejected": len(self.rejected) - duplicates,
            "duplicates": duplicates,
        }

    def histogram(self) -> dict[str, int]:
        """Number of rejected sources per kind of reason, the most frequent first."""
        return dict(Counter(reason_kind(*rejected) for rejected in self.rejected.values()).most_common())


def reason_kind(step: str, reason: str) -> str:
    """The step that rejected a source, and the reason without the details after its colon."""
    return DUPLICATE if step == DUPLICATE else f"{step}: {reason.split(':')[0]}"


def read_contents(folder: str, identity: Mapping[str, Any]) -> Contents:
    """Read the metadata of all files, and only the columns that identify their videos.

    Raises:
        UserError: a file was created with other settings or models than `identity`; the message names the difference.
    """
    contents = Contents()
    columns = ["video_id", "source", "source_version", "num_frames"]
    clips, rejected = clip_files(folder), rejected_files(folder)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        tables = pool.map(lambda file: _read_clips(file, columns, identity, folder), clips)
        for file, table in zip(clips, tables, strict=True):
            contents.files[file[len(folder) + 1 :]] = len(table)
            contents.clips += len(table)
            contents.frames += int(np.sum(table["num_frames"]))
            for video_id, source, version, _ in zip(
                *(table[name].to_pylist() for name in columns), strict=True
            ):
                contents.videos[video_id] = source
                contents.known[source, version] = video_id
        tables = pool.map(lambda file: _read_rejected(file, identity, folder), rejected)
        for file, table in zip(rejected, tables, strict=True):
            contents.files[file[len(folder) + 1 :]] = len(table)
            for row in table.to_pylist():
                contents.rejected[row["source"], row["video_id"]] = row["step"], row["reason"]
                if row["video_id"] is not None:
                    contents.known[row["source"], row["source_version"]] = row["video_id"]
    return contents


def _read_clips(file: str, columns: list[str], identity: Mapping[str, Any], folder: str) -> pa.Table:
    with storage.open_parquet(file) as parquet:
        _check_identity(parquet, identity, folder)
        return parquet.read(columns)


def _read_rejected(file: str, identity: Mapping[str, Any], folder: str) -> pa.Table:
    with storage.open_parquet(file) as parquet:
        _check_identity(parquet, identity, folder)
        if missing := [name for name in REJECTED_SCHEMA.names if name not in parquet.schema_arrow.names]:
            raise UserError(
                f"{file}: no column {missing[0]}; delete the file and rerun tcan preprocess to regenerate it"
            )
        return parquet.read()


def _check_identity(parquet: pq.ParquetFile, identity: Mapping[str, Any], folder: str) -> None:
    actual = json.loads((parquet.schema_arrow.metadata or {}).get(IDENTITY_KEY, b"{}"))
    if actual != identity:
        keys = sorted(key for key in {*actual, *identity} if actual.get(key) != identity.get(key))
        difference = ", ".join(f"{key} {actual.get(key)}, not {identity.get(key)}" for key in keys)
        raise UserError(
            f"{folder}: created with {difference}; choose another OUT, or use the same settings and models"
        )


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """Create the dataset's folders, lock the dataset for the duration of the block, and delete leftovers of killed jobs.

    Raises:
        UserError: the folder cannot be created or written, or another job is writing to it.
    """
    with locked(folder, "preprocess"):
        if storage.is_remote(folder):
            yield
            return
        local = Path(folder)
        with storage.user_errors(folder):
            for part in (CLIPS_FOLDER, REJECTED_FOLDER):
                (local / part).mkdir(parents=True, exist_ok=True)
            _delete_partial(local)
        try:
            yield
        finally:
            _delete_partial(local)


def _delete_partial(folder: Path) -> None:
    """Delete incomplete files."""
    for leftover in [*folder.glob(".*.partial"), *folder.glob("*/.*.partial")]:
        leftover.unlink()


def write_info(folder: str, info: Mapping[str, Any]) -> None:
    """Write the index, then dataset.json, which marks the dataset as complete."""
    write_index(folder)
    storage.write(f"{folder}/{INFO_FILE}", json.dumps(info, indent=2).encode() + b"\n")


def forget_rejected(folder: str, identity: Mapping[str, Any], sources: set[str]) -> int:
    """Delete the rejections of these sources, so that they are processed again; return their number.

    Rejections as duplicates are kept. The remaining rejections are written before the old files are deleted, so a job that
    dies in between loses nothing.
    """
    files = rejected_files(folder)
    if not files:
        return 0
    rows = pa.concat_tables(_read_rejected(file, identity, folder) for file in files).to_pylist()
    remaining = [row for row in rows if row["step"] == DUPLICATE or row["source"] not in sources]
    if len(remaining) < len(rows):
        new_file = ShardWriter(folder, identity, 0, 0).write_rejected(remaining) if remaining else None
        for file in files:
            if file != new_file:
                storage.delete(file)
    return len(rows) - len(remaining)


class ShardWriter:
    """Writes complete videos and rejections to files.

    A file is committed when it reaches about `shard_bytes`, or after `seconds`, which limits the loss if the job dies. One
    row group of clips is in memory; earlier row groups are in a temporary file, which is renamed when it is committed.
    """

    def __init__(self, folder: str, identity: Mapping[str, Any], shard_bytes: int, seconds: float) -> None:
        self.folder = folder
        self.metadata = {IDENTITY_KEY: json.dumps(identity).encode()}
        self.schema = clip_schema(identity)
        self.shard_bytes = shard_bytes
        self.seconds = seconds
        self._shard: _Shard | None = None
        self._rejected: list[dict[str, Any]] = []
        self._last_commit = time.monotonic()

    def add_video(self, clips: Iterable[Mapping[str, Any]]) -> None:
        """Add all clips of one video. The iterable of rows of `schema` is consumed one row at a time.

        Raises:
            UserError: the clips cannot be written; their file is deleted.
        """
        with storage.user_errors(f"{self.folder}/{CLIPS_FOLDER}"):
            self._shard = self._shard or _Shard(self.folder, self.schema.with_metadata(self.metadata))
            for clip in clips:
                self._shard.add(clip)
        self._commit_when_due()

    def add_rejected(self, source: Source, step: str, reason: str) -> None:
        """Add a source without clips."""
        self._rejected.append(
            {
                "source": source.path,
                "source_version": source.version,
                "video_id": source.video_id,
                "step": step,
                "reason": reason,
            }
        )
        self._commit_when_due()

    def _commit_when_due(self) -> None:
        waited = time.monotonic() - self._last_commit
        if waited >= self.seconds or (self._shard and self._shard.bytes >= self.shard_bytes):
            self.commit()

    def commit(self) -> None:
        """Publish the collected videos and rejections.

        Raises:
            UserError: a file cannot be written; every published file is complete.
        """
        if self._shard:
            with storage.user_errors(f"{self.folder}/{CLIPS_FOLDER}"):
                file = self._shard.finish()
            self._publish(CLIPS_FOLDER, file)
            self._shard = None
        if self._rejected:
            self.write_rejected(self._rejected)
            self._rejected = []
        self._last_commit = time.monotonic()

    def write_rejected(self, rows: list[dict[str, Any]]) -> str:
        """Write a file of rows of REJECTED_SCHEMA; return its name."""
        table = pa.Table.from_pylist(rows, REJECTED_SCHEMA).replace_schema_metadata(self.metadata)
        file = storage.open_partial(f"{self.folder}/{REJECTED_FOLDER}")
        with storage.user_errors(f"{self.folder}/{REJECTED_FOLDER}"):
            pq.write_table(table, file, compression="zstd")
        return self._publish(REJECTED_FOLDER, file)

    def _publish(self, part: str, file: io.BufferedRandom) -> str:
        # The dataset is incomplete while files are added.
        storage.delete(f"{self.folder}/{INFO_FILE}")
        file.seek(0)
        name = f"{self.folder}/{part}/{file_name(part, file)}"
        storage.publish(file, name)
        return name


class _Shard:
    """A Parquet file of clips; all row groups except the last one are on disk."""

    def __init__(self, folder: str, schema: pa.Schema) -> None:
        self.file = storage.open_partial(f"{folder}/{CLIPS_FOLDER}")
        self.writer = pq.ParquetWriter(self.file, schema, **WRITER_OPTIONS)
        self.bytes = 0  # of all rows, written or buffered
        self._group: list[Mapping[str, Any]] = []
        self._group_bytes = 0

    def add(self, clip: Mapping[str, Any]) -> None:
        size = sum(len(value) for value in clip.values() if isinstance(value, bytes))
        if self._group_bytes + size > ROW_GROUP_BYTES:
            self._write_group()
        self._group.append(clip)
        self._group_bytes += size
        self.bytes += size

    def _write_group(self) -> None:
        if self._group:
            self.writer.write_table(pa.Table.from_pylist(self._group, self.writer.schema))
        self._group, self._group_bytes = [], 0

    def finish(self) -> io.BufferedRandom:
        """Write the last row group; return the complete file, open."""
        self._write_group()
        self.writer.close()
        return self.file
