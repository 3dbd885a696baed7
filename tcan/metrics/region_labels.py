"""Regions of a true video that are known in each pixel, their file next to the video, and the PSNR in them.

A file of labels is `NAME.regions.npz` next to `NAME.mp4`: `labels`, uint8 `[F, H, W]`, and `names`, the regions of labels
1, 2, ...; 0 is the background.
"""

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tcan.atomic_write import atomic_write
from tcan.crop import crop_box
from tcan.errors import UserError
from tcan.metrics.regions import pooled_psnr

REGIONS = ("body", "face", "hair_ears", "hands")
"""Region of each label from 1. The body includes the neck; hair and ears include hats, horns and antennae."""
COMPARED = ("face", "hands", "hair_ears")
"""Regions with a metric of their own; an average over all pixels hides their errors."""
REGIONS_SUFFIX = ".regions.npz"


def labelled_region_metrics(result: np.ndarray, truth: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """PSNR in dB of the pixels of each region in `COMPARED`, over the pixels of all frames together.

    Args:
        result, truth: uint8 RGB `[F, H, W, 3]`, corresponding frames.
        labels: uint8 `[F, H, W]` of the truth: 1 + the index in `REGIONS`, or 0.

    Returns:
        psnr_face_true, psnr_hands_true, psnr_hair_ears_true: NaN if the region is in no frame, infinite for equal pixels.
    """
    metrics = {}
    for name in COMPARED:
        total, count = 0.0, 0
        for a, b, frame_labels in zip(result, truth, labels, strict=True):
            region = frame_labels == 1 + REGIONS.index(name)
            errors = a[region].astype(np.float64) - b[region]
            total, count = total + float((errors**2).sum()), count + errors.size
        metrics[f"psnr_{name}_true"] = pooled_psnr(total, count)
    return metrics


def write_regions(labels: np.ndarray, path: str | os.PathLike) -> None:
    """Write labels uint8 `[F, H, W]`. The write is atomic; equal labels give identical bytes."""
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, labels=labels, names=np.array(REGIONS))


def read_regions(path: Path, num_frames: int, height: int, width: int) -> np.ndarray | None:
    """Labels uint8 `[num_frames, height, width]` of the first frames of a video, cropped as by `fit_image`; None if there is no file.

    Labels of another size are those of the nearest pixels.

    Raises:
        UserError: the file has another format, other regions or fewer frames.
    """
    if not path.is_file():
        return None
    fix = "render the video again, or delete the file"
    try:
        with np.load(path) as file:
            labels, names = file["labels"], tuple(map(str, file["names"]))
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path}: not a file of region labels; {fix}") from None
    if labels.dtype != np.uint8 or labels.ndim != 3 or not labels.size:
        raise UserError(f"{path}: {labels.dtype} {labels.shape}: must be uint8 [F, H, W]; {fix}")
    if names != REGIONS:
        raise UserError(f"{path}: regions {', '.join(names)}: must be {', '.join(REGIONS)}; {fix}")
    if len(labels) < num_frames:
        raise UserError(f"{path}: {len(labels)} frames, but {num_frames} of the video are evaluated; {fix}")
    labels = labels[:num_frames]
    if labels.shape[1:] == (height, width):
        return labels
    box = crop_box(labels.shape[1], labels.shape[2], height, width)
    return np.stack(
        [
            np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST, box=box))
            for frame in labels
        ]
    )
