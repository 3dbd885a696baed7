"""Stage 5, shards: clips -> whole videos -> Parquet files, each video exactly once.

There is no other record of what is done than the files themselves: a shard holds whole videos only, appears under its
name when it is complete, and never changes. So a job may die at any moment; the next one reads which videos are in
`clips/` and `rejected/` and goes on with the others.
"""

import fcntl
import io
import json
import os
import tempfile
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
from pipelines.preprocess.crop import Square, square_around
from pipelines.preprocess.pose import main_person, person_height, unpack_people
from pipelines.preprocess.sources import Source
from tcan.errors import UserError

ROW_GROUP_BYTES = (
    2 * 2**20
)  # a training sample reads one row group: small, yet large enough for a request to S3
LATENTS_IN_MEMORY = 4 * 2**20  # of a video that is not whole yet
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
    with storage.open_parquet(file) as parquet:
        made_with = json.loads((parquet.schema_arrow.metadata or {}).get(IDENTITY_KEY, b"{}"))
        if made_with != identity:
            keys = sorted(k for k in {*made_with, *identity} if made_with.get(k) != identity.get(k))
            difference = ", ".join(f"{k} {made_with.get(k)}, not {identity.get(k)}" for k in keys)
            raise UserError(f"{folder}: was made with {difference}; give another OUT, or the same settings")
        return parquet.read(columns)


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
            _clear(local)
        try:
            yield
        finally:
            _clear(local)
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    """Deletes the files that have not become whole."""
    for leftover in [*folder.glob(".*.partial"), *folder.glob("*/.*.partial")]:
        leftover.unlink()


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
        kept = ShardWriter(folder, identity, 0, 0).write_rejected(stay) if stay else None
        for file in files:
            if file != kept:
                storage.delete(file)
    return len(rows) - len(stay)


class ShardWriter:
    """Writes whole videos and rejections in files of about `shard_bytes`, or after `seconds`, so that a slow job that dies
    has lost little. Of the clips, a row group is in memory: the others are in a file that gets its name in the end."""

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
        """All clips of one video, rows of `schema`, taken one at a time.

        Raises:
            UserError: they cannot be written; nothing of their file is there then.
        """
        with storage.mendable(f"{self.folder}/{CLIPS_FOLDER}"):
            self._shard = self._shard or _Shard(self.folder, self.schema.with_metadata(self.metadata))
            for clip in clips:
                self._shard.add(clip)
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
        if waited >= self.seconds or (self._shard and self._shard.bytes >= self.shard_bytes):
            self.commit()

    def commit(self) -> None:
        """Gives the dataset what has been collected.

        Raises:
            UserError: it cannot be written; each file is whole or not there.
        """
        if self._shard:
            with storage.mendable(f"{self.folder}/{CLIPS_FOLDER}"):
                file = self._shard.finish()
            self._publish(CLIPS_FOLDER, file)
            self._shard = None
        if self._rejected:
            self.write_rejected(self._rejected)
            self._rejected = []
        self._last_commit = time.monotonic()

    def write_rejected(self, rows: list[dict[str, Any]]) -> str:
        """A file of rows of REJECTED_SCHEMA; returns its name."""
        table = pa.Table.from_pylist(rows, REJECTED_SCHEMA).replace_schema_metadata(self.metadata)
        file = storage.open_partial(f"{self.folder}/{REJECTED_FOLDER}")
        with storage.mendable(f"{self.folder}/{REJECTED_FOLDER}"):
            pq.write_table(table, file, compression="zstd")
        return self._publish(REJECTED_FOLDER, file)

    def _publish(self, part: str, file: io.BufferedRandom) -> str:
        # While files are added the dataset is not whole.
        storage.delete(f"{self.folder}/{INFO_FILE}")
        file.seek(0)
        name = f"{self.folder}/{part}/{file_name(part, file)}"
        storage.publish(file, name)
        return name


class _Shard:
    """A Parquet file of clips, of which all but the last row group is on disk."""

    def __init__(self, folder: str, schema: pa.Schema) -> None:
        self.file = storage.open_partial(f"{folder}/{CLIPS_FOLDER}")
        self.writer = pq.ParquetWriter(self.file, schema, compression="zstd")
        self.bytes = 0  # of the rows, written or waiting
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
        """The whole file, open."""
        self._write_group()
        self.writer.close()
        return self.file


# --- clips -> videos -------------------------------------------------------------------------------------------------


