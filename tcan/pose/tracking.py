"""Tracking of all people through a video, and selection of one of them.

Detections are assigned to tracks frame by frame (Hungarian algorithm, `scipy.optimize.linear_sum_assignment`). The cost
is the squared distance of the pose from its prediction at constant velocity, in body sizes, plus the squared logarithm of
the change in size. Squared distances matter for dancers who move in step: they sum to the same prediction error for both
assignments except for the distance between the dancers. Then tracks are linked over gaps. A track is never linked to one
of the same time, so a bystander does not replace a dancer who left the scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from tcan.errors import UserError
from tcan.pose.parts import BODY

MAX_JUMP = 0.15
"""Maximum distance from the prediction per frame, as a fraction of the image diagonal."""
MAX_STEP = 0.5
"""The same in body sizes; the larger of both limits applies."""
MAX_GAP = 12
"""Frames without a detection after which a track ends. It may be linked to a later one."""
HISTORY = 6
"""Detections from which the velocity is estimated."""
MAX_SCALE = 2.0
"""Maximum ratio of the sizes of two tracks that are linked."""
CUT_FRAMES = 8
"""Tracks of at least this length are linked at any distance: the person changes its position at a scene cut."""
MIN_SHARE = 0.2
"""Minimum extent of a person, relative to the main person, to have a number. Excludes short false detections."""

FORBIDDEN = 1e6

People = Sequence[NDArray[np.float32]]
"""The people of each frame, `[P, 18, 3]`, or `[P, 130, 3]` with hands and faces; P may be 0."""


@dataclass
class _Track:
    frames: list[int]
    indices: list[int]
    first: NDArray[np.float64]
    last: NDArray[np.float64]
    positions: list[NDArray[np.float64]] = field(default_factory=lambda: [np.zeros(2)])
    """Movement since the first detection, `[2]` per detection: the mean over the joints that two detections share."""

    def add(self, frame: int, index: int, body: NDArray[np.float64]) -> None:
        both = (body[:, 2] > 0) & (self.last[:, 2] > 0)
        shift = (
            (body - self.last)[both, :2].mean(axis=0) if both.any() else _center(body) - _center(self.last)
        )
        self.positions.append(self.positions[-1] + shift)
        self.frames.append(frame)
        self.indices.append(index)
        self.last = body

    def predict(self, frame: int) -> NDArray[np.float64]:
        """The last pose `[18, 3]`, moved along the line through the last positions."""
        predicted = self.last.copy()
        frames, positions = np.array(self.frames[-HISTORY:]), np.stack(self.positions[-HISTORY:])
        if len(frames) > 1:
            times = frames - frames.mean()
            velocity = times @ (positions - positions.mean(axis=0)) / (times @ times)
            ahead = min(frame - frames[-1], MAX_GAP) + frames[-1] - frames.mean()
            predicted[:, :2] += positions.mean(axis=0) + velocity * ahead - positions[-1]
        return predicted


def track_people(people: People, height: float, width: float) -> list[NDArray[np.int64]]:
    """Track all people: for each of them the index in each frame's people `[F]`, -1 where not detected.

    The order is that of the sum of the person's sizes over all frames, so the first one is the main person.
    """
    diagonal = float(np.hypot(height, width))
    finished: list[_Track] = []
    active: list[_Track] = []
    for frame, bodies in enumerate(found[:, BODY] for found in people):
        finished += [track for track in active if frame - track.frames[-1] > MAX_GAP]
        active = [track for track in active if frame - track.frames[-1] <= MAX_GAP]
        found = [i for i, body in enumerate(bodies) if (body[:, 2] > 0).any()]
        detections = [bodies[i].astype(np.float64) for i in found]
        assigned = dict(_assign(active, detections, frame, diagonal))
        for number, (index, body) in enumerate(zip(found, detections, strict=True)):
            if number in assigned:
                active[assigned[number]].add(frame, index, body)
            else:
                active.append(_Track([frame], [index], body, body))
    chains = _link(finished + active, diagonal)
    results = []
    for chain in chains:
        indices = np.full(len(people), -1, np.int64)
        for track in chain:
            indices[track.frames] = track.indices
        results.append(indices)
    return sorted(results, key=lambda indices: -_extent(people, indices))


def track_main_person(people: People, height: float, width: float) -> NDArray[np.float32]:
    """Keypoints of the main person, `[F, N, 3]`; all 0 where it is not detected. See `track_people`."""
    tracks = track_people(people, height, width)
    return track_poses(people, tracks[0] if tracks else np.full(len(people), -1))


def track_poses(people: People, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """Keypoints `[F, N, 3]` of a track, N as in `people`; all 0 where its index is -1."""
    poses = np.zeros((len(people), people[0].shape[1] if len(people) else BODY.stop, 3), np.float32)
    for frame in np.flatnonzero(indices >= 0).tolist():
        poses[frame] = people[frame][indices[frame]]
    return poses


def select_people(
    people: People, height: float, width: float, person: str, source: str
) -> list[NDArray[np.float32]]:
    """Keypoints `[F, N, 3]` of the selected people, in the order of the selection.

    Args:
        person: `largest` (the main person); `left` or `right`; a number from 1, in the order of the sizes; `x,y` in
            pixels: the nearest person. The position is the one where the person first appears. Several people are
            joined by `+`, such as `left+right`.
        source: name of the input in error messages.

    Raises:
        UserError: an invalid selection; fewer people than selected; the same person selected twice.
    """
    tracks = numbered_people(people, height, width)
    selected: list[int] = []
    for part in person.split("+"):
        number = _select([_first_pose(people, track) for track in tracks], part.strip(), source)
        if number in selected:
            raise UserError(
                f"{source}: person {person} selects one person twice; see the numbers of tcan pose"
            )
        selected.append(number)
    if not tracks:
        return [track_poses(people, np.full(len(people), -1))]
    return [track_poses(people, tracks[number]) for number in selected]


def numbered_people(people: People, height: float, width: float) -> list[NDArray[np.int64]]:
    """The tracks of `track_people` that are long and large enough to have a number; the first one has number 1."""
    tracks = track_people(people, height, width)
    extents = [_extent(people, track) for track in tracks]
    return [
        track for track, extent in zip(tracks, extents, strict=True) if extent >= MIN_SHARE * max(extents)
    ]


def check_selection(person: str, option: str) -> None:
    """Check the form of a selection before anything runs.

    Raises:
        UserError: neither a position, a number nor a point; the message names the option.
    """
    for part in person.split("+"):
        if part.strip() not in ("largest", "left", "right") and not _numbers(part):
            raise UserError(
                f"{option} {person}: invalid person; use largest, left, right, a number from 1 or X,Y in pixels, joined by + "
                "for several people"
            )


def _numbers(part: str) -> list[float]:
    """The number, or the x and y, of a selection; empty if it is invalid."""
    try:
        values = [float(value) for value in part.split(",")]
    except ValueError:
        return []
    is_number = len(values) == 1 and values[0] >= 1 and values[0] == int(values[0])
    return values if is_number or (len(values) == 2 and np.isfinite(values).all()) else []


def _select(poses: list[NDArray[np.float32]], part: str, source: str) -> int:
    check_selection(part, f"{source}: person")
    if not poses or part == "largest":
        return 0
    centers = np.stack([_center(pose) for pose in poses])
    if part in ("left", "right"):
        return int(centers[:, 0].argmin() if part == "left" else centers[:, 0].argmax())
    values = _numbers(part)
    if len(values) == 2:
        distances = [float(np.linalg.norm(pose[pose[:, 2] > 0, :2] - values, axis=1).min()) for pose in poses]
        return int(np.argmin(distances))
    if values[0] > len(poses):
        raise UserError(
            f"{source}: person {part}: only {len(poses)} found; use a number up to {len(poses)}, see the preview of tcan pose"
        )
    return int(values[0]) - 1


def _assign(
    tracks: list[_Track], detections: list[NDArray[np.float64]], frame: int, diagonal: float
) -> list[tuple[int, int]]:
    """(detection, track) pairs of minimum cost."""
    if not tracks or not detections:
        return []
    costs = np.full((len(detections), len(tracks)), FORBIDDEN)
    for column, track in enumerate(tracks):
        predicted = track.predict(frame)
        since = frame - track.frames[-1]
        # The velocity is unknown after one detection.
        slack = np.sqrt(since) * (2 if len(track.frames) == 1 else 1)
        for row, body in enumerate(detections):
            distance, size, change = _compare(predicted, body)
            if distance <= slack * max(MAX_JUMP * diagonal, MAX_STEP * size):
                costs[row, column] = (distance / max(size, 1)) ** 2 + change**2
    return [(r, c) for r, c in zip(*linear_sum_assignment(costs), strict=True) if costs[r, c] < FORBIDDEN]


def _link(tracks: list[_Track], diagonal: float) -> list[list[_Track]]:
    """Chains of tracks of one person: a track that ended is linked to at most one that starts later."""
    if not tracks:
        return []
    costs = np.full((len(tracks), len(tracks)), FORBIDDEN)
    for row, before in enumerate(tracks):
        for column, after in enumerate(tracks):
            gap = after.frames[0] - before.frames[-1]
            if gap <= 0:
                continue
            distance, size, change = _compare(before.predict(after.frames[0]), after.first)
            is_long = min(len(before.frames), len(after.frames)) >= CUT_FRAMES
            limit = 2 * gap * max(MAX_JUMP * diagonal, MAX_STEP * size)
            if abs(change) <= np.log(MAX_SCALE) and (is_long or distance <= limit):
                costs[row, column] = distance / diagonal + abs(change) + 0.01 * gap - 100
    following = {r: c for r, c in zip(*linear_sum_assignment(costs), strict=True) if costs[r, c] < FORBIDDEN}
    starts = set(range(len(tracks))) - set(following.values())
    chains = []
    for start in sorted(starts):
        chain = [start]
        while chain[-1] in following:
            chain.append(following[chain[-1]])
        chains.append([tracks[i] for i in chain])
    return chains


def _compare(expected: NDArray[np.floating], body: NDArray[np.floating]) -> tuple[float, float, float]:
    """Mean distance in pixels over the joints that both have, the expected size, and the logarithm of the change in size.

    Without joints that both have, the distance is that of the centers. Joints that only one has count as a change.
    """
    both = (expected[:, 2] > 0) & (body[:, 2] > 0)
    size = body_size(expected)
    if both.sum() < 2:
        distance = float(np.linalg.norm(_center(body) - _center(expected)))
        return distance, size, float(np.log((body_size(body) + 1) / (size + 1)))
    distance = float(np.linalg.norm(body[both, :2] - expected[both, :2], axis=1).mean())
    sizes = [float(np.linalg.norm(np.ptp(points[both, :2], axis=0))) + 1 for points in (expected, body)]
    change = float(np.log(sizes[1] / sizes[0]))
    missing = 1 - both.sum() / max((expected[:, 2] > 0).sum(), (body[:, 2] > 0).sum())
    return distance, size, change + float(np.copysign(0.2 * missing, change))


def _first_pose(people: People, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    frame = int(np.flatnonzero(indices >= 0)[0])
    return people[frame][indices[frame], BODY]


def _extent(people: People, indices: NDArray[np.int64]) -> float:
    """Sum of the sizes of a track over all frames, in pixels."""
    return sum(body_size(people[frame][indices[frame]]) for frame in np.flatnonzero(indices >= 0).tolist())


def _center(body: NDArray[np.floating]) -> NDArray[np.float64]:
    return body[body[:, 2] > 0, :2].astype(np.float64).mean(axis=0)


def body_size(body: NDArray[np.floating]) -> float:
    """Diagonal of the bounding box of a body's joints; unlike the area, it is not small for a narrow pose."""
    body = body[BODY]
    return float(np.linalg.norm(np.ptp(body[body[:, 2] > 0, :2], axis=0)))
