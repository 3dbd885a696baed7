"""The crop around the tracked people, the same for all frames of a video.

One crop per video is required because training pairs a reference with a target from another clip, and stage 2 spans several
clips; the scene must not jump between them.

The crop is cut out of the latents, on their grid, as training does. It is known only when all clips of the video have been
processed. Encoding only the crop would require decoding each video twice or keeping its frames until then.
"""

from dataclasses import dataclass

import numpy as np

from pipelines.dataset import LATENT_STRIDE
from tcan.crop import Size

CENTERING_LOSS = 0.01  # fraction of the joints that may be lost to center the crop on the person


@dataclass(frozen=True)
class Crop:
    """A rectangle in pixels of the full frames; all values are multiples of LATENT_STRIDE."""

    x: int
    y: int
    height: int
    width: int

    def shows(self, keypoints: np.ndarray) -> np.ndarray:
        """Whether more than 50% of the detected joints are inside the crop: bool `[F]`.

        keypoints: `[F, 18, 3]` in pixels of the full frames.
        """
        detected = keypoints[..., 2] > 0
        position = keypoints[..., :2] - (self.x, self.y)
        inside = detected & ((position >= 0) & (position < (self.width, self.height))).all(axis=-1)
        return inside.sum(axis=1) > detected.sum(axis=1) / 2

    def crop_keypoints(self, keypoints: np.ndarray) -> np.ndarray:
        """float32 `[..., 3]` in pixels of the full frames -> in pixels of the crop; undetected joints stay 0."""
        corner = np.array([self.x, self.y, 0], np.float32)
        return np.where(keypoints[..., 2:] > 0, keypoints - corner, 0).astype("<f4")

    def crop_latents(self, latents: bytes, height: int, width: int) -> bytes:
        """Bytes of float16 `[..., height / 8, width / 8]` -> bytes of the crop."""
        grid = np.frombuffer(latents, "<f2").reshape(-1, height // LATENT_STRIDE, width // LATENT_STRIDE)
        x, y, rows, columns = (value // LATENT_STRIDE for value in (self.x, self.y, self.height, self.width))
        return grid[:, y : y + rows, x : x + columns].tobytes()

    def source_box(self, box: list[float], width: int) -> list[float]:
        """Box (x0, y0, x1, y1) of the crop in source pixels.

        box: box of the full frames in source pixels. width: width of the full frames in pixels.
        """
        scale = (box[2] - box[0]) / width
        x, y = box[0] + self.x * scale, box[1] + self.y * scale
        return [x, y, x + self.width * scale, y + self.height * scale]


def crop_around(keypoints: np.ndarray, height: int, width: int, canvas: Size) -> Crop:
    """The crop with the most joints of the main person over all frames, and among these with the most joints of all people.

    Among crops with the same number of joints (up to CENTERING_LOSS), the one centered on the people is chosen. Without
    any detected joint, the crop is at the center.

    Args:
        keypoints: `[F, 18, 3]`, or of several people `[F, P, 18, 3]` with the main person first, in pixels.
        height, width: size of the frames.
        canvas: size of the crop; one side is that of the frames.
    """
    axis = int(height > canvas[0])
    side, longer = (canvas[0], height) if axis else (canvas[1], width)
    corners = np.arange(0, longer - side + 1, LATENT_STRIDE)
    people = keypoints.reshape(len(keypoints), -1, *keypoints.shape[-2:])
    center = longer / 2
    for joints in (people[:, 0], people):
        positions = np.sort(joints[joints[..., 2] > 0][:, axis])
        if not len(positions):
            continue
        num_inside = np.searchsorted(positions, corners + side) - np.searchsorted(positions, corners)
        corners = corners[num_inside >= (1 - CENTERING_LOSS) * num_inside.max()]
        candidate = corners[len(corners) // 2]
        inside = positions[(positions >= candidate) & (positions < candidate + side)]
        center = np.quantile(inside, (0.05, 0.95)).mean()
    corner = int(corners[np.abs(corners + side / 2 - center).argmin()])
    return Crop(0, corner, *canvas) if axis else Crop(corner, 0, *canvas)
