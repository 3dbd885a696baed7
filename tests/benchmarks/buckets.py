"""Training on three buckets of equal area, relative to squares: CPU time of data and steps of `mini`, on one core.

python -m tests.benchmarks.buckets [ROUNDS]
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging

from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler
from tcan.pixels import to_controlnet_input
from tcan.weights import PretrainedModels, load_pretrained
from tests.benchmarks.timing import ratio, side_by_side
from tests.benchmarks.training import Trainer
from tests.training import write_dataset

PARTS = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")
BUCKETS = ((128, 128), (64, 256), (256, 64))
SQUARES = ((128, 128),) * 3
FRAMES = 16


def epoch(
    folder: Path, trainer: Trainer, stage: int, batch: int, sizes: tuple[tuple[int, int], ...]
) -> Callable[[], None]:
    """A function that trains the next three steps; each size has `batch` videos, so each bucket has one of the steps."""
    videos = {f"{i}-{number}": size for i, size in enumerate(sizes) for number in range(batch)}
    spans = {key: [(0, 2 * FRAMES)] for key in videos}
    dataset = write_dataset(folder, spans, 0, 0, buckets=videos)
    channels = trainer.pretrained.unet.config.in_channels
    sampler = Sampler(
        ClipStore(dataset), stage, seed=0, batch_size=batch, size=None, vae_scaling_factor=0.01, stick_width=2,
        frames=FRAMES, drop_reference=0.0,
    )  # fmt: skip
    steps = iter(range(1_000_000))

    def run() -> None:
        for _ in sizes:
            data = sampler.batch(next(steps), range(batch))
            latents = data.latents.repeat_interleave(channels // 4, dim=2)  # the datasets of tests have 4
            reference = data.reference.repeat_interleave(channels // 4, dim=1)
            trainer.step(latents, reference, to_controlnet_input(data.pose))

    return run


def measure(pretrained: PretrainedModels, stage: int, batch: int, rounds: int) -> str:
    trainer = Trainer(pretrained, stage)
    with tempfile.TemporaryDirectory() as name:
        sides = {
            kind: epoch(Path(name) / kind, trainer, stage, batch, sizes)
            for kind, sizes in (("squares", SQUARES), ("buckets", BUCKETS))
        }
        times = side_by_side(sides, rounds)
    found = ratio(times, "squares", "buckets")
    return (
        f"stage {stage}, {batch} samples: samples/s relative to squares {found.median:.3f} ({found.spread})"
    )


def main(rounds: int) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # migration between cores would add noise
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    pretrained = load_pretrained(**dict.fromkeys(PARTS, "mini"))
    print(f"load average {os.getloadavg()[0]:.1f}")
    for stage, batch in ((1, 16), (2, 1)):
        print(measure(pretrained, stage, batch, rounds), flush=True)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
