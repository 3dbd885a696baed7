"""Assembly of people from peaks and part affinity fields (Cao et al., CVPR 2017), with the constants of `Body`.

The fields are evaluated only at the samples on candidate limbs, not at frame resolution.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcan.pose.skeleton import DRAWN_LIMBS, LIMBS, PAF_CHANNELS

PAF_THRESHOLD = 0.05
"""Minimum agreement of the affinity field with a limb at a sample."""
PAF_SAMPLES = 10
"""Samples per candidate limb."""
MIN_SAMPLE_FRACTION = 0.8
"""A candidate limb needs more than this fraction of its samples above PAF_THRESHOLD."""
MIN_PARTS = 4
"""Minimum number of joints of a person."""
MIN_MEAN_SCORE = 0.4
"""Minimum score of a person (joints and limbs), divided by its number of joints."""
PAIRS_PER_BATCH = 100_000
"""Bounds the memory of limb scoring."""


@dataclass
class LimbCandidates:
    """Pairs of peaks that may be limbs.

    Candidates of limb l in frame f are `bounds[19 f + l]` to `bounds[19 f + l + 1]`.
    """

    ends: NDArray[np.int64]
    """`[M, 2]`, indices of the start and end peaks, sorted."""
    scores: NDArray[np.float64]
    """`[M]`"""
    bounds: NDArray[np.int64]
    """`[19 F + 1]`"""

    def of(self, frame: int, limb: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """`ends` and `scores` of one limb in one frame."""
        first, last = self.bounds[frame * len(LIMBS) + limb :][:2]
        return self.ends[first:last], self.scores[first:last]


def score_limbs(
    paf: Tensor, peaks: Tensor, rows: Tensor, columns: Tensor, frames: int, height: int
) -> LimbCandidates:
    """Score all pairs of peaks that may form a limb.

    The score is the field's mean agreement with the straight line between two peaks at 10 samples, minus a penalty for
    lines longer than 50% of the frame height (Cao et al., equation 10). Pairs are discarded if more than one sample is
    <= 0.05 or the score is not positive.

    Args:
        paf: `[F, 38, h, w]`.
        peaks: `[N, 4]` (frame, joint, y, x), sorted.
        rows, columns: the resize matrices `[height, h]` and `[width, w]` in float64.
        frames: F.
        height: frame height in pixels.
    """
    limb_group, start, end = _peak_pairs(peaks, frames)
    half_resized = paf.double() @ columns.T  # [F, 38, h, W]: rows are resized at the samples only
    channels = torch.tensor(PAF_CHANNELS, device=peaks.device)
    indices, scores = [], []
    for chunk in torch.arange(len(limb_group), device=peaks.device).split(PAIRS_PER_BATCH):
        p, q = peaks[start[chunk], 2:].double(), peaks[end[chunk], 2:].double()
        length = (q - p).norm(dim=1).clamp(min=0.001)
        direction = (q - p) / length[:, None]
        step = torch.arange(PAF_SAMPLES, device=peaks.device, dtype=torch.float64)[:, None] / (
            PAF_SAMPLES - 1
        )
        y, x = (p[:, None] + step * (q - p)[:, None]).round().long().unbind(-1)  # [M, 10]
        frame, channel = limb_group[chunk] // len(LIMBS), channels[limb_group[chunk] % len(LIMBS)]
        agreement = torch.zeros(y.shape, device=peaks.device, dtype=torch.float64)
        for axis, component in ((0, direction[:, 1:]), (1, direction[:, :1])):  # the field's x, then y
            field = half_resized[frame[:, None], channel[:, None] + axis, :, x]  # [M, 10, h]
            agreement += torch.einsum("msh,msh->ms", rows[y], field) * component
        score = agreement.mean(-1) + (0.5 * height / length - 1).clamp(max=0)
        samples = (agreement > PAF_THRESHOLD).sum(-1)
        accepted = (samples > MIN_SAMPLE_FRACTION * PAF_SAMPLES) & (score > 0)
        indices.append(chunk[accepted])
        scores.append(score[accepted])

    accepted_pairs = torch.cat(indices)
    bounds = np.searchsorted(limb_group[accepted_pairs].cpu().numpy(), np.arange(frames * len(LIMBS) + 1))
    ends = torch.stack([start[accepted_pairs], end[accepted_pairs]], dim=1).cpu().numpy()
    return LimbCandidates(ends, torch.cat(scores).cpu().numpy(), bounds)


def _peak_pairs(peaks: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of a start and an end peak of the same limb and frame, from sorted peaks `[N, 4]`.

    Returns:
        `[M]` each: 19 * frame + limb (sorted), index of the start peak, index of the end peak.
    """
    device = peaks.device
    counts = torch.bincount(peaks[:, 0] * 18 + peaks[:, 1], minlength=frames * 18)  # per (frame, joint)
    first = counts.cumsum(0) - counts
    start, end = torch.tensor(LIMBS, device=device).unbind(1)
    offset = torch.arange(frames, device=device)[:, None] * 18
    starts, ends = (
        (offset + start).flatten(),
        (offset + end).flatten(),
    )  # (frame, joint) of each (frame, limb)
    pairs = counts[starts] * counts[ends]
    limb_group = torch.arange(len(pairs), device=device).repeat_interleave(pairs)
    index = torch.arange(len(limb_group), device=device) - (pairs.cumsum(0) - pairs)[limb_group]
    num_ends = counts[ends][limb_group]
    return (
        limb_group,
        first[starts][limb_group] + index // num_ends,
        first[ends][limb_group] + index % num_ends,
    )


