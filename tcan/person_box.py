"""The crop of an image that shows its person, or several of them."""

import numpy as np

from tcan.crop import Box, crop_box
from tcan.pose.skeleton import NECK, NOSE

HEAD = [NOSE, NECK, 14, 15, 16, 17]  # with eyes and ears
MARGIN = 0.1
"""Minimum distance of the joints from the border of the crop, as a fraction of the diagonal of their bounding box. The
joints include neither the top of the head nor the feet and hands."""


def person_box(keypoints: np.ndarray, source_height: int, source_width: int, height: int, width: int) -> Box:
    """Largest box with the aspect ratio height : width that shows a person of keypoints `[18, 3]`, or several people of
    keypoints `[P, 18, 3]`, in source pixels.

    It is the centered box if that contains all detected joints. Otherwise the box moves along the one axis where it is
    shorter than the image, to the center of the people. If they are larger than the box, it contains the heads.
    """
    people = keypoints.reshape(-1, *keypoints.shape[-2:])
    x0, y0, x1, y1 = crop_box(source_height, source_width, height, width)
    joints = _joints_inside(people, (0, 0, source_width, source_height))
    positions = people[joints, :2].astype(float)
    if len(positions) == _joints_inside(people, (x0, y0, x1, y1)).sum():
        return x0, y0, x1, y1
    axis = int(y1 - y0 < source_height)
    length, side = ((source_width, x1 - x0), (source_height, y1 - y0))[axis]
    margin = max(_margin(body, found) for body, found in zip(people, joints, strict=True))
    head = people[:, HEAD][joints[:, HEAD], axis].astype(float)
    low, high = positions[:, axis].min(), positions[:, axis].max()
    corner = (max(low - margin, 0) + min(high + margin, length) - side) / 2
    if high - low > side and len(head):
        low, high = max(head.min() - margin, 0), min(head.max() + margin, length)
    if high - low <= side:
        corner = min(max(corner, high - side), low)
    corner = float(min(max(corner, 0), length - side))
    end = min(corner + side, length)  # PIL refuses a box that exceeds the image by a rounding error
    return (x0, corner, x1, end) if axis else (corner, y0, end, y1)


def _margin(body: np.ndarray, joints: np.ndarray) -> float:
    """Minimum distance of the joints of a person from the border of the crop, in pixels."""
    if not joints.any():
        return 0.0
    margin = MARGIN * float(np.linalg.norm(np.ptp(body[joints, :2], axis=0)))
    if joints[NOSE] and joints[NECK]:  # of a close-up, the head is larger than the fraction
        margin = max(margin, float(np.linalg.norm(body[NOSE, :2] - body[NECK, :2])))
    return margin


def describe_crop(keypoints: np.ndarray, box: Box) -> str:
    """What a crop around people of keypoints `[18, 3]` or `[P, 18, 3]` shows, for a message."""
    several = keypoints.ndim == 3 and len(keypoints) > 1
    text = f"cropped to {','.join(f'{value:.0f}' for value in box)} around the {'people' if several else 'person'}"
    detected = int((keypoints[..., 2] > 0).sum())
    if outside := detected - int(_joints_inside(keypoints, box).sum()):
        verb = "do" if several else "does"
        text += f", who {verb} not fit: {outside} of {detected} joints are outside; use a size of the image's aspect ratio"
    return text


def _joints_inside(keypoints: np.ndarray, box: Box) -> np.ndarray:
    """Whether each joint of keypoints `[..., 18, 3]` is detected and inside a box: bool `[..., 18]`."""
    inside = (keypoints[..., :2] >= box[:2]) & (keypoints[..., :2] <= box[2:])
    return inside.all(axis=-1) & (keypoints[..., 2] > 0)
