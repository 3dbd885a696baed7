"""The clip dataset: what `tcan preprocess` writes and `tcan train` reads.

    OUT/dataset.json          version, counts, sizes, fingerprints, settings; written last: with it the dataset is whole
    OUT/clips/*.parquet       a row a clip: consecutive frames of one video as VAE latents and keypoints
    OUT/rejected/*.parquet    a row a source that gave no clips, with the stage and the reason

Parquet files can be read with pyarrow or pandas alone; `decode_row` turns a row's binary columns into arrays.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tcan.errors import UserError

SCHEMA_VERSION = 1
INFO_FILE = "dataset.json"
CLIPS_FOLDER = "clips"
REJECTED_FOLDER = "rejected"

LATENT_STRIDE = 8  # picture pixels to a latent, in each direction
NUM_JOINTS = 18

CLIP_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),  # {video_id}-{start:06d}
        ("video_id", pa.string()),  # first 16 hex digits of the sha256 of the file
        ("source", pa.string()),  # where the video was found
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
        ("reference_latent_mean", pa.binary()),  # float16 [C, height/8, width/8]: the video's first frame
        ("reference_keypoints", pa.binary()),  # float32 [18, 3]: the video's first frame
    ]
)

REJECTED_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("video_id", pa.string()),  # null when the file could not be read
        ("stage", pa.string()),  # "list", "decode", "pose" or "latents"
        ("reason", pa.string()),  # one line
    ]
)


def read_info(folder: str | Path) -> dict[str, Any]:
    """What `dataset.json` says: schema_version, counts {sources, videos, clips, frames, rejected}, height, width,
    clip_frames, fps, vae_fingerprint, vae_scaling_factor, pose_fingerprint, settings, mlflow_run_id.

    Raises:
        UserError: no such folder, no dataset in it, one that is not finished, or one of another schema version.
    """
    file = Path(folder) / INFO_FILE
    try:
        info = json.loads(file.read_text())
    except FileNotFoundError:
        if (Path(folder) / CLIPS_FOLDER).is_dir():
            raise UserError(
                f"{folder}: this dataset is not finished; run the same tcan preprocess again"
            ) from None
        raise UserError(
            f"{folder}: no dataset here (no {INFO_FILE}); give what tcan preprocess wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); make the dataset again") from None
    if info.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder}: dataset of schema version {info.get('schema_version')}, but this is {SCHEMA_VERSION}; "
            "make it again with tcan preprocess"
        )
    return info


def clip_files(folder: str | Path) -> list[Path]:
    """The Parquet files of clips, in a fixed order."""
    return sorted((Path(folder) / CLIPS_FOLDER).glob("*.parquet"))


def rejected_files(folder: str | Path) -> list[Path]:
    """The Parquet files of rejected sources, in a fixed order."""
    return sorted((Path(folder) / REJECTED_FOLDER).glob("*.parquet"))


def decode_row(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a clip's row (a dict of Python values, as `table.to_pylist()` gives); read-only views.

    Returns latent_mean, latent_logvar (float16 `[F, C, h, w]`, C the VAE's channels), keypoints (float32 `[F, 18, 3]`),
    reference_latent_mean (float16 `[C, h, w]`) and reference_keypoints (float32 `[18, 3]`), of those in the row.
    """
    latent = (-1, row["height"] // LATENT_STRIDE, row["width"] // LATENT_STRIDE)
    layout = {
        "latent_mean": ("<f2", (row["num_frames"], *latent)),
        "latent_logvar": ("<f2", (row["num_frames"], *latent)),
        "keypoints": ("<f4", (row["num_frames"], NUM_JOINTS, 3)),
        "reference_latent_mean": ("<f2", latent),
        "reference_keypoints": ("<f4", (NUM_JOINTS, 3)),
    }
    return {
        name: np.frombuffer(row[name], dtype).reshape(shape)
        for name, (dtype, shape) in layout.items()
        if name in row
    }
