"""A contact sheet of a clip dataset: frames of a few clips, decoded from their latents, with their poses drawn on top."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from pipelines.dataset import decode_row
from pipelines.dataset_index import read_index
from pipelines.preprocess.pose import unpack_people
from pipelines.storage import open_parquet
from tcan.pixels import from_vae_output, to_uint8
from tcan.pose import draw_poses


def contact_sheet(
    folder: str, vae: AutoencoderKL, stick_width: int, num_clips: int = 6, num_frames: int = 8, seed: int = 0
) -> np.ndarray:
    """uint8 RGB: one row per randomly chosen clip, with evenly spaced frames; narrower rows are padded.

    The poses that training draws are in color, those of other people in gray. Hands and faces, if the dataset has them, are drawn
    as white dots.
    """
    lines = [_draw_clip(row, vae, stick_width, num_frames) for row in _random_clips(folder, num_clips, seed)]
    width = max(line.shape[1] for line in lines)
    return np.concatenate([np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0))) for line in lines])


def _random_clips(folder: str, count: int, seed: int) -> list[dict[str, Any]]:
    index = read_index(folder)
    chosen = np.random.default_rng(seed).permutation(len(index))[:count]
    clips = []
    for clip in index.select(["file", "row_group", "row"]).take(sorted(chosen)).to_pylist():
        with open_parquet(f"{folder}/{clip['file']}") as file:
            clips += file.read_row_group(clip["row_group"]).slice(clip["row"], 1).to_pylist()
    return clips


@torch.inference_mode()
def _draw_clip(row: dict[str, Any], vae: AutoencoderKL, stick_width: int, num_frames: int) -> np.ndarray:
    """One row of the contact sheet: uint8 RGB `[H, frames * W, 3]`."""
    clip = decode_row(row)
    indices = np.linspace(0, row["num_frames"] - 1, num_frames, dtype=int)
    latents = torch.tensor(clip["latent_mean"][indices], dtype=vae.dtype, device=vae.device)
    frames = to_uint8(from_vae_output(vae.decode(latents).sample).cpu().numpy())
    size = (row["height"], row["width"], stick_width)
    people = unpack_people(row["people_per_frame"], row["people"])
    for frame, i in zip(frames, indices, strict=True):
        main = row["main_person"][i]
        others = np.delete(people[i], main, axis=0) if main >= 0 else people[i]
        if len(others):
            drawn = draw_poses(others, *size).any(axis=(0, -1))
            frame[drawn] = frame[drawn] // 2 + 64
    poses = draw_poses(clip["keypoints"][indices], *size)
    drawn = poses.any(axis=-1, keepdims=True)
    frames = np.where(drawn, poses // 2 + frames // 2, frames)
    ends = np.cumsum(row["people_per_frame"])
    for points in (clip[name] for name in ("hands", "faces") if name in clip):
        for frame, i in zip(frames, indices, strict=True):
            _draw_points(frame, points[ends[i] - row["people_per_frame"][i] : ends[i]])
    return np.concatenate(list(frames), axis=1)


def _draw_points(frame: np.ndarray, points: np.ndarray) -> None:
    """Draw white dots on a frame `[H, W, 3]` at the detected points of `[..., 3]`."""
    x, y = points[points[..., 2] > 0][:, :2].astype(int).T
    inside = (x >= 0) & (x < frame.shape[1]) & (y >= 0) & (y < frame.shape[0])
    frame[y[inside], x[inside]] = 255
