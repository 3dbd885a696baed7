"""Stage 3, pose: the people of each frame, carried from clips to their video; the main one, followed through the whole video."""

import numpy as np

from tcan.pose import follow_main_person

People = list[np.ndarray]
"""Of each frame the people in it: float32 `[P, 18, 3]`, P may be 0."""


def pack_people(people: People) -> tuple[list[int], bytes]:
    """How many people each frame has, and all of them as the bytes of float32 `[sum, 18, 3]`."""
    return [len(frame) for frame in people], b"".join(np.asarray(frame, "<f4").tobytes() for frame in people)


def unpack_people(counts: list[int], packed: bytes) -> People:
    """The inverse of `pack_people`."""
    keypoints = np.frombuffer(packed, "<f4").reshape(-1, 18, 3)
    return np.split(keypoints, np.cumsum(counts)[:-1])


def main_person(people: People, size: int) -> tuple[np.ndarray, float]:
    """The main person's keypoints `[F, 18, 3]` over a whole video, and the share of frames that have one."""
    keypoints = np.asarray(follow_main_person(people, size, size), np.float32)
    return keypoints, float((keypoints[..., 2] > 0).any(axis=1).mean())
