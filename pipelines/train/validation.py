"""Validation loss on fixed clips, timesteps and noise, and sample images."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.train.data import TIMESTEPS, Batch, Sampler, join_batches
from tcan.errors import UserError
from tcan.pixels import from_vae_output
from tcan.weights import PretrainedModels

BANDS = 4  # of timesteps
IMAGE_SAMPLES = {1: 4, 2: 1}  # rows of a sample image, by stage
IMAGE_COLUMNS = 4  # of these frames of a clip, evenly spaced
IMAGE_STEPS = 10  # DDIM steps: enough to see the quality, cheap compared with training

MakeSampler = Callable[[str, int], Sampler]  # (split, batch size)


def validation_sampler(make_sampler: MakeSampler, batch_size: int) -> Sampler | None:
    """A sampler of the validation split; None if the split has no clip for this stage."""
    try:
        return make_sampler("validation", batch_size)
    except UserError:
        return None


class Validation:
    """The loss per band of timesteps, on the same samples, noise and timesteps each time, sharded over the workers."""

    def __init__(self, sampler: Sampler, samples: int):
        rank, workers = dist.get_rank(), dist.get_world_size()
        # Every worker runs the same number of passes, because ZeRO-3 gathers weights in each. Padding has weight 0.
        indices = range(rank, -(-samples // workers) * workers, workers)
        self._batches = [
            (
                band,
                float(index < samples),
                self._at_timestep(sampler.batch(0, [index % samples]), band, index, samples),
            )
            for index in indices
            for band in range(BANDS)
        ]

    @staticmethod
    def _at_timestep(batch: Batch, band: int, index: int, samples: int) -> Batch:
        """The batch with a timestep of this band, evenly spaced over the samples, and always with the reference."""
        timestep = int((band + (index % samples + 0.5) / samples) * TIMESTEPS / BANDS)
        return dataclasses.replace(
            batch, timestep=torch.tensor([timestep]), reference_mask=torch.tensor([True])
        )

    @torch.no_grad()
    def compute(self, loss: Callable[[Batch], Tensor], device: torch.device) -> dict[str, float]:
        """The validation metrics over all workers. Called by all workers."""
        sums = torch.zeros(BANDS, 2, device=device)
        for band, weight, batch in self._batches:
            sums[band] += torch.stack([weight * loss(batch), torch.tensor(weight, device=device)])
        dist.all_reduce(sums)
        means = (sums[:, 0] / sums[:, 1]).cpu().tolist()
        width = TIMESTEPS // BANDS
        names = [f"validation_loss_t{band * width:03d}-{(band + 1) * width - 1:03d}" for band in range(BANDS)]
        return {"validation_loss": sum(means) / BANDS, **dict(zip(names, means, strict=True))}


class SampleImages:
    """Fixed samples of the validation split (of the train split if it is empty), denoised without guidance."""

    def __init__(
        self, make_sampler: MakeSampler, stage: int, pretrained: PretrainedModels, device: torch.device
    ):
        count = IMAGE_SAMPLES[stage]
        sampler = validation_sampler(make_sampler, count) or make_sampler("train", count)
        self._batches, self._device = join_batches([sampler.batch(0, [i]) for i in range(count)]), device
        self._vae = pretrained.vae.to(device)
        self._scheduler: Any = type(pretrained.scheduler).from_config(pretrained.scheduler.config)
        self._scheduler.set_timesteps(IMAGE_STEPS)  # on the host, which needs their values at each step
        self._truth = [self._decode(batch.latents) for batch in self._batches]
        self._reference = [self._decode(batch.reference[:, None]) for batch in self._batches]

    @torch.no_grad()
    def draw(self, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """Render the sample image and clip.

        Returns:
            An image, uint8 `[H, W, 3]`, one row per sample: reference, then pose, prediction and ground truth of a few
            frames; and the first sample's clip, uint8 `[F, H, W, 3]`: pose, prediction and ground truth side by side.
        """
        predictions = [self._predict(model, batch) for batch in self._batches]
        rows = []
        for batch, reference, prediction, truth in zip(
            self._batches, self._reference, predictions, self._truth, strict=True
        ):
            parts = (batch.pose.numpy(), prediction, truth)
            frames = sorted({round(i) for i in np.linspace(0, truth.shape[1] - 1, IMAGE_COLUMNS)})
            rows += [
                np.concatenate([reference[i, 0], *(part[i, f] for f in frames for part in parts)], axis=1)
                for i in range(len(truth))
            ]
        width = max(row.shape[1] for row in rows)
        image = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
        first = (self._batches[0].pose.numpy(), predictions[0], self._truth[0])
        return image, np.concatenate([part[0] for part in first], axis=2)

    def _predict(self, model: nn.Module, batch: Batch) -> np.ndarray:
        """Denoise the samples of a batch: uint8 RGB `[B, F, H, W, 3]`."""
        t = batch.inputs(self._device)
        latents = t["noise"]
        for step in self._scheduler.timesteps:
            timestep = step.expand(len(latents)).to(self._device, non_blocking=True)
            eps = model(latents, timestep, t["pose"], t["reference"])
            latents = self._scheduler.step(eps.float(), step, latents).prev_sample
        return self._decode(latents)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> np.ndarray:
        """Scaled latents `[B, F, 4, h, w]` -> uint8 RGB `[B, F, H, W, 3]`."""
        shape = latents.shape[:2]
        unscaled = latents.flatten(0, 1).to(self._device, self._vae.dtype) / self._vae.config.scaling_factor
        images = torch.cat([self._vae.decode(frame[None]).sample for frame in unscaled])
        frames = (from_vae_output(images.float()) * 255).round().to(torch.uint8)
        return frames.unflatten(0, shape).cpu().numpy()
