"""Random access to single frames of a clip dataset."""

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.dataset import decode_row
from pipelines.dataset_index import (
    FRAME_COLUMNS,
    PART_COLUMNS,
    POSITIONED,
    REFERENCE_COLUMN,
    frame_shape,
    read_index,
)
from pipelines.train.disk_cache import DiskCache

OPEN_FILES = 256  # fewer than the usual limit of a process, 1024
ENTRY_BYTES = 400  # memory of an entry of the cache in addition to its values

Frame = tuple[str, int, int]
"""Column, row of the index, frame in the clip."""


@dataclass(frozen=True)
class Video:
    """The frames of one video in the dataset, in order: position p is frame `number[p]`."""

    video_id: str
    first_row: int
    """Row of the store with the first clip; the other clips follow."""
    clip_starts: np.ndarray
    """int64 `[C]`, ascending: number of the first frame of each clip. There are gaps where a clip was discarded."""
    clip_lengths: np.ndarray
    """int64 `[C]`: number of frames of each clip."""

    def __len__(self) -> int:
        return int(self.clip_lengths.sum())

    @cached_property
    def number(self) -> np.ndarray:
        """int64 `[L]`, ascending: the number of each frame."""
        through = np.cumsum(self.clip_lengths)
        shift = self.clip_starts - (through - self.clip_lengths)
        return np.arange(len(self)) + np.repeat(shift, self.clip_lengths)

    def starts(self, frames: int) -> np.ndarray:
        """Positions from which `frames` frames follow each other without a gap."""
        last = len(self) - frames + 1
        if last < 1:
            return np.empty(0, np.int64)
        return np.flatnonzero(self.number[frames - 1 :] - self.number[:last] == frames - 1)

    def locate(self, positions: Iterable[int]) -> Iterator[tuple[int, int]]:
        """The row of the store and the frame in its clip of each position."""
        through = np.cumsum(self.clip_lengths)
        for position in positions:
            clip = int(np.searchsorted(through, position, side="right"))
            yield self.first_row + clip, int(position - through[clip] + self.clip_lengths[clip])


