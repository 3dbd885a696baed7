"""The clip dataset that `tcan preprocess` writes and `tcan train` reads.

    OUT/dataset.json          schema version, counts, files, sizes, fingerprints, settings; written last
    OUT/index.parquet         one row per clip with the positions of its frames (dataset_index.py)
    OUT/clips/*.parquet       one row per clip: consecutive frames of one video as VAE latents and keypoints
    OUT/rejected/*.parquet    one row per source without clips, with the step that rejected it and the reason

The dataset is complete when dataset.json exists. OUT is a local folder or the URI of a folder in a bucket. The Parquet files
can be read with pyarrow or pandas alone; `decode_row` decodes the binary columns of a row to arrays.

A file name contains the digest of the file's content (`file_name`); the file's metadata contains the identity of the
dataset. Files are written once and never changed. A row group is about 2 MiB, or one clip if that is larger.

Schema versions:

- 1: first version;
- 2: keypoints of all people and the index of the main person, versions of the sources, digests in file names, list of files
  in dataset.json;
- 3: index; latents and keypoints are not compressed.

OPTIONAL_COLUMNS were added later without other changes. `tracked_people` adds an axis to `keypoints`.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from tcan.crop import Size
from tcan.errors import UserError

SCHEMA_VERSION = 3
INFO_FILE = "dataset.json"
CLIPS_FOLDER = "clips"
REJECTED_FOLDER = "rejected"
IDENTITY_KEY = b"tcan.dataset"  # metadata key of each file: settings and model fingerprints as JSON
DUPLICATE = "duplicate"  # step of a source whose content is identical to that of another source

LATENT_STRIDE = 8  # image pixels per latent, in each direction
NUM_JOINTS = 18

CLIP_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),  # {video_id}-{start:06d}
        ("video_id", pa.string()),  # first 16 hex digits of the sha256 of the file
        ("source", pa.string()),  # absolute path or URI of the video
        (
            "source_version",
            pa.string(),
        ),  # {bytes}-{modification time in ns}: if equal, the content is assumed equal
        ("split", pa.string()),  # "train" or "validation", depends on video_id only
        ("start", pa.int32()),  # index of the first frame in the (resampled) video
        ("num_frames", pa.int32()),  # F
        ("fps", pa.float32()),  # of the clip, after resampling
        ("height", pa.int32()),  # canvas size in pixels, the same for all clips of a video
        ("width", pa.int32()),
        ("crop", pa.list_(pa.float32())),  # x0, y0, x1, y1 of the canvas in source pixels
        ("latent_mean", pa.binary()),  # float16 [F, C, height/8, width/8], not scaled
        ("latent_logvar", pa.binary()),  # float16, same shape
        # float32 [F, 18, 3]: x, y in canvas pixels, score; the main person. With `tracked_people`, [F, P, 18, 3]: the tracked
        # people, the main person first; all 0 where a person is not detected
        ("keypoints", pa.binary()),
        ("people_per_frame", pa.list_(pa.int32())),  # [F]
        ("people", pa.binary()),  # float32 [sum(people_per_frame), 18, 3]: all people, frame by frame
        ("main_person", pa.list_(pa.int32())),  # [F]: index of the main person in the frame; -1: not detected
        ("reference_latent_mean", pa.binary()),  # float16 [C, height/8, width/8]: the video's first frame
        ("reference_keypoints", pa.binary()),  # float32 [18, 3]: the video's first frame
    ]
)

# Clips have a column if the dataset's identity has its key. Hands and faces are those of all people in `people`: x, y in canvas
# pixels, score, in OpenPose's order; all 0 if not detected.
OPTIONAL_COLUMNS = {
    # float32 [sum(people_per_frame), 2, 21, 3]: left hand, right hand
    "hand_fingerprint": pa.field("hands", pa.binary()),
    # float32 [sum(people_per_frame), 70, 3]
    "face_fingerprint": pa.field("faces", pa.binary()),
    "people": pa.field("tracked_people", pa.int32()),  # P, the same for all clips of a video
}

REJECTED_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("source_version", pa.string()),  # null if the file could not be read
        ("video_id", pa.string()),  # null if the file could not be read
        # Preprocessing step: "list", "decode", "pose", "latents", "models" or "duplicate".
        ("step", pa.string()),
        ("reason", pa.string()),  # one line; of a duplicate, the source with the same content
    ]
)


def read_info(folder: str | Path) -> dict[str, Any]:
    """Read `dataset.json`.

    Returns:
        schema_version, counts {sources, videos, clips, frames, rejected, duplicates}, files {name: rows}, identity, height,
        width (None with buckets), buckets ([[height, width], ...] or None), clip_frames, fps, vae_fingerprint,
        vae_scaling_factor, pose_fingerprint, settings, mlflow_run_id.

    Raises:
        UserError: the folder does not exist, contains no dataset or an unfinished one, or has another schema version.
    """
    folder = str(folder).rstrip("/")  # Google Cloud Storage refuses empty path components
    file = f"{folder}/{INFO_FILE}"
    try:
        info = json.loads(storage.read_bytes(file))
    except (FileNotFoundError, NotADirectoryError):
        if clip_files(folder) or rejected_files(folder):
            raise UserError(
                f"{folder}: the dataset is not finished; rerun the same tcan preprocess command"
            ) from None
        raise UserError(
            f"{folder}: no dataset here (no {INFO_FILE}); give the output folder of tcan preprocess"
        ) from None
    except OSError as error:
        where = "the endpoint and the credentials" if storage.is_remote(file) else "its permissions"
        raise UserError(f"{file}: cannot be read ({storage.one_line(error)}); check {where}") from None
    except ValueError as error:
        raise UserError(
            f"{file}: cannot be read ({storage.one_line(error)}); rerun the same tcan preprocess command to regenerate it"
        ) from None
    if info.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder}: schema version {info.get('schema_version')}, expected {SCHEMA_VERSION}; "
            "regenerate the dataset with tcan preprocess"
        )
    return info


def clip_sizes(info: Mapping[str, Any]) -> list[Size]:
    """Possible sizes of the clips: the buckets, or the canvas."""
    if buckets := info.get("buckets"):
        return [(height, width) for height, width in buckets]
    return [(info["height"], info["width"])]


def check_clip_files(folder: str | Path, info: Mapping[str, Any]) -> None:
    """Compare the files of a dataset with the list in its `dataset.json`.

    Raises:
        UserError: files are missing from the folder, or are not listed.
    """
    name = storage.absolute(folder)
    existing = {file[len(name) + 1 :] for file in [*clip_files(name), *rejected_files(name)]}
    if missing := sorted(info["files"].keys() - existing):
        raise UserError(
            f"{folder}: {_names(missing)} missing; restore the files, or rerun the same tcan preprocess command to "
            "regenerate their videos"
        )
    if foreign := sorted(existing - info["files"].keys()):
        raise UserError(
            f"{folder}: {_names(foreign)} not listed in {INFO_FILE}; remove the files, or rerun the same tcan preprocess "
            "command to add them to the dataset"
        )


def _names(files: Sequence[str], most: int = 3) -> str:
    more = f" and {len(files) - most} more" if len(files) > most else ""
    return f"{', '.join(files[:most])}{more} {'is' if len(files) == 1 else 'are'}"


def clip_schema(identity: Mapping[str, Any]) -> pa.Schema:
    """CLIP_SCHEMA plus the optional columns of a dataset with this identity."""
    return pa.schema([*CLIP_SCHEMA, *(field for key, field in OPTIONAL_COLUMNS.items() if key in identity)])


def clip_files(folder: str | Path) -> list[str]:
    """Sorted names of the Parquet files of clips."""
    return _parquet_files(folder, CLIPS_FOLDER)


def rejected_files(folder: str | Path) -> list[str]:
    """Sorted names of the Parquet files of rejected sources."""
    return _parquet_files(folder, REJECTED_FOLDER)


def file_name(part: str, file: io.BufferedIOBase) -> str:
    """File name of a Parquet file in the folder `part`: 32 hex digits of the SHA-256 of its content.

    `file` must be positioned at its beginning.
    """
    return f"{part}-{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}.parquet"


def _parquet_files(folder: str | Path, part: str) -> list[str]:
    files = storage.list_files(f"{folder}/{part}")
    return [file for file in files if file.endswith(".parquet") and "/." not in file[len(str(folder)) :]]


def decode_row(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Decode the binary columns of a clip to read-only arrays.

    Args:
        row: a clip as a dict of Python values, from `table.to_pylist()`.

    Returns:
        Of the columns in the row: latent_mean, latent_logvar (float16 `[F, C, h, w]`, C: channels of the VAE), keypoints
        (float32 `[F, 18, 3]`; `[F, P, 18, 3]` if the row has tracked_people), people (float32
        `[sum(people_per_frame), 18, 3]`), hands (`[..., 2, 21, 3]`), faces (`[..., 70, 3]`), reference_latent_mean
        (float16 `[C, h, w]`) and reference_keypoints (float32 `[18, 3]`).

    Raises:
        ValueError: the number of bytes does not match the shape.
    """
    latent = (-1, row["height"] // LATENT_STRIDE, row["width"] // LATENT_STRIDE)
    bodies = () if row.get("tracked_people") is None else (row["tracked_people"],)
    layout = {
        "latent_mean": ("<f2", (row["num_frames"], *latent)),
        "latent_logvar": ("<f2", (row["num_frames"], *latent)),
        "keypoints": ("<f4", (row["num_frames"], *bodies, NUM_JOINTS, 3)),
        "people": ("<f4", (-1, NUM_JOINTS, 3)),
        "hands": ("<f4", (-1, 2, 21, 3)),
        "faces": ("<f4", (-1, 70, 3)),
        "reference_latent_mean": ("<f2", latent),
        "reference_keypoints": ("<f4", (NUM_JOINTS, 3)),
    }
    return {
        name: np.frombuffer(row[name], dtype).reshape(shape)
        for name, (dtype, shape) in layout.items()
        if row.get(name) is not None
    }
