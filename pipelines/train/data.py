"""The samples of a training step, as a function of the seed, the stage, the step and the index in the global batch.

They depend neither on the number of workers nor on restarts: each sample has its own random generator, keyed by these
numbers, so any worker can create any sample without the earlier ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.config import DrawConfig
from pipelines.dataset import LATENT_STRIDE
from pipelines.dataset_index import FRAME_COLUMNS
from pipelines.train.clips import ClipStore, Video
from pipelines.train.order import VideoOrder
from tcan.errors import UserError
from tcan.pixels import to_controlnet_input
from tcan.pose import PoseErrors, draw_poses
from tcan.pose.draw import PoseStyle
from tcan.pose.parts import join_parts

# Purpose of a generator: the entry after seed and stage in its key. `VideoOrder` uses 0 and 3.
_SAMPLE, _ERRORS = 1, 2
MIN_DISTANCE, MAX_DISTANCE_SHORT_OF_LENGTH = 30, 31  # frames between reference and target: U[30, L - 31]
TIMESTEPS = 1000
NO_ERRORS = PoseErrors()
BODY_ONLY = DrawConfig()


def stage1_pair(length: int, rng: np.random.Generator) -> tuple[int, int]:
    """Positions of reference and target in a video of `length` >= 2 frames (paper, "Training").

    Reference: any frame. Target: (reference + U[30, L - 31]) mod L; any other frame if that range is empty.
    """
    reference = int(rng.integers(length))
    low, high = MIN_DISTANCE, length - MAX_DISTANCE_SHORT_OF_LENGTH
    if high < low:
        low, high = 1, length - 1
    return reference, (reference + int(rng.integers(low, high + 1))) % length


@dataclass(frozen=True)
class Batch:
    """B samples of F frames (stage 1: F = 1); latents are multiplied by the VAE's scaling factor."""

    latents: Tensor
    """float32 `[B, F, 4, h, w]`, sampled from the VAE's posterior."""
    noise: Tensor
    """float32 `[B, F, 4, h, w]`."""
    timestep: Tensor
    """int64 `[B]`."""
    pose: Tensor
    """Drawn poses, uint8 `[B, F, H, W, 3]`."""
    reference: Tensor
    """float32 `[B, 4, h, w]`, the mean of the VAE's posterior."""
    reference_mask: Tensor
    """bool `[B]`: whether the sample has its reference; False for unconditional samples, which guidance needs."""

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """The tensors on the device, with `pose` as float32 `[B, F, 3, H, W]` in [0, 1].

        `reference_mask` stays on the host as a list: the model branches on it.
        """
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {key: tensor.to(device, non_blocking=True) for key, tensor in tensors.items()}
        pose = to_controlnet_input(tensors["pose"])
        return tensors | {"pose": pose, "reference_mask": self.reference_mask.tolist()}

    def pin_memory(self) -> "Batch":
        """A copy in pinned memory. `torch.utils.data.DataLoader` calls it, too."""
        return Batch(**{field.name: getattr(self, field.name).pin_memory() for field in fields(self)})


