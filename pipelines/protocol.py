"""Protocols of published evaluations: which videos, frames and sizes, and the conventions of the metrics.

`tiktok-disco` is the protocol of DisCo (Wang et al., CVPR 2024), as far as its repository and the answers of its authors
describe it; docs/metrics.md lists what is unknown.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tcan.crop import crop_box
from tcan.errors import UserError

SIZE = 256
"""Height and width in pixels at which the metrics of tiktok-disco are computed."""

VIDEOS = 10
"""Test videos of DisCo: 2 of the TikTok dataset, and 8 that its authors collected."""

TRAINING = range(1, 335)
"""Numbers of the videos of the TikTok dataset that belong to the training split."""

CONVENTIONS = ("l1_disco", "ssim_disco", "psnr_uint8_overflow", "lpips_vgg_disco")
"""Per-frame metrics in the conventions of DisCo's scripts, which average over the frames of all videos."""


def check_videos(paths: Sequence[str]) -> None:
    """Check that no video belongs to the training split, by the numbers of the TikTok dataset (`00337.mp4`).

    Raises:
        UserError: a training video.
    """
    for path in paths:
        match = re.fullmatch(r"(?:TiktokDance_)?(\d{5})", Path(path).stem)
        if match and int(match[1]) in TRAINING:
            raise UserError(
                f"{path}: evaluate.protocol tiktok-disco: video {int(match[1])} of the TikTok dataset is in the training "
                f"split ({TRAINING[0]} to {TRAINING[-1]}); remove it"
            )


def at_protocol_size(frames: np.ndarray) -> np.ndarray:
    """Crop the central square of each frame and resize it (PIL, bilinear): uint8 RGB `[F, 256, 256, 3]`."""
    box = crop_box(frames.shape[1], frames.shape[2], SIZE, SIZE)
    return np.stack(
        [
            np.array(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))
            for frame in frames
        ]
    )


def published(
    rows: Sequence[dict[str, float]], frames: Sequence[int], sets: dict[str, float]
) -> dict[str, Any]:
    """The metrics in the conventions of DisCo's scripts.

    Args:
        rows: metrics of each video.
        frames: number of frames of each video.
        sets: Fréchet distances.

    Returns:
        the per-frame metrics, averaged over the frames of all videos, FID and FID-VID; only those that are available. FVD is
        not among them: DisCo uses another I3D network (docs/metrics.md).
    """
    values = {
        key: float(np.average([row[key] for row in rows], weights=frames))
        for key in CONVENTIONS
        if key in rows[0]
    }
    values |= {key: sets[key] for key in ("fid", "fid_vid") if key in sets}
    return {
        "name": "tiktok-disco",
        "size": SIZE,
        "reference": "first frame",
        "videos": len(rows),
        "videos_of_the_protocol": VIDEOS,
        "metrics": values,
    }
