"""Pose detection and VAE encoding in one actor: decoded clips -> poses and latents.

Both read the same frames. As separate operators, they would transfer the frames through the object store twice, and each
would need its own GPU.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL

from pipelines.config import PretrainedConfig
from pipelines.preprocess.latents import EncodedFrames
from pipelines.preprocess.pose import pack_people
from pipelines.preprocess.schemas import ENCODED_SCHEMA
from tcan.acceleration import compile_for_frames, use_fast_formats
from tcan.errors import UserError
from tcan.pose import OpenPose
from tcan.pose.hands import OpenPoseParts
from tcan.pose.onnx import OnnxPose
from tcan.pose.openpose import body_detector
from tcan.pose.parts import BODY, FACE, HANDS
from tcan.weights import load_part, load_pose_detector
from tcan.weights.common import quiet


def load_models(
    pretrained: PretrainedConfig, device: str, hands: bool = False, face: bool = False
) -> tuple[OpenPose | OnnxPose | OpenPoseParts, AutoencoderKL]:
    """Load the pose detector, optionally of hands and face, and the VAE (float32).

    Raises:
        UserError: a source does not exist or contains another model.
    """
    vae = load_part("vae", pretrained.vae).to(device).requires_grad_(False).eval()
    return load_pose_detector(pretrained.pose, device, hands, face), vae


WARM_UP_SIZE = (64, 128)
"""Height and width in pixels of the frames for which networks are compiled. Not square: torch would assume equal sides."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class PoseAndLatents:
    """Actor: rows of DECODED_SCHEMA -> rows of ENCODED_SCHEMA. Rows without frames pass through.

    Several threads may call it: while one decodes poses on the CPU, the GPU computes for another. Each thread has a CUDA
    stream of its own, so copies overlap with computation.

    compiled: compile the body network and the VAE's encoder, here, before several threads use them.
    """

    def __init__(
        self,
        pretrained: PretrainedConfig,
        batch_frames: int,
        device: str,
        hands: bool = False,
        face: bool = False,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        torch.set_num_threads(1)  # Ray reserves one CPU; torch would use all CPUs of the node
        self.detector, self.vae = load_models(pretrained, device, hands, face)
        self.parts = {"hands": HANDS} if hands else {}
        self.parts |= {"faces": FACE} if face else {}
        # ONNX files have their own precision, formats and compilation.
        body = body_detector(self.detector)
        networks = [body.network] if isinstance(body, OpenPose) else []
        if precision != "fp32":
            with quiet():
                for network in (self.vae, *networks):
                    network.to(DTYPES[precision])
        self.batch_frames = batch_frames
        self._of_thread = threading.local()
        use_fast_formats(self.vae.device, self.vae, *networks)
        if compiled:
            for network in (self.vae.encoder, *networks):
                compile_for_frames(network)
            self.encode(np.zeros((min(2, batch_frames), *WARM_UP_SIZE, 3), np.uint8))

    def __call__(self, clips: pa.Table) -> pa.Table:
        frames = clips["frames"]
        rows = clips.drop_columns(["frames"]).to_pylist()
        for i, row in enumerate(rows):
            if frames[i].is_valid:
                # as_buffer: a view of the object store without a copy.
                images = np.frombuffer(frames[i].as_buffer(), np.uint8)
                try:
                    with self._stream():
                        row.update(self.encode(images.reshape(-1, row["height"], row["width"], 3)))
                except torch.OutOfMemoryError:
                    raise UserError(
                        f"preprocess.batch_frames = {self.batch_frames}: out of GPU memory; lower it (see tcan memory "
                        "--job preprocess), or raise preprocess.gpus_per_actor if actors share a GPU"
                    ) from None
        return pa.Table.from_pylist(rows, ENCODED_SCHEMA)

    def _stream(self) -> AbstractContextManager:
        """Context in which the GPU's work of this thread is in its own stream."""
        if self.vae.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream()
        return torch.cuda.stream(self._of_thread.stream)

    def encode(self, frames: np.ndarray) -> dict[str, Any]:
        """Columns of ENCODED_SCHEMA of a clip, uint8 `[F, H, W, 3]`."""
        height, width = frames.shape[1:3]
        # `batch_frames` applies to square frames; the batch is smaller for wide ones to use the same memory.
        batch = max(1, self.batch_frames * min(height, width) // max(height, width))
        latents = EncodedFrames(self.vae, frames, batch)  # the device works on them until `numpy`
        # Detectors scale frames to a fixed height, so people in tall frames would be smaller than in the square crop.
        zoom = height / min(height, width)
        people = self.detector.detect(frames, batch, zoom)
        mean, logvar = latents.numpy()
        if not (np.isfinite(mean).all() and np.isfinite(logvar).all()):
            return {"step": "latents", "reason": "the VAE's latents are not finite in float16"}
        people_per_frame, packed = pack_people([found[:, BODY] for found in people])
        parts = {
            name: pack_people([found[:, part] for found in people])[1] for name, part in self.parts.items()
        }
        return parts | {
            "people_per_frame": people_per_frame,
            "people": packed,
            "latent_mean": mean.tobytes(),
            "latent_logvar": logvar.tobytes(),
        }
