"""PSNR of the face and the hands, whose errors an average over all pixels hides: they are a few percent of a frame."""

from collections.abc import Iterator

import numpy as np

from tcan.pose.skeleton import JOINTS

FACE = [JOINTS.index(name) for name in ("nose", "right_eye", "left_eye", "right_ear", "left_ear")]
FACE_SIDE, FACE_MARGIN = 1.2, 1.1
"""Side of the square around the face: at least these multiples of the distance from the neck to the nose, and of the extent of the
detected points of the face."""
ARMS = [(JOINTS.index(f"{side}_elbow"), JOINTS.index(f"{side}_wrist")) for side in ("right", "left")]
HAND_CENTER, HAND_SIDE = 0.3, 0.8
"""Distance from the wrist to the center of the hand, and side of the square around it, as multiples of the forearm's length."""

Box = tuple[slice, slice]
"""Rows and columns."""


def region_metrics(result: np.ndarray, truth: np.ndarray, poses: np.ndarray) -> dict[str, float]:
    """PSNR in dB of the squares around the faces and the hands, over the pixels of all frames together.

    The squares follow from the joints of the body: see `FACE_SIDE` and `HAND_SIDE`.

    Args:
        result, truth: uint8 RGB `[F, H, W, 3]`, corresponding frames.
        poses: keypoints `[F, 18, 3]` of the truth.

    Returns:
        psnr_face, psnr_hands: NaN if no frame shows the joints, infinite for equal pixels.
    """
    metrics = {}
    for name, boxes_of in (("psnr_face", face_boxes), ("psnr_hands", hand_boxes)):
        total, count = 0.0, 0
        for frames in zip(result, truth, poses, strict=True):
            for box in boxes_of(frames[2]):
                a, b = (frame[box].astype(np.float64) for frame in frames[:2])
                total, count = total + float(((a - b) ** 2).sum()), count + a.size
        metrics[name] = pooled_psnr(total, count)
    return metrics


def pooled_psnr(total: float, count: int) -> float:
    """PSNR in dB of `count` values in 0..255 whose squared errors add up to `total`: NaN for no values, infinite for no error."""
    if not count:
        return float("nan")
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(255**2 / np.float64(total / count)))


def face_boxes(pose: np.ndarray) -> Iterator[Box]:
    """The square around the detected points of the face, if nose and neck of `[18, 3]` were detected."""
    nose, neck = pose[JOINTS.index("nose")], pose[JOINTS.index("neck")]
    if nose[2] > 0 and neck[2] > 0:
        points = pose[FACE]
        points = points[points[:, 2] > 0, :2]
        extent = np.ptp(points, axis=0).max()
        side = max(FACE_SIDE * np.linalg.norm(nose[:2] - neck[:2]), FACE_MARGIN * extent)
        yield _square(points.mean(axis=0), side)


def hand_boxes(pose: np.ndarray) -> Iterator[Box]:
    """The squares around the hands of detected arms of `[18, 3]`."""
    for elbow, wrist in ARMS:
        if pose[elbow, 2] > 0 and pose[wrist, 2] > 0:
            forearm = pose[wrist, :2] - pose[elbow, :2]
            yield _square(pose[wrist, :2] + HAND_CENTER * forearm, HAND_SIDE * float(np.linalg.norm(forearm)))


def _square(center: np.ndarray, side: float) -> Box:
    """The part of a square that is right of and below the corner of the frame; slices end at its other borders."""
    x0, y0 = np.maximum(0, np.round(center - side / 2)).astype(int)
    x1, y1 = np.maximum(0, np.round(center + side / 2)).astype(int)
    return slice(y0, y1), slice(x0, x1)