class ClipStore:
    """The clips of one split of a dataset, read by frame with random access and an LRU cache. Thread-safe.

    cache_bytes: size of the cache.
    disk_bytes: size of a second cache on the local disk, if the dataset is in a bucket; 0 disables it.
    """

    def __init__(
        self,
        dataset: str | Path,
        split: Literal["train", "validation"] = "train",
        cache_bytes: int = 1 << 30,
        disk_bytes: int = 0,
    ):
        self._arguments = (dataset, split, cache_bytes, disk_bytes)
        self._folder = str(dataset)
        self._disk = DiskCache(disk_bytes) if disk_bytes and storage.is_remote(dataset) else None
        index = read_index(dataset)
        index = index.filter(pc.field("split") == split)
        numbers = ("start", "num_frames", "height", "width", "channels", "tracked_people", "row_group", "row")
        self._columns = {name: index[name].to_numpy() for name in (*numbers, *POSITIONED)}
        files = index["file"].combine_chunks().dictionary_encode()
        self._files, self._file_names = files.indices.to_numpy(), files.dictionary.to_pylist()
        ids = index["video_id"].combine_chunks().dictionary_encode()
        # The index is sorted by video, so the ids are in the order of their first rows.
        self._ids: pa.Array = ids.dictionary
        self._first_rows = np.searchsorted(ids.indices.to_numpy(), np.arange(len(self._ids) + 1))
        self._cache = _Cache(cache_bytes)
        self._open: OrderedDict[int, pa.NativeFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["ClipStore"], tuple]:
        """In another process: the same clips, with caches of its own."""
        return ClipStore, self._arguments

    @property
    def videos(self) -> Sequence[Video]:
        return _Videos(self)

    def video(self, index: int) -> Video:
        """Video number `index`, in the order of the ids."""
        first, end = (int(row) for row in self._first_rows[index : index + 2])
        starts, lengths = (
            self._columns[name][first:end].astype(np.int64) for name in ("start", "num_frames")
        )
        return Video(self._ids[index].as_py(), first, starts, lengths)

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._ids)

    def sizes(self, videos: np.ndarray) -> np.ndarray:
        """Height and width in pixels of the clips of videos, int32 `[N, 2]`; videos: indices `[N]`."""
        rows = self._first_rows[:-1][videos]
        return np.stack([self._columns["height"][rows], self._columns["width"][rows]], axis=1)

    def videos_with(self, frames: int, consecutive: bool) -> np.ndarray:
        """Indices of the videos with at least this number of frames, or of consecutive frames."""
        if not len(self):
            return np.empty(0, np.int64)
        start, length = (self._columns[name].astype(np.int64) for name in ("start", "num_frames"))
        first = self._first_rows[:-1]
        if not consecutive:
            return np.flatnonzero(np.add.reduceat(length, first) >= frames)
        is_first = np.ones(len(start), bool)  # of a run of consecutive frames
        is_first[1:] = start[1:] != start[:-1] + length[:-1]
        is_first[first] = True
        runs = np.flatnonzero(is_first)
        longest = np.maximum.reduceat(np.add.reduceat(length, runs), np.searchsorted(runs, first))
        return np.flatnonzero(longest >= frames)

    def frames(
        self,
        video: Video,
        positions: Sequence[int] | np.ndarray,
        columns: Iterable[str] = tuple(FRAME_COLUMNS),
    ) -> dict[str, np.ndarray]:
        """Arrays of these positions: latent_mean, latent_logvar `[n, 4, h, w]` (unscaled), keypoints `[n, 18, 3]`, or
        `[n, P, 18, 3]` of a video with P > 1 tracked people. On request, hands `[n, 42, 3]` and faces `[n, 70, 3]`, or with P,
        of the same people.
        """
        located = list(video.locate(positions))
        return {column: np.stack(self._values([(column, *frame) for frame in located])) for column in columns}

    def reference_latent(self, video: Video) -> np.ndarray:
        """Latent mean `[4, h, w]` of the video's first frame, unscaled."""
        return self._values([(REFERENCE_COLUMN, video.first_row, 0)])[0]

    def _values(self, wanted: list[Frame]) -> list[np.ndarray]:
        """The values of these frames, from the cache or from the files; one read per range of adjacent frames."""
        values = {frame: self._cached(frame) for frame in wanted}
        missing = sorted(frame for frame, value in values.items() if value is None)
        # In a range of adjacent frames, the difference between frame and position in the list is constant.
        numbered = enumerate(missing)
        for _, group in groupby(numbered, key=lambda item: (*item[1][:2], item[1][2] - item[0])):
            frames = [frame for _, frame in group]
            for frame, value in zip(frames, self._read(frames[0], len(frames)), strict=True):
                values[frame] = value
                self._cache.put(frame, value)
                if self._disk:
                    self._disk.put(frame, value.tobytes())
        return [values[frame] for frame in wanted]  # type: ignore[misc]

    def _cached(self, frame: Frame) -> np.ndarray | None:
        value = self._cache.get(frame)
        if value is None and self._disk and (data := self._disk.get(frame)):
            shape, dtype = self._layout(*frame[:2])
            value = np.frombuffer(data, dtype).reshape(shape)
            self._cache.put(frame, value)
        return value

    def _layout(self, column: str, row: int) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of the value of a frame."""
        size = (int(self._columns[name][row]) for name in ("height", "width", "channels", "tracked_people"))
        return frame_shape(column, *size), np.dtype(POSITIONED.get(column, "<f4"))

    def _read(self, first: Frame, count: int) -> Iterator[np.ndarray]:
        """Read `count` adjacent frames of a clip."""
        column, row, frame = first
        if column in PART_COLUMNS:
            return self._read_parts(first, count)
        shape, dtype = self._layout(column, row)
        frame_bytes = math.prod(shape) * dtype.itemsize
        position = int(self._columns[column][row]) + frame * frame_bytes
        name = f"{self._folder}/{self._file_names[self._files[row]]}"
        with storage.damaged_file(name):
            data = self._file(int(self._files[row]), name).read_at(count * frame_bytes, position)
            if len(data) < count * frame_bytes:
                raise OSError("the file is shorter than its index says")
        # Copies, so that a cached frame does not keep the data of all others.
        return (array.copy() for array in np.frombuffer(data, dtype).reshape(count, *shape))

    def _read_parts(self, first: Frame, count: int) -> Iterator[np.ndarray]:
        """Read the hands or faces of the tracked people in `count` adjacent frames of a clip; all 0 where not detected.

        The column has those of all people. The tracked ones are the people with the same body keypoints.
        """
        column, row, frame = first
        name = f"{self._folder}/{self._file_names[self._files[row]]}"
        names = ["num_frames", "height", "width", "people_per_frame", "people", "keypoints", column]
        with storage.damaged_file(name):
            file = pq.ParquetFile(self._file(int(self._files[row]), name), pre_buffer=True)
            optional = {"tracked_people"} & set(file.schema_arrow.names)
            group = file.read_row_group(int(self._columns["row_group"][row]), [*names, *optional])
            clip = group.slice(int(self._columns["row"][row]), 1).to_pylist()[0]
            values = decode_row(clip)
        ends = np.cumsum(clip["people_per_frame"])
        bodies = values["keypoints"].reshape(len(ends), -1, *values["people"].shape[1:])
        parts = values[column].reshape(-1, *PART_COLUMNS[column])
        for number in range(frame, frame + count):
            found = slice(ends[number] - clip["people_per_frame"][number], ends[number])
            # Of each tracked person, which of the people of the frame it is: bool [P, people].
            is_same = (bodies[number][:, None] == values["people"][found]).all(axis=(2, 3))
            result = np.zeros((len(is_same), *PART_COLUMNS[column]), np.float32)
            for tracked, person in np.argwhere(is_same):
                result[tracked] = parts[found][person]
            yield result.reshape(self._layout(column, row)[0])

    def _file(self, number: int, name: str) -> pa.NativeFile:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        filesystem, path = storage.locate(name)
        file = filesystem.open_input_file(path)
        with self._lock:
            self._open[number] = file
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)  # closed when no other thread reads from it
        return file


class _Videos(Sequence[Video]):
    """All videos of a store; each is created on access."""

    def __init__(self, store: ClipStore):
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Video:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._store.video(index)


class _Cache:
    """LRU cache of arrays of limited size. Thread-safe."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes = max_bytes, 0
        self._arrays: OrderedDict[Frame, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Frame) -> np.ndarray | None:
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
            return self._arrays.get(key)

    def put(self, key: Frame, array: np.ndarray) -> None:
        with self._lock:
            if key not in self._arrays:
                self._bytes += array.nbytes + ENTRY_BYTES
            self._arrays[key] = array
            while self._bytes > self._max_bytes:
                self._bytes -= self._arrays.popitem(last=False)[1].nbytes + ENTRY_BYTES
