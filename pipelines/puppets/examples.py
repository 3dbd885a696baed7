"""Example inputs of `tcan animate` and `tcan app`: puppets that no training has seen.

python -m pipelines.puppets.examples examples
"""

import sys
from pathlib import Path

from pipelines.puppets.character import Distribution
from pipelines.puppets.world import FPS, sample_clip, write_clip
from tcan.video import write_image

SEED = 20_000_100
"""First seed; disjoint from those of pretraining, and of training and evaluation in the demo."""
FRAMES = 24
CHARACTERS: dict[str, tuple[Distribution, int]] = {
    "dancer": ("dance", SEED + 4),
    "creature": ("bizarre", SEED + 5),
}
DANCES: dict[str, tuple[Distribution, int]] = {"dance": ("dance", SEED + 101)}


def write_examples(folder: Path, size: int = 128) -> None:
    """Write the images dancer.png and creature.png, and the driving video dance.mp4 with its poses (dance.json)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (distribution, seed) in CHARACTERS.items():
        write_image(sample_clip(distribution, seed, 1, size).frames[0], folder / f"{name}.png")
    for name, (distribution, seed) in DANCES.items():
        write_clip(sample_clip(distribution, seed, FRAMES, size), folder / name, FPS)


if __name__ == "__main__":
    write_examples(Path(sys.argv[1]))
