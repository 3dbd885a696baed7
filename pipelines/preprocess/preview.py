"""A picture of what the dataset holds: frames of a few clips, decoded from their latents, with the poses drawn over."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL

from pipelines.dataset import clip_files, decode_row
from tcan.pose import draw_poses


@torch.inference_mode()
def contact_sheet(
    folder: Path, vae: AutoencoderKL, stick_width: int, num_clips: int = 6, num_frames: int = 8
) -> np.ndarray:
    """uint8 RGB `[clips * H, frames * W, 3]`: a line a clip, of clips and frames evenly spread."""
    files = [pq.ParquetFile(file) for file in clip_files(folder)]
    places = [(file, group) for file in files for group in range(file.num_row_groups)]
    picked = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, num_clips, dtype=int))]
    each = -(-num_clips // len(picked))  # as many of each row group as it takes to fill the sheet
    rows = [row for file, group in picked for row in file.read_row_group(group).slice(0, each).to_pylist()]
    lines = []
    for row in rows[:num_clips]:
        clip = decode_row(row)
        at = np.linspace(0, row["num_frames"] - 1, num_frames, dtype=int)
        latents = torch.tensor(clip["latent_mean"][at], dtype=vae.dtype, device=vae.device)
        pictures = ((vae.decode(latents).sample.float().clamp(-1, 1) + 1) * 127.5).round().byte()
        frames = pictures.permute(0, 2, 3, 1).cpu().numpy()
        poses = draw_poses(clip["keypoints"][at], row["height"], row["width"], stick_width)
        drawn = poses.any(axis=-1, keepdims=True)
        lines.append(np.concatenate(list(np.where(drawn, poses // 2 + frames // 2, frames)), axis=1))
    return np.concatenate(lines)
