"""Stages 3 and 4 in one actor: decoded clips -> poses and latents.

Fused, since both read the same frames: between two stages these would cross the object store once more, and each
would need a device of its own.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL

from pipelines.config import PretrainedConfig
from pipelines.preprocess.latents import encode_frames
from pipelines.preprocess.pose import pack_people
from pipelines.preprocess.schemas import ENCODED_SCHEMA
from tcan.pose import PoseDetector
from tcan.pose.hands import FaceDetector, HandDetector
from tcan.weights import load_part, load_pose_detector


def load_models(pretrained: PretrainedConfig, device: str) -> tuple[PoseDetector, AutoencoderKL]:
    """The pose detector and the VAE (float32).

    Raises:
        UserError: a source that is not there or holds something else.
    """
    vae = load_part("vae", pretrained.vae).to(device).requires_grad_(False).eval()
    return load_pose_detector(pretrained.pose, device), vae


def load_part_detectors(
    pose: str, hands: bool, face: bool, device: str
) -> dict[str, HandDetector | FaceDetector]:
    """What finds "hands" and "faces", of those asked for.

    Raises:
        UserError: as `HandDetector.from_pretrained`.
    """
    detectors: dict[str, HandDetector | FaceDetector] = {}
    if hands:
        detectors["hands"] = HandDetector.from_pretrained(pose, device)
    if face:
        detectors["faces"] = FaceDetector.from_pretrained(pose, device)
    return detectors


class PoseAndLatents:
    """The actor: rows of DECODED_SCHEMA -> rows of ENCODED_SCHEMA; ends of videos pass through."""

    def __init__(
        self,
        pretrained: PretrainedConfig,
        batch_frames: int,
        device: str,
        hands: bool = False,
        face: bool = False,
    ) -> None:
        torch.set_num_threads(1)  # the CPU that Ray reserved; torch would take all of the machine's
        self.detector, self.vae = load_models(pretrained, device)
        self.parts = load_part_detectors(pretrained.pose, hands, face, device)
        self.batch_frames = batch_frames

    def __call__(self, clips: pa.Table) -> pa.Table:
        frames = clips["frames"]
        rows = clips.drop_columns(["frames"]).to_pylist()
        for i, row in enumerate(rows):
            if frames[i].is_valid:
                # as_buffer: a view of the object store, no copy.
                images = np.frombuffer(frames[i].as_buffer(), np.uint8)
                row.update(self._encode(images.reshape(-1, row["height"], row["width"], 3)))
        return pa.Table.from_pylist(rows, ENCODED_SCHEMA)

    def _encode(self, frames: np.ndarray) -> dict[str, Any]:
        height, width = frames.shape[1:3]
        # `batch_frames` of a square fill the device's memory; wide ones are fewer.
        batch = max(1, self.batch_frames * min(height, width) // max(height, width))
        mean, logvar = encode_frames(self.vae, frames, batch)
        if not (np.isfinite(mean).all() and np.isfinite(logvar).all()):
            return {"stage": "latents", "reason": "the VAE's latents are not finite in float16"}
        # Detectors fit a image's height to their network: people of a tall one would be smaller than in its square.
        zoom = height / min(height, width)
        found = self.detector.detect(frames, batch, zoom)
        people_per_frame, people = pack_people(found)
        parts = {
            name: pack_people(detector.detect(frames, found))[1] for name, detector in self.parts.items()
        }
        return parts | {
            "people_per_frame": people_per_frame,
            "people": people,
            "latent_mean": mean.tobytes(),
            "latent_logvar": logvar.tobytes(),
        }
