"""The square of a video's images that becomes its canvas: around the main person, the same from the first frame to the
last, since training takes the reference from one clip and the target from another, and frames across clips: the scene
must not leap between them.

It is cut out of the latents, on their grid, as training does it. For it is known when the video is whole; to encode the
square alone, each video would have to be decoded twice or its frames kept until then.
"""

from dataclasses import dataclass

import numpy as np

from pipelines.dataset import LATENT_STRIDE

SPARED = 0.01  # share of the joints that may be left out for a square with the person more in its middle


@dataclass(frozen=True)
class Square:
    """In pixels of the images that it is cut from; x and y are multiples of LATENT_STRIDE."""

    x: int
    y: int
    side: int

    def shows(self, keypoints: np.ndarray) -> np.ndarray:
        """bool `[F]`: whether more than half of a person's found joints are in it; `[F, 18, 3]` in the images' pixels."""
        found = keypoints[..., 2] > 0
        place = keypoints[..., :2] - (self.x, self.y)
        inside = found & ((place >= 0) & (place < self.side)).all(axis=-1)
        return inside.sum(axis=1) > found.sum(axis=1) / 2

    def of_keypoints(self, keypoints: np.ndarray) -> np.ndarray:
        """float32 `[..., 3]` in the images' pixels -> in the square's; a joint not found stays 0."""
        corner = np.array([self.x, self.y, 0], np.float32)
        return np.where(keypoints[..., 2:] > 0, keypoints - corner, 0).astype("<f4")

    def of_latents(self, latents: bytes, height: int, width: int) -> bytes:
        """The bytes of float16 `[..., height / 8, width / 8]` -> of `[..., side / 8, side / 8]`."""
        grid = np.frombuffer(latents, "<f2").reshape(-1, height // LATENT_STRIDE, width // LATENT_STRIDE)
        x, y, side = (value // LATENT_STRIDE for value in (self.x, self.y, self.side))
        return grid[:, y : y + side, x : x + side].tobytes()

    def of_box(self, box: list[float], width: int) -> list[float]:
        """Where the square lies in the source: (x0, y0, x1, y1), the images being this box of it, `width` wide."""
        scale = (box[2] - box[0]) / width
        x, y = box[0] + self.x * scale, box[1] + self.y * scale
        return [x, y, x + self.side * scale, y + self.side * scale]


def square_around(keypoints: np.ndarray, height: int, width: int) -> Square:
    """The square, as large as a image's shorter side, that holds the most of a person's joints over all frames.

    Of several, that with the person in its middle; without a person the centre. keypoints: `[F, 18, 3]` in pixels.
    """
    side, longer, axis = min(height, width), max(height, width), int(height > width)
    corners = np.arange(0, longer - side + 1, LATENT_STRIDE)
    places = np.sort(keypoints[keypoints[..., 2] > 0][:, axis])
    middle = longer / 2
    if len(places):
        held = np.searchsorted(places, corners + side) - np.searchsorted(places, corners)
        corners = corners[held >= (1 - SPARED) * held.max()]
        some = corners[len(corners) // 2]
        inside = places[(places >= some) & (places < some + side)]
        middle = np.quantile(inside, (0.05, 0.95)).mean()
    corner = int(corners[np.abs(corners + side / 2 - middle).argmin()])
    return Square(0, corner, side) if axis else Square(corner, 0, side)
