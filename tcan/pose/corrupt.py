"""Pose augmentation: synthetic detector errors, from which temporal layers learn to use neighboring frames."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PoseErrors:
    """Rates and sizes of the synthetic errors; the defaults add none."""

    dropout: float = 0.0
    """Probability that a joint is removed, in [0, 1]."""
    jitter: float = 0.0
    """Standard deviation of Gaussian noise on x and y, as a fraction of the image side."""
    outliers: float = 0.0
    """Probability that a frame is unusable, in [0, 1]: all joints are permuted or removed, with equal probability."""

    def apply(
        self, keypoints: NDArray[np.float32], side: int, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Return a copy of keypoints `[F, 18, 3]` of an image of `side` pixels, with errors added."""
        frames, joints = keypoints.shape[:2]
        corrupted = keypoints.copy()
        corrupted[..., :2] += np.float32(self.jitter * side) * rng.standard_normal(
            (frames, joints, 2), np.float32
        )
        for frame in np.flatnonzero(rng.random(frames) < self.outliers):
            found = np.flatnonzero(corrupted[frame, :, 2] > 0)
            corrupted[frame, found] = corrupted[frame, rng.permutation(found)] if rng.random() < 0.5 else 0
        corrupted[(rng.random((frames, joints)) < self.dropout) | (keypoints[..., 2] <= 0)] = 0
        return corrupted
