"""What a training is judged by: the loss on fixed clips, timesteps and noise, and samples to look at."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.train.data import TIMESTEPS, Batch, Sampler
from tcan.errors import UserError
from tcan.weights import PretrainedModels

BANDS = 4
IMAGE_SAMPLES = {1: 4, 2: 1}  # rows of a sample image, by stage
IMAGE_COLUMNS = 4  # of these frames of a clip, evenly spaced
IMAGE_STEPS = 10  # DDIM steps: enough to judge by, few enough not to matter

Samplers = Callable[[str, int], Sampler]  # (split, batch size)


def validation_sampler(make: Samplers, batch_size: int) -> Sampler | None:
    """Of the validation split; None when that has no clip for this stage."""
    try:
        return make("validation", batch_size)
    except UserError:
        return None


class Validation:
    """The loss per band of timesteps: the same samples, noise and timesteps each time, each on one worker or another."""

    def __init__(self, sampler: Sampler, samples: int):
        rank, workers = dist.get_rank(), dist.get_world_size()
        # The same number on every worker, since ZeRO-3 exchanges weights in each pass; what is too many weighs nothing.
        indices = range(rank, -(-samples // workers) * workers, workers)
        self._batches = [
            (
                band,
                float(index < samples),
                self._at(sampler.batch(0, [index % samples]), band, index, samples),
            )
            for index in indices
            for band in range(BANDS)
        ]

    @staticmethod
    def _at(batch: Batch, band: int, index: int, samples: int) -> Batch:
        """With its timestep in this band, the samples' spread evenly over it, and never without the reference."""
        timestep = int((band + (index % samples + 0.5) / samples) * TIMESTEPS / BANDS)
        return dataclasses.replace(
            batch, timestep=torch.tensor([timestep]), reference_mask=torch.tensor([True])
        )

    @torch.no_grad()
    def measure(self, loss: Callable[[Batch], Tensor], device: torch.device) -> dict[str, float]:
        """The metrics, of all workers together. Called by all workers."""
        sums = torch.zeros(BANDS, 2, device=device)
        for band, weight, batch in self._batches:
            sums[band] += torch.stack([weight * loss(batch), torch.tensor(weight, device=device)])
        dist.all_reduce(sums)
        means = (sums[:, 0] / sums[:, 1]).tolist()
        width = TIMESTEPS // BANDS
        names = [f"validation_loss_t{band * width:03d}-{(band + 1) * width - 1:03d}" for band in range(BANDS)]
        return {"validation_loss": sum(means) / BANDS, **dict(zip(names, means, strict=True))}


class Samples:
    """Fixed samples of the validation split (of the train split when that has none), denoised from their noise. Without
    guidance: the model as it is.

    on_device: a batch -> its tensors as the model takes them.
    """

    def __init__(
        self,
        make: Samplers,
        stage: int,
        pretrained: PretrainedModels,
        device: torch.device,
        on_device: Callable[[Batch], dict[str, Tensor]],
    ):
        count = IMAGE_SAMPLES[stage]
        sampler = validation_sampler(make, count) or make("train", count)
        self._batch, self._device, self._on_device = sampler.batch(0, range(count)), device, on_device
        self._vae = pretrained.vae.to(device)
        self._scheduler: Any = type(pretrained.scheduler).from_config(pretrained.scheduler.config)
        self._scheduler.set_timesteps(IMAGE_STEPS, device=device)
        self._truth = self._decode(self._batch.latents)
        self._reference = self._decode(self._batch.reference[:, None])

    @torch.no_grad()
    def draw(self, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """A image, uint8 `[H, W, 3]`, one row a sample: reference, then pose, prediction and truth of a few frames;
        and the first sample's clip, uint8 `[F, H, W, 3]`: pose, prediction and truth beside each other."""
        t = self._on_device(self._batch)
        latents = t["noise"]
        for step in self._scheduler.timesteps:
            eps = model(latents, step.expand(len(latents)), t["pose"], t["reference"])
            latents = self._scheduler.step(eps.float(), step, latents).prev_sample
        prediction = self._decode(latents)
        frames = sorted({round(i) for i in np.linspace(0, latents.shape[1] - 1, IMAGE_COLUMNS)})
        pose = self._batch.pose.numpy()
        rows = [
            [self._reference[i, 0], *(part[i, f] for f in frames for part in (pose, prediction, self._truth))]
            for i in range(len(latents))
        ]
        image = np.concatenate([np.concatenate(row, axis=1) for row in rows])
        return image, np.concatenate([pose[0], prediction[0], self._truth[0]], axis=2)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> np.ndarray:
        """Scaled latents [B, F, 4, h, w] -> uint8 [B, F, H, W, 3]."""
        shape = latents.shape[:2]
        unscaled = latents.flatten(0, 1).to(self._device, self._vae.dtype) / self._vae.config.scaling_factor
        images = torch.cat([self._vae.decode(frame[None]).sample for frame in unscaled])
        images = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return images.unflatten(0, shape).movedim(2, -1).cpu().numpy()
