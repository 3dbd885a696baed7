"""Stage 3, pose: the people of each frame, carried from clips to their video; the main one, followed through the whole video."""

import numpy as np

from tcan.pose import follow_main_person

People = list[np.ndarray]
"""Of each frame the people in it: float32 `[P, 18, 3]`, P may be 0."""


def pack_people(people: People) -> tuple[list[int], bytes]:
    """How many people each frame has, and all of them as the bytes of float32 `[sum, 18, 3]`; so too their hands or faces."""
    return [len(frame) for frame in people], b"".join(np.asarray(frame, "<f4").tobytes() for frame in people)


def unpack_people(counts: list[int], packed: bytes) -> People:
    """The inverse of `pack_people`."""
    keypoints = np.frombuffer(packed, "<f4").reshape(-1, 18, 3)
    return np.split(keypoints, np.cumsum(counts)[:-1])


def main_person(people: People, height: int, width: int) -> tuple[np.ndarray, list[int]]:
    """The main person over a whole video: their keypoints `[F, 18, 3]`, and which of each frame's people they are, -1
    where they are not seen."""
    keypoints = np.asarray(follow_main_person(people, height, width), np.float32)
    which = [
        next((i for i, body in enumerate(bodies) if np.array_equal(body, main) and main.any()), -1)
        for bodies, main in zip(people, keypoints, strict=True)
    ]
    return keypoints, which


def person_height(keypoints: np.ndarray) -> float:
    """Median over the frames that have them of a person's height in pixels; `[F, 18, 3]`, 0 if none."""
    heights = [np.ptp(body[body[:, 2] > 0, 1]) for body in keypoints if (body[:, 2] > 0).any()]
    return float(np.median(heights)) if heights else 0.0
