"""Puppet world: seeded synthetic clips of dancing characters with ground-truth keypoints.

It replaces videos of people in the demo and in tests. `wide` pretrains the mini weights; `dance` trains and evaluates
TCAN; `bizarre`, with body proportions outside the other distributions, evaluates generalization.
"""

import json
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipelines.puppets.character import Distribution, sample_character
from pipelines.puppets.motion import sample_choreography
from pipelines.puppets.render import render
from pipelines.puppets.scene import sample_background
from tcan.atomic_write import atomic_write
from tcan.metrics.region_labels import REGIONS_SUFFIX, write_regions

FPS = 24
DISTRIBUTIONS: tuple[Distribution, ...] = ("wide", "dance", "bizarre")
# Short legs travel less at the same energy, so distributions with larger heads have a higher energy.
ENERGY: dict[Distribution, float] = {"wide": 1.15, "dance": 1.05, "bizarre": 1.4}


@dataclass(frozen=True)
class Clip:
    """Rendered clip with ground truth.

    `frames`: uint8 RGB `[F, H, W, 3]`. `keypoints`: float32 `[F, 18, 3]`, x and y in pixels and a score; the score of eyes
    and ears that are turned away is 0, otherwise 1, and the positions are always valid. `mask`: bool `[F, H, W]` of the
    puppet. `others`: keypoints like `keypoints` of each further puppet. `regions`: None, or uint8 `[F, H, W]`: 0 outside of
    the mask, otherwise 1 + the index in `REGIONS` of the visible region.
    """

    frames: np.ndarray
    keypoints: np.ndarray
    mask: np.ndarray
    others: tuple[np.ndarray, ...] = ()
    regions: np.ndarray | None = None


def sample_clip(
    distribution: Distribution,
    seed: int,
    num_frames: int,
    size: int = 128,
    *,
    every: int = 1,
    character_seed: int | None = None,
    motion_seed: int | None = None,
    background_seed: int | None = None,
    regions: bool = False,
) -> Clip:
    """Sample a clip at 24 frames/s. Equal arguments give identical bytes; a shorter clip is a prefix of a longer one.

    Args:
        size: height and width in pixels.
        every: frame stride; skipped frames are not rendered.
        character_seed, motion_seed, background_seed: default to `seed`. Pass the seed of another clip to reuse its
            character, dance or background.
        regions: label the regions of the puppet.
    """
    kind = DISTRIBUTIONS.index(distribution)

    def stream(part: int, part_seed: int | None) -> np.random.Generator:
        return np.random.default_rng([kind, part, seed if part_seed is None else part_seed])

    character = sample_character(distribution, stream(0, character_seed))
    dance = sample_choreography(stream(1, motion_seed), ENERGY[distribution])
    frames, keypoints, mask = render(
        character,
        dance,
        lambda pixels: sample_background(distribution, stream(2, background_seed), pixels),
        np.arange(num_frames) * every / FPS,
        size,
        regions=regions,
    )
    return Clip(frames, keypoints, mask > 0, regions=mask if regions else None)


def write_clip(clip: Clip, path: str | os.PathLike, fps: int = FPS) -> None:
    """Write `path`.mp4 (H.264) and `path`.json (true keypoints in OpenPose's format). Each write is atomic.

    If the clip has them, also write the labels of the regions to `path`.regions.npz (see `tcan.metrics.region_labels`).
    """
    num_frames, height, width, _ = clip.frames.shape
    path = Path(path)
    with (
        atomic_write(path.with_name(path.name + ".mp4")) as partial,
        av.open(str(partial), "w", format="mp4") as container,
    ):
        stream = container.add_stream(
            "libx264", rate=Fraction(fps), options={"crf": "12", "preset": "medium"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for pixels in clip.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())

    points = np.stack([clip.keypoints, *clip.others], axis=1).reshape(num_frames, -1, 18 * 3)
    people = [
        {"people": [{"pose_keypoints_2d": values} for values in frame]} for frame in points.round(3).tolist()
    ]
    with atomic_write(path.with_name(path.name + ".json")) as partial:
        partial.write_text(json.dumps({"fps": fps, "height": height, "width": width, "frames": people}))
    if clip.regions is not None:
        write_regions(clip.regions, path.with_name(path.name + REGIONS_SUFFIX))
