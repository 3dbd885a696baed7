"""Index of a clip dataset, so that training opens a dataset with one read and reads single frames of it.

    OUT/index.parquet    one row per clip, sorted by video and first frame; written before dataset.json

The files of clips store FRAME_COLUMNS uncompressed and in one page per row group (`WRITER_OPTIONS`). So each value is a
contiguous range of bytes in its file, and the index contains the position of its first byte. Frame f of a clip is at
`position + f * bytes per frame`. The files remain ordinary Parquet.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.dataset import CLIP_SCHEMA, LATENT_STRIDE, NUM_JOINTS, OPTIONAL_COLUMNS, clip_files
from tcan.errors import UserError

INDEX_FILE = "index.parquet"
READ_THREADS = 16  # files read in parallel: requests to a bucket have a high latency

FRAME_COLUMNS = {"latent_mean": "<f2", "latent_logvar": "<f2", "keypoints": "<f4"}  # one array per frame
# Shapes of one person's value. These columns are optional and compressed, so the index has no positions of them.
PART_COLUMNS = {"hands": (42, 3), "faces": (70, 3)}
REFERENCE_COLUMN = "reference_latent_mean"
POSITIONED = {**FRAME_COLUMNS, REFERENCE_COLUMN: "<f2"}
CLIP_COLUMNS = ("video_id", "split", "start", "num_frames", "fps", "height", "width")

INDEX_SCHEMA = pa.schema(
    [
        *(CLIP_SCHEMA.field(name) for name in CLIP_COLUMNS),
        ("channels", pa.int32()),  # of the latents
        ("tracked_people", pa.int32()),  # in the keypoints
        ("file", pa.string()),  # relative to the dataset's folder
        ("row_group", pa.int32()),
        ("row", pa.int32()),  # in the row group
        *((name, pa.int64()) for name in POSITIONED),  # position of the value's first byte in the file
    ]
)

# One page: without a limit on its size. Dictionaries and compression would make positions unknown.
_LISTS = ("crop", "people_per_frame", "main_person")
_COMPRESSED = [
    f"{name}.list.element" if name in _LISTS else name
    for name in (*CLIP_SCHEMA.names, *(field.name for field in OPTIONAL_COLUMNS.values()))
]
WRITER_OPTIONS: dict[str, Any] = {
    "compression": {name: "NONE" if name in POSITIONED else "ZSTD" for name in _COMPRESSED},
    "use_dictionary": ["split", "video_id", "source", "source_version"],
    "data_page_size": 2**30,
}


def frame_shape(column: str, height: int, width: int, channels: int, people: int) -> tuple[int, ...]:
    """Shape of a frame's value of a column of POSITIONED or PART_COLUMNS. That of one tracked person has no axis for the people."""
    if column == "keypoints" or column in PART_COLUMNS:
        points = PART_COLUMNS.get(column, (NUM_JOINTS, 3))
        return (people, *points) if people > 1 else points
    return channels, height // LATENT_STRIDE, width // LATENT_STRIDE


def read_index(folder: str | Path) -> pa.Table:
    """Read the index: a table of INDEX_SCHEMA, sorted by video_id and start.

    Raises:
        UserError: it is missing or damaged.
    """
    name = f"{folder}/{INDEX_FILE}"
    filesystem, path = storage.locate(name)
    try:
        with filesystem.open_input_stream(path) as file:
            table = pq.read_table(pa.BufferReader(file.read()))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{name}: cannot be read ({storage.one_line(error)}); rerun the same tcan preprocess command to regenerate it"
        ) from None
    if not table.schema.equals(INDEX_SCHEMA):
        raise UserError(f"{name}: unknown columns; rerun the same tcan preprocess command to regenerate it")
    return table


def write_index(folder: str) -> pa.Table:
    """Write and return the index. Files in the previous index are not read again; files never change."""
    files = {name[len(folder) + 1 :] for name in clip_files(folder)}
    tables = []
    with suppress(UserError):  # there is no index yet, or a damaged one
        tables = [_rows_of_files(read_index(folder), files)]
    known = {name for table in tables for name in table["file"].unique().to_pylist()}
    with ThreadPoolExecutor(READ_THREADS) as pool:
        tables += pool.map(lambda name: index_of_file(folder, name), sorted(files - known))
    table = pa.concat_tables([INDEX_SCHEMA.empty_table(), *tables])
    table = table.sort_by([("video_id", "ascending"), ("start", "ascending")])
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    storage.write(f"{folder}/{INDEX_FILE}", buffer.getvalue())
    return table


