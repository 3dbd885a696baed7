"""Synthetic errors of a pose detector: random ones in training, and one kind at a time for tests of robustness."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tcan.pose.parts import BODY, move_parts
from tcan.pose.skeleton import JOINTS

Keypoints = NDArray[np.float32]
ErrorKind = Literal["none", "missing", "jitter", "outliers", "swaps", "frozen", "offset", "burst"]
KINDS = get_args(ErrorKind)


def _other_side(joint: str) -> str:
    side, separator, part = joint.partition("_")
    return {"right": "left", "left": "right"}.get(side, side) + separator + part


MIRRORED = np.array([JOINTS.index(_other_side(joint)) for joint in JOINTS])
"""For each joint, the index of the joint of the other side of the body."""


@dataclass(frozen=True)
class PoseErrors:
    """Rates and sizes of the random errors in training; the defaults add none."""

    dropout: float = 0.0
    """Probability that a joint is removed, in [0, 1]."""
    jitter: float = 0.0
    """Standard deviation of Gaussian noise on x and y, as a fraction of the shorter image side."""
    outliers: float = 0.0
    """Probability that a person's pose in a frame is unusable, in [0, 1]: all joints are permuted or removed, with equal
    probability."""

    def apply(self, keypoints: Keypoints, side: int, rng: np.random.Generator) -> Keypoints:
        """Return a copy of keypoints `[F, N, 3]` or `[F, P, N, 3]` with errors added to the joints; hands and faces move with
        their wrists and noses (N: 18 or 130).

        side: of the shorter image side, in pixels.
        """
        joints_of_people = keypoints[..., BODY, :]
        bodies = joints_of_people.reshape(-1, *joints_of_people.shape[-2:])
        corrupted = bodies.copy()
        count, joints = bodies.shape[:2]
        _move(corrupted, np.arange(count), self.jitter * side, rng)
        _spoil(corrupted, np.flatnonzero(rng.random(count) < self.outliers), rng)
        corrupted[(rng.random((count, joints)) < self.dropout) | (bodies[..., 2] <= 0)] = 0
        return move_parts(keypoints, corrupted.reshape(joints_of_people.shape))


def corrupt_poses(
    keypoints: Keypoints, kind: ErrorKind, share: float, size: float, side: int, seed: int | tuple[int, ...]
) -> Keypoints:
    """Return a copy of keypoints `[F, N, 3]` with errors of one kind in the joints; equal arguments give equal errors. Hands and
    faces move with their wrists and noses (N: 18 or 130).

    Each kind affects `round(share * F)` frames, if not stated otherwise.

    Args:
        kind: "none";
            "missing": each joint is removed with probability `share`;
            "jitter": Gaussian noise of standard deviation `size`;
            "outliers": single frames in which all joints are permuted or removed;
            "swaps": left and right joints are exchanged;
            "frozen": the pose of the previous frame is repeated; the first frame is never affected;
            "offset": all frames are shifted by the distance `size` in one random direction;
            "burst": as "outliers", in consecutive frames at a random position.
        share: in [0, 1].
        size: as a fraction of the image side.
        side: of the image in pixels.
    """
    rng = np.random.default_rng(seed)
    original, keypoints = keypoints, keypoints[:, BODY]
    corrupted = keypoints.copy()
    frames = len(keypoints)
    count = round(share * frames)
    missing = keypoints[..., 2] <= 0
    if kind == "missing":
        missing = missing | (rng.random(keypoints.shape[:2]) < share)
    elif kind == "jitter":
        _move(corrupted, rng.choice(frames, count, replace=False), size * side, rng)
    elif kind == "outliers":
        _spoil(corrupted, rng.choice(frames, count, replace=False), rng)
    elif kind == "swaps":
        affected = rng.choice(frames, count, replace=False)
        corrupted[affected] = corrupted[affected][:, MIRRORED]
        missing[affected] = missing[affected][:, MIRRORED]
    elif kind == "frozen":
        for frame in np.sort(1 + rng.choice(frames - 1, min(count, frames - 1), replace=False)):
            corrupted[frame], missing[frame] = corrupted[frame - 1], missing[frame - 1]
    elif kind == "offset":
        angle = rng.uniform(0, 2 * np.pi)
        corrupted[..., :2] += np.float32(size * side) * np.array([np.cos(angle), np.sin(angle)], np.float32)
    elif kind == "burst":
        start = int(rng.integers(frames - count + 1))
        _spoil(corrupted, np.arange(start, start + count), rng)
    elif kind != "none":
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    corrupted[missing] = 0
    return move_parts(original, corrupted)


def _move(keypoints: Keypoints, frames: NDArray[np.int64], pixels: float, rng: np.random.Generator) -> None:
    """Add Gaussian noise of this standard deviation to x and y of these frames, in place."""
    noise = rng.standard_normal((len(frames), keypoints.shape[1], 2), np.float32)
    keypoints[frames, :, :2] += np.float32(pixels) * noise


def _spoil(keypoints: Keypoints, frames: NDArray[np.int64], rng: np.random.Generator) -> None:
    """Permute or remove all joints of these frames, with equal probability, in place."""
    for frame in frames:
        found = np.flatnonzero(keypoints[frame, :, 2] > 0)
        keypoints[frame, found] = keypoints[frame, rng.permutation(found)] if rng.random() < 0.5 else 0
