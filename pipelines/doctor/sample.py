"""The person on which the networks are tested: a rendered puppet for small models, a photograph for the others."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.puppets.examples import CHARACTERS
from pipelines.puppets.world import sample_clip
from tcan.crop import fit_image, fit_keypoints
from tcan.pose.skeleton import JOINTS, NECK
from tcan.video import read_image

PHOTO = Path(__file__).parent / "astronaut.webp"
"""Eileen Collins, 512 x 512 pixels. NASA, public domain; the same crop as `skimage.data.astronaut`."""
PHOTO_JOINTS = {
    "nose": (221, 126),
    "right_eye": (202, 101),
    "left_eye": (246, 103),
    "right_ear": (178, 120),
    "left_ear": (272, 126),
    "neck": (208, 250),
    "right_shoulder": (95, 255),
    "left_shoulder": (320, 260),
}
"""Labels by hand, x and y in pixels; right and left are the person's. The arms leave the image or are covered."""
PUPPET_SIZE = 256
"""Models for smaller images are tested on a puppet: a photograph of a person has too few pixels then."""
FRAMES = 8
SWAY = 6.0
"""Angle in degrees by which the upper body of the photograph sways to both sides in its driving poses."""


@dataclass(frozen=True)
class Sample:
    """An image of a person, its labels, and poses to animate it with.

    `image`: uint8 RGB `[H, W, 3]`. `keypoints`: float32 `[18, 3]`. `motion`: float32 `[F, 18, 3]`. Keypoints are in pixels
    of the image; joints that are not visible have the score 0.
    """

    name: str
    image: np.ndarray
    keypoints: np.ndarray
    motion: np.ndarray


def make_sample(size: int) -> Sample:
    """The sample of a model for images of `size` x `size` pixels."""
    if size < PUPPET_SIZE:
        distribution, seed = CHARACTERS["dancer"]
        clip = sample_clip(distribution, seed, FRAMES, size, every=3)
        return Sample(f"rendered puppet, {size} x {size}", clip.frames[0], clip.keypoints[0], clip.keypoints)
    photo = read_image(PHOTO)
    height, width = photo.shape[:2]
    labels = np.zeros((18, 3), np.float32)
    for name, (x, y) in PHOTO_JOINTS.items():
        labels[JOINTS.index(name)] = x, y, 1
    keypoints = fit_keypoints(labels[None], height, width, size, size)[0]
    return Sample(
        f"photograph of an astronaut (NASA), {size} x {size}",
        fit_image(photo, size, size),
        keypoints,
        np.stack([_rotate(keypoints, SWAY * np.sin(2 * np.pi * f / FRAMES)) for f in range(FRAMES)]),
    )


def _rotate(keypoints: np.ndarray, degrees: float) -> np.ndarray:
    """Keypoints `[18, 3]` rotated around the neck; missing joints remain 0."""
    angle = np.deg2rad(degrees)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    rotated = keypoints.copy()
    center = keypoints[NECK, :2]
    rotated[:, :2] = ((keypoints[:, :2] - center) @ matrix + center) * (keypoints[:, 2:] > 0)
    return rotated
