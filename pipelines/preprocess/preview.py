"""A image of what the dataset holds: frames of a few clips, decoded from their latents, with the poses drawn over."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from pipelines.dataset import clip_files, decode_row
from pipelines.preprocess.pose import unpack_people
from pipelines.storage import open_parquet
from tcan.pose import draw_poses


def contact_sheet(
    folder: str, vae: AutoencoderKL, stick_width: int, num_clips: int = 6, num_frames: int = 8, seed: int = 0
) -> np.ndarray:
    """uint8 RGB `[clips * H, frames * W, 3]`: a line a clip, of clips drawn at random and frames evenly spread.

    The main person's pose is in colour, everybody else's in grey; hands and faces, if the dataset has them, are white dots.
    """
    lines = [_line(row, vae, stick_width, num_frames) for row in _random_clips(folder, num_clips, seed)]
    return np.concatenate(lines)


def _random_clips(folder: str, count: int, seed: int) -> list[dict[str, Any]]:
    rows_of: dict[tuple[str, int], int] = {}
    for name in clip_files(folder):
        with open_parquet(name) as file:
            for group in range(file.num_row_groups):
                rows_of[name, group] = file.metadata.row_group(group).num_rows
    places = [(*group, at) for group, rows in rows_of.items() for at in range(rows)]
    picked = np.random.default_rng(seed).permutation(len(places))[:count]
    rows = []
    for name, group, at in (places[i] for i in sorted(picked)):
        with open_parquet(name) as file:
            rows += file.read_row_group(group).slice(at, 1).to_pylist()
    return rows


@torch.inference_mode()
def _line(row: dict[str, Any], vae: AutoencoderKL, stick_width: int, num_frames: int) -> np.ndarray:
    """[H, frames * W, 3]"""
    clip = decode_row(row)
    at = np.linspace(0, row["num_frames"] - 1, num_frames, dtype=int)
    latents = torch.tensor(clip["latent_mean"][at], dtype=vae.dtype, device=vae.device)
    images = ((vae.decode(latents).sample.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    frames = images.permute(0, 2, 3, 1).cpu().numpy()
    size = (row["height"], row["width"], stick_width)
    people = unpack_people(row["people_per_frame"], row["people"])
    for frame, i in zip(frames, at, strict=True):
        others = (
            np.delete(people[i], row["main_person"][i], axis=0) if row["main_person"][i] >= 0 else people[i]
        )
        if len(others):
            drawn = draw_poses(others, *size).any(axis=(0, -1))
            frame[drawn] = frame[drawn] // 2 + 64
    poses = draw_poses(clip["keypoints"][at], *size)
    drawn = poses.any(axis=-1, keepdims=True)
    frames = np.where(drawn, poses // 2 + frames // 2, frames)
    ends = np.cumsum(row["people_per_frame"])
    for points in (clip[name] for name in ("hands", "faces") if name in clip):
        for frame, i in zip(frames, at, strict=True):
            _draw_points(frame, points[ends[i] - row["people_per_frame"][i] : ends[i]])
    return np.concatenate(list(frames), axis=1)


def _draw_points(frame: np.ndarray, points: np.ndarray) -> None:
    """White dots on `[H, W, 3]` at the points found of `[..., 3]`."""
    x, y = points[points[..., 2] > 0][:, :2].astype(int).T
    inside = (x >= 0) & (x < frame.shape[1]) & (y >= 0) & (y < frame.shape[0])
    frame[y[inside], x[inside]] = 255
