"""Synthetic poses for tests."""

import numpy as np

# A standing person with arms slightly away from the body: (x, y) relative to the neck, in body heights.
STANDING = np.array(
    [
        (0.00, -0.12),  # nose
        (0.00, 0.00),  # neck
        (-0.12, 0.01),  # right shoulder, elbow, wrist (on the left of the image)
        (-0.19, 0.15),
        (-0.23, 0.29),
        (0.12, 0.01),
        (0.19, 0.15),
        (0.23, 0.29),
        (-0.07, 0.32),  # right hip, knee, ankle
        (-0.09, 0.55),
        (-0.10, 0.78),
        (0.07, 0.32),
        (0.09, 0.55),
        (0.10, 0.78),
        (-0.03, -0.15),  # eyes
        (0.03, -0.15),
        (-0.07, -0.13),  # ears
        (0.07, -0.13),
    ]
)


def body(x: float, y: float, size: float, turn: float = 0.0) -> np.ndarray:
    """Standing person `[18, 3]`: neck at (x, y), body height `size` in pixels, rotated by `turn` radians."""
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    keypoints = np.ones((18, 3), np.float32)
    keypoints[:, :2] = STANDING @ rotation.T * size + (x, y)
    return keypoints


def cut(keypoints: np.ndarray, height: int, width: int) -> np.ndarray:
    """Keypoints `[18, 3]` without the joints outside the image."""
    x, y = keypoints[:, 0], keypoints[:, 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return np.where(inside[:, None], keypoints, 0).astype(np.float32)