def assemble_people(
    peaks: NDArray[np.int64], scores: NDArray[np.float64], limbs: LimbCandidates, frames: int
) -> Iterator[NDArray[np.float32]]:
    """Yield each frame's people `[P, 18, 3]`.

    Greedy: candidates become limbs in order of their score if no limb of the same kind uses one of their peaks. Limbs
    that share a joint belong to one person.
    """
    keypoints = np.concatenate([peaks[:, :1:-1], np.minimum(scores, 1)[:, None]], axis=1).astype(np.float32)
    for frame in range(frames):
        people: list[_Person] = []
        for limb, (start, end) in enumerate(LIMBS):
            for a, b, score in _select_limbs(*limbs.of(frame, limb)):
                _add_limb(people, limb, start, end, a, b, score, scores)
        bodies = np.zeros((len(people), 18, 3), np.float32)
        for body, person in zip(bodies, people, strict=True):
            for joint, peak in person.joints.items():
                body[joint] = keypoints[peak]
        accepted = [
            person.parts >= MIN_PARTS and person.score / person.parts >= MIN_MEAN_SCORE for person in people
        ]
        yield bodies[np.array(accepted, dtype=bool)]


def _select_limbs(ends: NDArray[np.int64], scores: NDArray[np.float64]) -> Iterator[tuple[int, int, float]]:
    """Yield (start peak, end peak, score) by descending score; each peak is used at most once."""
    used_starts: set[int] = set()
    used_ends: set[int] = set()
    for k in np.argsort(-scores, kind="stable"):
        a, b = (int(peak) for peak in ends[k])
        if a not in used_starts and b not in used_ends:
            used_starts.add(a)
            used_ends.add(b)
            yield a, b, float(scores[k])


@dataclass
class _Person:
    joints: dict[int, int]
    """Joint -> index of its peak."""
    parts: int
    score: float


def _add_limb(
    people: list[_Person],
    limb: int,
    start: int,
    end: int,
    a: int,
    b: int,
    score: float,
    scores: NDArray[np.float64],
) -> None:
    """Add the limb from peak a (joint `start`) to peak b (joint `end`) to the person that shares one of its joints."""
    sharing = [person for person in people if person.joints.get(start) == a or person.joints.get(end) == b]
    if not sharing:
        if limb < DRAWN_LIMBS:
            people.append(_Person({start: a, end: b}, 2, float(scores[a] + scores[b]) + score))
        return
    person = sharing[0]
    # More than two people can share the limb only after another limb replaced a joint; `Body` raises in this case.
    if len(sharing) > 1 and not person.joints.keys() & sharing[1].joints.keys():
        other = sharing[1]
        person.joints |= other.joints
        person.parts += other.parts
        person.score += other.score + score
        people.remove(other)
    elif len(sharing) > 1 or person.joints.get(end) != b:
        person.joints[end] = b
        person.parts += 1
        person.score += float(scores[b]) + score
