"""What pose networks get wrong, done on purpose: temporal layers that saw it learn to ask the neighbouring frames."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PoseErrors:
    """How often, and how much; as it stands, none."""

    dropout: float = 0.0
    """Chance of each joint to be missing."""
    jitter: float = 0.0
    """Standard deviation, in x and in y, of how far each joint lies from its place, as a share of the image's side."""
    outliers: float = 0.0
    """Chance of a frame to be of no use: its joints have changed places at random, or, as often, none is found."""

    def apply(
        self, keypoints: NDArray[np.float32], side: int, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """keypoints [F, 18, 3] of a image of `side` pixels -> the same with errors, a copy."""
        frames, joints = keypoints.shape[:2]
        wrong = keypoints.copy()
        wrong[..., :2] += np.float32(self.jitter * side) * rng.standard_normal(
            (frames, joints, 2), np.float32
        )
        for frame in np.flatnonzero(rng.random(frames) < self.outliers):
            found = np.flatnonzero(wrong[frame, :, 2] > 0)
            wrong[frame, found] = wrong[frame, rng.permutation(found)] if rng.random() < 0.5 else 0
        wrong[(rng.random((frames, joints)) < self.dropout) | (keypoints[..., 2] <= 0)] = 0
        return wrong