class Sampler:
    """Creates sample i of step k: an image in stage 1, a clip in stage 2. `VideoOrder` chooses its video.

    Args:
        batch_size: the global one.
        size: side of the training image in pixels; a larger canvas is cropped on the latent grid. None: the size of the
            video's clips, of which there may be several (buckets).
        mixed: a global batch may contain videos of several sizes; only for batches of single samples.
        reference: "random" frame or "first" frame; None: the paper's, random in stage 1 and first in stage 2.
        pose_errors: applied to the poses of stage 2; they depend on seed, step and index only.
        noise_offset: scale of a normal number per channel, added to the noise of all positions and frames of a sample.
        draw: parts of the pose images next to the body; the dataset must have their columns.

    Raises:
        UserError: no video of the store is long enough.
    """

    def __init__(
        self,
        store: ClipStore,
        stage: int,
        *,
        seed: int,
        batch_size: int,
        size: int | None,
        vae_scaling_factor: float,
        stick_width: int,
        frames: int,
        drop_reference: float,
        reference: Literal["first", "random"] | None = None,
        noise_offset: float = 0.0,
        pose_errors: PoseErrors = NO_ERRORS,
        mixed: bool = False,
        draw: DrawConfig = BODY_ONLY,
        pose_style: PoseStyle = "skeleton",
    ):
        self.parts = ["hands"] * draw.hands + ["faces"] * draw.face  # columns of the dataset
        self.store, self.stage, self.seed, self.batch_size, self.size = store, stage, seed, batch_size, size
        self.scaling, self.stick_width, self.pose_style = vae_scaling_factor, stick_width, pose_style
        self.frames = frames if stage == 2 else 1
        self.drop_reference = drop_reference if stage == 1 else 0.0
        self.reference = reference or ("random" if stage == 1 else "first")
        self.noise_offset = noise_offset
        self.pose_errors = pose_errors if stage == 2 else NO_ERRORS
        shortest = frames if stage == 2 else 2
        self.videos = store.videos_with(shortest, consecutive=stage == 2)  # indices of the store's videos
        if not len(self.videos):
            raise UserError(
                f"stage {stage}: no video of the split has {shortest} {'consecutive ' * (stage == 2)}frames; "
                "preprocess longer videos"
            )
        buckets = np.zeros(len(self.videos), np.int64)
        if size is None and not mixed:
            buckets = np.unique(store.sizes(self.videos), axis=0, return_inverse=True)[1]
        self._order = VideoOrder(buckets, batch_size, self._rng)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.stage, *key])))

    def video(self, step: int, index: int) -> Video:
        return self.store.video(self.videos[self._order.video(step, index)])

    def sample(self, step: int, index: int) -> dict[str, np.ndarray]:
        """One sample: the fields of `Batch` without the batch axis."""
        rng = self._rng(_SAMPLE, step, index)
        video = self.video(step, index)
        length = len(video)
        stored = (*FRAME_COLUMNS, *self.parts)
        if self.stage == 2:
            start = int(rng.choice(video.starts(self.frames)))
            target = self.store.frames(video, np.arange(start, start + self.frames), stored)
            reference_at = int(rng.integers(length)) if self.reference == "random" else None
        elif self.reference == "random":
            reference_at, target_at = stage1_pair(length, rng)
            target = self.store.frames(video, [target_at], stored)
        else:
            reference_at = None
            target = self.store.frames(video, [int(rng.integers(1, length))], stored)
        if reference_at is None:
            reference = self.store.reference_latent(video)
        else:
            reference = self.store.frames(video, [reference_at], ["latent_mean"])["latent_mean"][0]

        canvas_height, canvas_width = reference.shape[-2:]
        rows = columns = (self.size or 0) // LATENT_STRIDE
        if self.size is None:
            rows, columns = canvas_height, canvas_width
        y, x = int(rng.integers(canvas_height - rows + 1)), int(rng.integers(canvas_width - columns + 1))
        crop = (..., slice(y, y + rows), slice(x, x + columns))
        height, width = rows * LATENT_STRIDE, columns * LATENT_STRIDE
        mean, logvar = (target[key][crop].astype(np.float32) for key in ("latent_mean", "latent_logvar"))
        keypoints = join_parts(target["keypoints"], target.get("hands"), target.get("faces"))
        keypoints[..., :2] -= (
            np.float32(LATENT_STRIDE) * np.array([x, y], np.float32) * (keypoints[..., 2:] > 0)
        )
        # A separate generator, so that pose errors do not change the other random numbers.
        errors = self._rng(_ERRORS, step, index)
        keypoints = self.pose_errors.apply(keypoints, min(height, width), errors)

        timestep = rng.integers(TIMESTEPS)
        has_reference = rng.random() >= self.drop_reference
        # AutoencoderKL clamps the log-variance in the same way.
        posterior = mean + np.exp(0.5 * np.clip(logvar, -30, 20)) * rng.standard_normal(
            mean.shape, np.float32
        )
        noise = rng.standard_normal(mean.shape, np.float32)
        if self.noise_offset:
            channels = rng.standard_normal((1, mean.shape[1], 1, 1), np.float32)
            noise += np.float32(self.noise_offset) * channels
        return {
            "latents": posterior * np.float32(self.scaling),
            "noise": noise,
            "timestep": np.int64(timestep),
            "pose": draw_poses(keypoints, height, width, self.stick_width, self.pose_style),
            "reference": reference[crop].astype(np.float32) * np.float32(self.scaling),
            "reference_mask": np.bool_(has_reference),
        }

    def batch(self, step: int, indices: Sequence[int]) -> Batch:
        samples = [self.sample(step, index) for index in indices]
        return Batch(**{key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in samples[0]})

    def worker_batches(self, step: int, rank: int, workers: int, micro_batch: int) -> list[Batch]:
        """The micro-batches of a worker in a step, one per gradient accumulation. All workers' together are the global batch."""
        stride = workers * micro_batch
        firsts = range(rank * micro_batch, self.batch_size, stride)
        return [self.batch(step, range(first, first + micro_batch)) for first in firsts]


def join_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Concatenate the batches of equal sizes, in the order of the first one of each size."""
    by_size: dict[tuple[int, ...], list[Batch]] = {}
    for batch in batches:
        by_size.setdefault(batch.latents.shape[1:], []).append(batch)
    return [
        Batch(**{field.name: torch.cat([getattr(b, field.name) for b in group]) for field in fields(Batch)})
        for group in by_size.values()
    ]
