"""Cache of rendered puppet frames on disk, for training the mini weights."""

import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.puppets.world import Distribution, sample_clip
from tcan.atomic_write import atomic_write
from tcan.errors import UserError

SIZE = 128
CHARACTERS = 5000
"""Characters in the image corpus. Many, because the image models must generalize over appearance."""
FRAMES_EACH = 3
CLIPS = 600
CLIP_FRAMES = 16
HELD_OUT_SEED = 10_000_000
"""Seeds from this value on are not used for training."""


@dataclass(frozen=True)
class Rendered:
    """Rendered frames: `frames` uint8 `[N, F, H, W, 3]`, `keypoints` `[N, F, 18, 3]`, `masks` bool `[N, F, H, W]`."""

    frames: np.ndarray
    keypoints: np.ndarray
    masks: np.ndarray

    def sample(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample frames `[B, H, W, 3]`, keypoints `[B, 18, 3]` and masks `[B, H, W]` of `count` different characters."""
        which = np.sort(rng.choice(len(self.frames), count, replace=False))
        frame = rng.integers(self.frames.shape[1])
        return self.frames[which, frame], self.keypoints[which, frame], self.masks[which, frame]


def render(seeds: range, frames_each: int, every: int, distribution: Distribution = "wide") -> Rendered:
    """Render one clip per seed: `frames_each` frames, `every` frames apart."""
    clips = [sample_clip(distribution, seed, frames_each, SIZE, every=every) for seed in seeds]
    return Rendered(
        np.stack([clip.frames for clip in clips]),
        np.stack([clip.keypoints for clip in clips]),
        np.stack([clip.mask for clip in clips]),
    )


def render_held_out(distribution: Distribution, count: int) -> Rendered:
    """Render three frames each of `count` characters that are not used for training."""
    return render(
        range(HELD_OUT_SEED, HELD_OUT_SEED + count), FRAMES_EACH, every=17, distribution=distribution
    )


def cached(folder: Path, name: str, count: int, frames_each: int, every: int, first_seed: int) -> Rendered:
    """As `render`, cached in `folder` as memory-mapped arrays. Renders on all cores, 100 clips per task.

    Raises:
        UserError: the folder contains another number of clips.
    """
    paths = [folder / f"{name}-{part}.npy" for part in ("frames", "keypoints", "masks")]
    if not all(path.exists() for path in paths):
        tasks = [range(first_seed + i, first_seed + min(i + 100, count)) for i in range(0, count, 100)]
        shapes = [
            (count, frames_each, SIZE, SIZE, 3),
            (count, frames_each, 18, 3),
            (count, frames_each, SIZE, SIZE),
        ]
        kinds = [np.uint8, np.float32, np.bool_]
        with ExitStack() as stack, ProcessPoolExecutor(os.cpu_count()) as pool:
            arrays = [
                np.lib.format.open_memmap(
                    stack.enter_context(atomic_write(path)), "w+", dtype=kind, shape=shape
                )
                for path, kind, shape in zip(paths, kinds, shapes, strict=True)
            ]
            done = 0
            futures = [pool.submit(render, task, frames_each, every) for task in tasks]
            for task, future in zip(tasks, futures, strict=True):
                rendered = future.result()
                for array, part in zip(
                    arrays, (rendered.frames, rendered.keypoints, rendered.masks), strict=True
                ):
                    array[done : done + len(task)] = part
                done += len(task)
            for array in arrays:
                array.flush()
    rendered = Rendered(*(np.load(path, mmap_mode="r") for path in paths))
    if len(rendered.frames) != count:
        raise UserError(
            f"{folder}: contains {len(rendered.frames)} {name}, not {count}; set the same number, or use another folder"
        )
    return rendered


def image_corpus(folder: Path, characters: int) -> Rendered:
    """Three frames each of this number of characters, cached in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # 17 frames are 0.7 s, enough for another pose of the same dance.
    return cached(folder, "images", characters, FRAMES_EACH, every=17, first_seed=0)


def clip_corpus(folder: Path, clips: int, first_seed: int) -> Rendered:
    """Clips of `CLIP_FRAMES` frames, cached in `folder`. Their seeds follow those of the characters of `image_corpus`."""
    folder.mkdir(parents=True, exist_ok=True)
    return cached(folder, "clips", clips, CLIP_FRAMES, every=1, first_seed=first_seed)
