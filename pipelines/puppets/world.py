"""The puppet world: seeded clips of dancing characters with their true keypoints.

It stands in for the videos of people that TCAN is trained on: `wide` pretrains the mini weights, `dance` trains and tests
TCAN, `bizarre` (bodies that none of the others has) tests how far it carries.
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

FPS = 24
DISTRIBUTIONS: tuple[Distribution, ...] = ("wide", "dance", "bizarre")
# Short legs step and jump less far for the same effort: bodies with bigger heads dance harder.
ENERGY: dict[Distribution, float] = {"wide": 1.15, "dance": 1.05, "bizarre": 1.4}


@dataclass(frozen=True)
class Clip:
    """Frames `[F, H, W, 3]` uint8 RGB; keypoints `[F, 18, 3]` float32 (x, y in pixels, score 1, or 0 for an eye or ear
    that is turned away: its position is true all the same); mask `[F, H, W]` bool of the puppet."""

    frames: np.ndarray
    keypoints: np.ndarray
    mask: np.ndarray


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
) -> Clip:
    """A clip at 24 frames/s, the same bytes for the same arguments; a longer one begins with the shorter one's frames.

    every: keeps one frame of so many, without drawing the others.

    The three other seeds default to `seed`: give one to keep the character, the dance or the scene of another clip.
    """
    kind = DISTRIBUTIONS.index(distribution)

    def stream(part: int, own_seed: int | None) -> np.random.Generator:
        return np.random.default_rng([kind, part, seed if own_seed is None else own_seed])

    character = sample_character(distribution, stream(0, character_seed))
    dance = sample_choreography(stream(1, motion_seed), ENERGY[distribution])
    frames, keypoints, mask = render(
        character,
        dance,
        lambda pixels: sample_background(distribution, stream(2, background_seed), pixels),
        np.arange(num_frames) * every / FPS,
        size,
    )
    return Clip(frames, keypoints, mask)


def write_clip(clip: Clip, path: str | os.PathLike, fps: int = FPS) -> None:
    """Writes `path`.mp4 (H.264) and `path`.json (true keypoints, as OpenPose writes them); each is whole or not there."""
    num_frames, height, width, _ = clip.frames.shape
    path = Path(path)
    video, truth = path.with_name(path.name + ".mp4"), path.with_name(path.name + ".json")
    temporary = video.with_name(f".{video.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream(
                "libx264", rate=Fraction(fps), options={"crf": "12", "preset": "medium"}
            )
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for pixels in clip.frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        os.replace(temporary, video)

        points = clip.keypoints.reshape(num_frames, -1).round(3).tolist()
        people = [{"people": [{"pose_keypoints_2d": values}]} for values in points]
        temporary.write_text(json.dumps({"fps": fps, "height": height, "width": width, "frames": people}))
        os.replace(temporary, truth)
    finally:
        temporary.unlink(missing_ok=True)
