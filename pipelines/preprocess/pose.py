"""Serialization of the detected people of each frame, and selection of the people of a video."""

import numpy as np

from tcan.pose.tracking import numbered_people, track_poses

MIN_PRESENCE = 0.5
"""Fraction of the frames in which a person must be detected to be tracked next to the main person."""

People = list[np.ndarray]
"""The people of each frame: float32 `[P, 18, 3]`; P may be 0."""


def pack_people(people: People) -> tuple[list[int], bytes]:
    """Return the number of people per frame and the bytes of float32 `[sum, 18, 3]`. Also used for hands and faces."""
    return [len(frame) for frame in people], b"".join(np.asarray(frame, "<f4").tobytes() for frame in people)


def unpack_people(counts: list[int], packed: bytes) -> People:
    """The inverse of `pack_people`."""
    keypoints = np.frombuffer(packed, "<f4").reshape(-1, 18, 3)
    return np.split(keypoints, np.cumsum(counts)[:-1])


def tracked_people(people: People, height: int, width: int, only_main: bool) -> tuple[np.ndarray, list[int]]:
    """The people of a video, tracked over all frames, the main person first.

    Other people are those with a number in `tcan pose` who are detected in MIN_PRESENCE of the frames.

    Returns:
        Keypoints `[F, P, 18, 3]`, all 0 where a person is not detected, and the index of the main person in each frame's
        people, -1 where not detected.
    """
    tracks = numbered_people(people, height, width) or [np.full(len(people), -1)]
    others = [] if only_main else [track for track in tracks[1:] if np.mean(track >= 0) >= MIN_PRESENCE]
    poses = [track_poses(people, track) for track in (tracks[0], *others)]
    return np.stack(poses, axis=1), tracks[0].tolist()


def person_height(keypoints: np.ndarray) -> float:
    """Median height in pixels of a person over the frames with detected joints; 0 if there are none.

    keypoints: `[F, 18, 3]`.
    """
    heights = [np.ptp(body[body[:, 2] > 0, 1]) for body in keypoints if (body[:, 2] > 0).any()]
    return float(np.median(heights)) if heights else 0.0