class VideoAssembler:
    """Gathers the clips of each video, in whatever order they come, and hands on whole videos or rejections.

    A video's latents wait on disk, however long it is: an hour at 512 pixels has 6 GB of them. Of its frames it keeps the
    people, by whom it is judged when it is whole.
    """

    def __init__(
        self,
        writer: ShardWriter,
        sources: list[Source],
        *,
        min_person_fraction: float,
        min_person_height: float,
        validation_fraction: float,
    ) -> None:
        self.writer = writer
        self.sources = {source.video_id: source for source in sources}
        self.min_person_fraction = min_person_fraction
        self.min_person_height = min_person_height
        self.validation_fraction = validation_fraction
        self.finished: set[str] = set()
        self._clips: dict[str, dict[int, dict[str, Any]]] = {}  # video -> start -> clip without its latents
        self._latents: dict[str, _Latents] = {}
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
            if video_id not in self._latents:
                self._latents[video_id] = _Latents(self.writer.folder)
            self._latents[video_id].put(row["start"], row.pop("latent_mean"), row.pop("latent_logvar"))
            clips[row["start"]] = row
        if len(clips) != self._num_clips.get(video_id):
            return None
        in_order = [clips[start] for start in sorted(clips)]
        people = [
            frame for clip in in_order for frame in unpack_people(clip["people_per_frame"], clip["people"])
        ]
        height, width = in_order[0]["height"], in_order[0]["width"]
        keypoints, which = main_person(people, height, width)
        square = square_around(keypoints, height, width)
        if reason := self._too_little(keypoints, square):
            return self._reject(video_id, "pose", reason)
        self.writer.add_video(self._rows(in_order, keypoints, which, square))
        self._finish(video_id)
        return "kept"

    def _too_little(self, keypoints: np.ndarray, square: Square) -> str | None:
        share = float(np.mean(square.shows(keypoints)))
        if share < self.min_person_fraction:
            return f"no person: in {share:.0%} of the frames only, fewer than {self.min_person_fraction:.0%}"
        height = person_height(keypoints) / square.side
        if height < self.min_person_height:
            return f"person too small: {height:.0%} of the canvas's height, less than {self.min_person_height:.0%}"
        return None

    def _rows(
        self, clips: list[dict[str, Any]], keypoints: np.ndarray, which: list[int], square: Square
    ) -> Iterator[dict[str, Any]]:
        first, video_id = clips[0], clips[0]["video_id"]
        height, width = first["height"], first["width"]
        keypoints = square.of_keypoints(keypoints)
        latents = self._latents[video_id]
        mean = square.of_latents(latents.get(first["start"])[0], height, width)
        shared = {
            "source_version": self.sources[video_id].version,
            "split": split_of(video_id, self.validation_fraction),
            "height": square.side,
            "width": square.side,
            "reference_latent_mean": mean[: len(mean) // first["num_frames"]],
            "reference_keypoints": keypoints[0].tobytes(),
        }
        at = 0
        for clip in clips:
            span = slice(at, at := at + clip["num_frames"])
            mean, logvar = (square.of_latents(both, height, width) for both in latents.get(clip["start"]))
            points = {
                name: square.of_keypoints(np.frombuffer(clip[name], "<f4").reshape(-1, 3)).tobytes()
                for name in ("people", "hands", "faces")
                if clip.get(name) is not None
            }
            made = {
                "clip_id": f"{video_id}-{clip['start']:06d}",
                "crop": square.of_box(clip["crop"], width),
                "latent_mean": mean,
                "latent_logvar": logvar,
                "keypoints": keypoints[span].tobytes(),
                "main_person": which[span],
            }
            row = clip | shared | points | made
            yield {name: row[name] for name in self.writer.schema.names}

    def _reject(self, video_id: str, stage: str, reason: str) -> str:
        self.writer.add_rejected(self.sources[video_id], stage, reason)
        self._finish(video_id)
        return "rejected"

    def _finish(self, video_id: str) -> None:
        self.finished.add(video_id)
        self._clips.pop(video_id, None)
        if latents := self._latents.pop(video_id, None):
            latents.close()


class _Latents:
    """The latents of one video's clips: few in memory, more in a file that ends with this process. It lies in the
    dataset's folder, where there must be room for them anyway; for a bucket, in this machine's temporary folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        local = None if storage.is_remote(folder) else folder
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - open until `close`
            LATENTS_IN_MEMORY, prefix=".", suffix=".partial", dir=local
        )
        self._places: dict[int, tuple[int, int]] = {}  # start -> (offset, bytes) of both

    def put(self, start: int, mean: bytes, logvar: bytes) -> None:
        with storage.mendable(self.folder):
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(mean + logvar)
        self._places[start] = offset, len(mean) + len(logvar)

    def get(self, start: int) -> tuple[bytes, bytes]:
        offset, size = self._places[start]
        self._file.seek(offset)
        both = self._file.read(size)
        return both[: size // 2], both[size // 2 :]

    def close(self) -> None:
        self._file.close()


def split_of(video_id: str, validation_fraction: float) -> str:
    """The id is a digest, so its digits are uniform: a video's split never changes as others come."""
    return "validation" if int(video_id, 16) < validation_fraction * 16 ** len(video_id) else "train"
