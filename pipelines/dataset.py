"""The clip dataset: what `tcan preprocess` writes and `tcan train` reads.

    OUT/dataset.json          version, counts, files, sizes, fingerprints, settings; written last: with it it is whole
    OUT/clips/*.parquet       a row a clip: consecutive frames of one video as VAE latents and keypoints
    OUT/rejected/*.parquet    a row a source that gave no clips, with the stage and the reason

OUT is a folder or, as a URI, a place in a bucket. Parquet files can be read with pyarrow or pandas alone; `decode_row`
turns a row's binary columns into arrays. A file's name holds the digest of its bytes (`file_name`) and its metadata the
dataset's identity; it is written once and never changed. Its row groups hold about 2 MiB, or one clip if that is larger:
what a training sample reads.

Schema versions: 1, the first; 2, everybody's keypoints and which of them is the main person, the sources' versions,
digests in the files' names, the files listed in dataset.json. OPTIONAL_COLUMNS came later and changed nothing else.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from tcan.errors import UserError

SCHEMA_VERSION = 2
INFO_FILE = "dataset.json"
CLIPS_FOLDER = "clips"
REJECTED_FOLDER = "rejected"
IDENTITY_KEY = b"tcan.dataset"  # in each file's metadata: the settings and fingerprints that made it, as JSON
DUPLICATE = "duplicate"  # the stage of a source whose content is that of another one

LATENT_STRIDE = 8  # image pixels to a latent, in each direction
NUM_JOINTS = 18

CLIP_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),  # {video_id}-{start:06d}
        ("video_id", pa.string()),  # first 16 hex digits of the sha256 of the file
        ("source", pa.string()),  # where the video was found: absolute path or URI
        ("source_version", pa.string()),  # {bytes}-{modification time, ns}: unchanged, so is the content
        ("split", pa.string()),  # "train" or "validation", from video_id alone
        ("start", pa.int32()),  # number of the first frame in the (resampled) video
        ("num_frames", pa.int32()),  # F
        ("fps", pa.float32()),  # of the clip, after resampling
        ("height", pa.int32()),  # of the canvas, pixels
        ("width", pa.int32()),
        ("crop", pa.list_(pa.float32())),  # x0, y0, x1, y1 in source pixels: what became the canvas
        ("latent_mean", pa.binary()),  # float16 [F, C, height/8, width/8], as the VAE gives it: unscaled
        ("latent_logvar", pa.binary()),  # float16, same shape
        ("keypoints", pa.binary()),  # float32 [F, 18, 3]: x, y in canvas pixels, score; the main person
        ("people_per_frame", pa.list_(pa.int32())),  # [F]
        ("people", pa.binary()),  # float32 [sum of people_per_frame, 18, 3]: everybody, frame after frame
        (
            "main_person",
            pa.list_(pa.int32()),
        ),  # [F]: which of the frame's people `keypoints` are; -1: not seen
        ("reference_latent_mean", pa.binary()),  # float16 [C, height/8, width/8]: the video's first frame
        ("reference_keypoints", pa.binary()),  # float32 [18, 3]: the video's first frame
    ]
)

# Of everybody in `people`: x, y in canvas pixels, score, in OpenPose's order; a point not found is all 0. Clips have the
# column if the dataset's identity has the key.
OPTIONAL_COLUMNS = {
    # float32 [sum of people_per_frame, 2, 21, 3]: left hand, right hand
    "hand_fingerprint": pa.field("hands", pa.binary()),
    # float32 [sum of people_per_frame, 70, 3]
    "face_fingerprint": pa.field("faces", pa.binary()),
}

REJECTED_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("source_version", pa.string()),  # null when the file could not be read
        ("video_id", pa.string()),  # null when the file could not be read
        (
            "stage",
            pa.string(),
        ),  # "list", "decode", "pose", "latents" or, with the other's source, "duplicate"
        ("reason", pa.string()),  # one line
    ]
)


def read_info(folder: str | Path) -> dict[str, Any]:
    """What `dataset.json` says: schema_version, counts {sources, videos, clips, frames, rejected, duplicates}, files {name:
    rows}, identity, height, width, clip_frames, fps, vae_fingerprint, vae_scaling_factor, pose_fingerprint, settings,
    mlflow_run_id.

    Raises:
        UserError: no such folder, no dataset in it, one that is not finished, or one of another schema version.
    """
    file = f"{folder}/{INFO_FILE}"
    try:
        info = json.loads(storage.read_bytes(file))
    except FileNotFoundError:
        if clip_files(folder) or rejected_files(folder):
            raise UserError(
                f"{folder}: this dataset is not finished; run the same tcan preprocess again"
            ) from None
        raise UserError(
            f"{folder}: no dataset here (no {INFO_FILE}); give what tcan preprocess wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read ({storage.one_line(error)}); the same tcan preprocess writes it anew"
        ) from None
    if info.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder}: dataset of schema version {info.get('schema_version')}, but this is {SCHEMA_VERSION}; "
            "make it again with tcan preprocess"
        )
    return info


def clip_schema(identity: Mapping[str, Any]) -> pa.Schema:
    """CLIP_SCHEMA, and the optional columns that clips of this identity have."""
    return pa.schema([*CLIP_SCHEMA, *(field for key, field in OPTIONAL_COLUMNS.items() if key in identity)])


def clip_files(folder: str | Path) -> list[str]:
    """The Parquet files of clips, in a fixed order."""
    return _parquet_files(folder, CLIPS_FOLDER)


def rejected_files(folder: str | Path) -> list[str]:
    """The Parquet files of rejected sources, in a fixed order."""
    return _parquet_files(folder, REJECTED_FOLDER)


def file_name(part: str, file: io.BufferedIOBase) -> str:
    """The name of a Parquet file, open at its beginning, in the folder `part`: its content's sha256, shortened."""
    return f"{part}-{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}.parquet"


def _parquet_files(folder: str | Path, part: str) -> list[str]:
    files = storage.list_files(f"{folder}/{part}")
    return [file for file in files if file.endswith(".parquet") and "/." not in file[len(str(folder)) :]]


def decode_row(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a clip's row (a dict of Python values, as `table.to_pylist()` gives); read-only views.

    Returns latent_mean, latent_logvar (float16 `[F, C, h, w]`, C the VAE's channels), keypoints (float32 `[F, 18, 3]`),
    people (float32 `[sum of people_per_frame, 18, 3]`), hands (`[..., 2, 21, 3]`), faces (`[..., 70, 3]`),
    reference_latent_mean (float16 `[C, h, w]`) and reference_keypoints (float32 `[18, 3]`), of those in the row.

    Raises:
        ValueError: the bytes are not of that shape.
    """
    latent = (-1, row["height"] // LATENT_STRIDE, row["width"] // LATENT_STRIDE)
    layout = {
        "latent_mean": ("<f2", (row["num_frames"], *latent)),
        "latent_logvar": ("<f2", (row["num_frames"], *latent)),
        "keypoints": ("<f4", (row["num_frames"], NUM_JOINTS, 3)),
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