def _rows_of_files(table: pa.Table, files: set[str]) -> pa.Table:
    return table.filter(pc.is_in(table["file"], pa.array(sorted(files), pa.string())))


def index_of_file(folder: str, name: str) -> pa.Table:
    """Rows of the index for a file of clips. Reads its metadata and CLIP_COLUMNS.

    Raises:
        UserError: the file is damaged, or was not written with WRITER_OPTIONS.
    """
    with storage.open_parquet(f"{folder}/{name}") as file:
        clips = file.read(list(CLIP_COLUMNS))
        height, width, frames = (clips[key].to_numpy() for key in ("height", "width", "num_frames"))
        row_group = np.repeat(
            np.arange(file.num_row_groups),
            [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)],
        )
        row = np.arange(len(row_group)) - np.searchsorted(row_group, row_group)
        channels = _channels(file, height, width)
        area = (height // LATENT_STRIDE) * (width // LATENT_STRIDE)
        people = np.ones(len(row), np.int32)
        if "tracked_people" in file.schema_arrow.names:
            people = file.read(["tracked_people"])["tracked_people"].to_numpy()
        latent_bytes, keypoint_bytes = 2 * channels * area, people * (4 * NUM_JOINTS * 3)
        sizes = {
            "latent_mean": latent_bytes * frames,
            "latent_logvar": latent_bytes * frames,
            "keypoints": keypoint_bytes * frames,
            REFERENCE_COLUMN: latent_bytes,
        }
        positions = {key: _positions(file, key, size, row_group) for key, size in sizes.items()}
    columns: dict[str, Any] = {key: clips[key] for key in CLIP_COLUMNS}
    columns |= {"channels": np.full(len(row), channels), "tracked_people": people, "file": [name] * len(row)}
    return pa.table(columns | {"row_group": row_group, "row": row} | positions).cast(INDEX_SCHEMA)


def _channels(file: pq.ParquetFile, height: np.ndarray, width: np.ndarray) -> int:
    """Number of channels of the latents, from the size of one value."""
    value = next(file.iter_batches(1, columns=[REFERENCE_COLUMN]))[0][0].as_py()
    return len(value) // (2 * (height[0] // LATENT_STRIDE) * (width[0] // LATENT_STRIDE))


def _positions(file: pq.ParquetFile, name: str, sizes: np.ndarray, row_group: np.ndarray) -> np.ndarray:
    """Positions int64 `[rows]` of the values of a column in the file.

    A page of type BYTE_ARRAY in PLAIN encoding ends with its values, each of them after its length in 4 bytes. So the
    positions follow from the end of the page without parsing its header.

    sizes: bytes of each value.
    """
    metadata = file.metadata
    column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == name)
    ends = np.empty(metadata.num_row_groups, np.int64)
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(column)
        if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page:
            raise OSError(f"column {name} is compressed")
        ends[group] = chunk.data_page_offset + chunk.total_compressed_size
    through = np.cumsum(4 + sizes.astype(np.int64))  # bytes of all values up to this one
    last = np.searchsorted(row_group, row_group, side="right") - 1  # row: last row of its group
    return ends[row_group] - (through[last] - through) - sizes


def index_problems(folder: str, table: pa.Table, files: set[str]) -> Iterator[str]:
    """Differences between the index and the files of the dataset.

    Args:
        files: names of the undamaged files, relative to the folder.
    """
    for name in sorted(set(table["file"].unique().to_pylist()) - files):
        yield f"{INDEX_FILE}: contains clips of {name}"
    for name in sorted(files):
        expected = index_of_file(folder, name).sort_by([("video_id", "ascending"), ("start", "ascending")])
        if not _rows_of_files(table, {name}).combine_chunks().equals(expected.combine_chunks()):
            yield f"{INDEX_FILE}: does not match the clips of {name}"
