"""Serialization of the detected people of each frame, and selection of the main person of a video."""

import numpy as np

from tcan.pose.tracking import track_people, track_poses

People = list[np.ndarray]
"""The people of each frame: float32 `[P, 18, 3]`; P may be 0."""


def pack_people(people: People) -> tuple[list[int], bytes]:
    """Return the number of people per frame and the bytes of float32 `[sum, 18, 3]`. Also used for hands and faces."""
    return [len(frame) for frame in people], b"".join(np.asarray(frame, "<f4").tobytes() for frame in people)


def unpack_people(counts: list[int], packed: bytes) -> People:
    """The inverse of `pack_people`."""
    keypoints = np.frombuffer(packed, "<f4").reshape(-1, 18, 3)
    return np.split(keypoints, np.cumsum(counts)[:-1])


def main_person(people: People, height: int, width: int) -> tuple[np.ndarray, list[int]]:
    """The main person of a video, tracked over all frames.

    Returns:
        Keypoints `[F, 18, 3]`, and the index of the main person in each frame's people, -1 where not detected.
    """
    tracks = track_people(people, height, width)
    indices = tracks[0] if tracks else np.full(len(people), -1)
    return track_poses(people, indices), indices.tolist()


def person_height(keypoints: np.ndarray) -> float:
    """Median height in pixels of a person over the frames with detected joints; 0 if there are none.

    keypoints: `[F, 18, 3]`.
    """
    heights = [np.ptp(body[body[:, 2] > 0, 1]) for body in keypoints if (body[:, 2] > 0).any()]
    return float(np.median(heights)) if heights else 0.0
