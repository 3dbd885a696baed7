"""Finding people: OpenPose's network or one of its kind, and OpenPose's decoding, for many frames at once.

The decoding is Cao et al.'s (CVPR 2017), with the constants and order of controlnet_aux's `Body`, whose people it
finds. It differs in how the work is done. All that happens to a map between the network and its peaks (enlarging it
by 8, cutting off the padding, resizing it to the image, blurring it) is linear and acts on rows and columns apart, so
it is two small matrices around the network's own small map. Only heatmaps are ever made at the image's size; joint
scores and part affinity fields are computed at the few places where they are read.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from tcan.errors import UserError
from tcan.pose.skeleton import DRAWN_LIMBS, LIMBS, PAF_CHANNELS

STRIDE = 8
PADDING = 128  # grey
PEAK_THRESHOLD = 0.1  # least blurred heatmap at a joint
PAF_THRESHOLD = 0.05  # least agreement of the affinity field with a limb, at a sample on it
PAF_SAMPLES = 10  # a limb
PAIRS_AT_ONCE = 100_000  # bounds the memory of limb scoring
TILE = 24  # pixels: about a joint's hill
TILES_AT_ONCE = 4096  # bounds the memory of peak finding
NEARLY_ZERO = 1e-12
CANDIDATE_MARGIN = 1e-4  # more than float32 may be wrong by

OPENPOSE_FILE = "body_pose_model.pth"


class PoseDetector(Protocol):
    """Finds every person of every frame."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits: other weights or settings, another fingerprint."""
        ...

    def detect(
        self, frames: NDArray[np.uint8], batch_size: int = 16, zoom: float = 1.0
    ) -> list[NDArray[np.float32]]:
        """frames [F, H, W, 3] RGB -> for each frame its people's keypoints [P, 18, 3] in pixels; P may be 0.

        zoom: how many times as large as usual the network sees them: for people who are small in their images.
        """
        ...


def find_people(
    detector: PoseDetector, frames: Iterable[NDArray[np.uint8]], batch_size: int = 16
) -> tuple[list[NDArray[np.float32]], int, int]:
    """frames [H, W, 3] of any number, of one size -> for each its people's keypoints [P, 18, 3]; and H and W.

    `batch_size` frames are held at a time. Of no frames, the size is 0.
    """
    people: list[NDArray[np.float32]] = []
    height, width = 0, 0
    rest = iter(frames)
    while batch := list(islice(rest, batch_size)):
        height, width = batch[0].shape[:2]
        people += detector.detect(np.stack(batch), batch_size)
    return people, height, width


class OpenPose:
    """A pose network and its decoding.

    network: x [B, 3, h, w] (BGR, value / 256 - 0.5) -> paf [B, 38, h/8, w/8], heatmap [B, 19, h/8, w/8].
    input_height: the height in pixels to which images are resized before the network (OpenPose: half of 368).
    blur_sigma: of the heatmaps' Gaussian blur, in pixels of the image as given.
    """

    def __init__(
        self,
        network: nn.Module,
        input_height: float = 184.0,
        blur_sigma: float = 3.0,
        device: torch.device | str = "cpu",
    ):
        self.network = network.eval().requires_grad_(False).to(device)
        self.input_height = float(input_height)
        self.blur_sigma = float(blur_sigma)
        self.device = torch.device(device)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: torch.device | str = "cpu") -> "OpenPose":
        """source: a folder of `BodyPoseNetwork`, or OpenPose's `body_pose_model.pth` as a file, in a folder, or in a
        repository of the Hugging Face hub (`lllyasviel/Annotators[@revision]`).

        Raises UserError where there is no such thing or it does not fit.
        """
        path = Path(source)
        if (path / "config.json").is_file():
            return cls._from_folder(path, device)
        if not path.is_file():
            path = find_openpose_file(source, OPENPOSE_FILE)
        network = open_pose_module("model").bodypose_model()
        return cls(load_openpose_network(network, path, OPENPOSE_FILE, in_blocks=True), device=device)

    @classmethod
    def _from_folder(cls, path: Path, device: torch.device | str) -> "OpenPose":
        from tcan.pose.network import BodyPoseNetwork

        try:
            network, report = BodyPoseNetwork.from_pretrained(path, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"pose network {path} cannot be loaded: {_first_line(error)}") from error
        if problems := {name: keys for name, keys in report.items() if keys}:
            raise UserError(f"pose network {path}: the weights do not fit: {problems}")
        return cls(network, network.config.input_height, network.config.blur_sigma, device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what `from_pretrained` reads: a folder of `BodyPoseNetwork`, or one with OpenPose's file."""
        if hasattr(self.network, "save_pretrained"):
            self.network.save_pretrained(folder)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = self.network.state_dict()
        torch.save({name.split(".", 1)[1]: weights[name] for name in weights}, Path(folder) / OPENPOSE_FILE)

    @property
    def fingerprint(self) -> str:
        from tcan.fingerprint import fingerprint

        settings = {"input_height": self.input_height, "blur_sigma": self.blur_sigma}
        weights = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return fingerprint(weights | {name: torch.tensor(value) for name, value in settings.items()})

    @torch.inference_mode()
    def detect(
        self, frames: NDArray[np.uint8], batch_size: int = 16, zoom: float = 1.0
    ) -> list[NDArray[np.float32]]:
        """frames [F, H, W, 3] RGB -> for each frame its people's keypoints [P, 18, 3] in pixels; P may be 0.

        zoom: see `PoseDetector`; it multiplies `input_height`.
        A joint not found is all 0; the score of one found is its heatmap's height there, at most 1.
        """
        people: list[NDArray[np.float32]] = []
        for start in range(0, len(frames), batch_size):
            batch = frames[start : start + batch_size]
            images, size = self._inputs(batch, zoom)
            paf, heatmap = self.network(images)
            people += self.decode(paf, heatmap, size, batch.shape[1:3])
        return people

    def _inputs(self, frames: NDArray[np.uint8], zoom: float) -> tuple[Tensor, tuple[int, int]]:
        """The network's images [B, 3, h, w] and their height and width before padding to multiples of 8."""
        height, width = frames.shape[1:3]
        scale = self.input_height * zoom / height
        # Products rather than the known height: rounded down as `Body` does it, a pixel may be lost.
        h, w = int(height * scale), int(width * scale)
        if min(h, w) < 1:
            raise UserError(f"a frame of {width} x {height} pixels is too narrow to find people in")
        padded = np.full(
            (len(frames), -(-h // STRIDE) * STRIDE, -(-w // STRIDE) * STRIDE, 3),
            PADDING,
            np.uint8,
        )
        method = _interpolation(scale)
        for image, frame in zip(padded, frames, strict=True):
            image[:h, :w] = cv2.resize(frame, (w, h), interpolation=method)
        images = torch.from_numpy(padded).to(self.device).flip(-1).permute(0, 3, 1, 2)
        return (images.float() / 256 - 0.5).contiguous(), (h, w)

    def decode(
        self,
        paf: Tensor,
        heatmap: Tensor,
        size: tuple[int, int],
        frame_size: Sequence[int],
    ) -> list[NDArray[np.float32]]:
        """The people [P, 18, 3] of each frame, from the network's maps.

        paf [B, 38, h, w], heatmap [B, 19, h, w]; size: height and width of the network's images without their
        padding; frame_size: height and width of the frames, in whose pixels the keypoints are.
        """
        rows, columns = self._enlarging(heatmap.shape[-2:], size, frame_size)
        peaks, scores = self._peaks(heatmap[:, :18], rows, columns)
        lines = _lines(paf, peaks, rows.plain, columns.plain, len(heatmap), frame_size[0])
        return list(_assemble(peaks.cpu().numpy(), scores.cpu().numpy(), lines, len(heatmap)))

    def _enlarging(
        self, map_size: Sequence[int], size: tuple[int, int], frame_size: Sequence[int]
    ) -> tuple["_Enlarging", "_Enlarging"]:
        # One method of resizing for both axes, chosen as `Body` chooses it.
        method = _interpolation(sum(frame_size) / sum(size))
        rows, columns = (
            _enlarging(*sizes, method, self.blur_sigma, self.device)
            for sizes in zip(map_size, size, frame_size, strict=True)
        )
        return rows, columns

    def _peaks(self, heatmap: Tensor, rows: "_Enlarging", columns: "_Enlarging") -> tuple[Tensor, Tensor]:
        """Peaks [N, 4] (frame, joint, y, x) in that order, and their scores [N] in float64.

        Float32 is enough to find where a peak may be, not to say which of two nearly equal neighbours is the higher:
        with both taken, one person becomes two. So the few candidates are compared again in float64.
        """
        height, width = len(rows.blurred), len(columns.blurred)
        found = _candidates(heatmap, rows, columns)
        frame, joint, y, x = found.unbind(1)
        maps = heatmap.double()[frame, joint]  # [N, h, w]
        value = _at(maps, rows.blurred, columns.blurred, y, x)
        peak = value > PEAK_THRESHOLD
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = (v >= 0) & (v < height) & (u >= 0) & (u < width)
            other = _at(
                maps,
                rows.blurred,
                columns.blurred,
                v.clamp(0, height - 1),
                u.clamp(0, width - 1),
            )
            peak &= (value >= other) | ~inside
        return found[peak], _at(maps, rows.plain, columns.plain, y, x)[peak]


# --- the network of OpenPose -----------------------------------------------------------------------------------------


def load_openpose_network(network: nn.Module, path: Path, name: str, *, in_blocks: bool) -> nn.Module:
    """One of controlnet_aux's networks with the weights of OpenPose's file.

    name: of that file, as OpenPose names it. in_blocks: the network's layers lie in blocks, whose names the file's keys lack.

    Raises:
        UserError: the file holds something else.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no pickle, the reader may raise anything
        raise UserError(f"pose network {path} is not a file of weights: {_first_line(error)}") from error
    names = {key.split(".", 1)[1] if in_blocks else key: key for key in network.state_dict()}
    keys = weights.keys() if isinstance(weights, dict) else set()
    if keys != names.keys():
        missing, unexpected = sorted(names.keys() - keys), sorted(map(str, keys - names.keys()))
        raise UserError(
            f"pose network {path} is not OpenPose's {name}: "
            f"{len(missing)} keys missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
    try:
        network.load_state_dict({names[key]: value for key, value in weights.items()})
    except RuntimeError as error:
        raise UserError(f"pose network {path} does not fit: {str(error).splitlines()[-1].strip()}") from error
    return network


def open_pose_module(name: str) -> Any:
    """`controlnet_aux.open_pose.{name}`, apart from its packages: to import these takes 10 s and warns a page."""
    package = "controlnet_aux_open_pose"
    if package not in sys.modules:
        parent = importlib.util.find_spec("controlnet_aux")
        if parent is None or parent.submodule_search_locations is None:
            raise UserError(
                "OpenPose's own networks need the package controlnet-aux: pip install controlnet-aux"
            )
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(Path(parent.submodule_search_locations[0]) / "open_pose")]
    return importlib.import_module(f"{package}.{name}")


def find_openpose_file(source: str | Path, name: str) -> Path:
    """One of OpenPose's files in a folder or in a repository of the Hugging Face hub (`...[@revision]`).

    Raises:
        UserError: it is not there.
    """
    if not Path(source).is_dir():
        return _download(str(source), name)
    path = Path(source) / name
    if not path.is_file():
        other = "neither config.json nor" if name == OPENPOSE_FILE else "no"
        raise UserError(f"pose network {source}: the folder has {other} {name}")
    return path


def _download(source: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        repository, _, revision = source.partition("@")
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OSError,
    ) as error:
        raise UserError(
            f"pose network {source}: no such file or folder, and not to be had from the hub ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- resizing and blurring as matrices -------------------------------------------------------------------------------


class _Enlarging:
    """One axis of a map to one axis of the frame: `plain` [pixels, cells], and `blurred`, the same and then blurred.

    pixels: [T, TILE + 2], the pixels of each tile with a neighbour at either end; tiles: float32 [T, TILE + 2, cells],
    `blurred` there; bound: [T, cells], the largest size of each of its columns.
    """

    def __init__(self, plain: NDArray[np.float64], sigma: float, device: torch.device):
        # What a linear operation does is read off from what it does to the unit vectors.
        self.plain = torch.from_numpy(plain).to(device)
        self.blurred = torch.from_numpy(gaussian_filter1d(plain, sigma, axis=0)).to(device)
        pixels = torch.arange(-(-len(plain) // TILE))[:, None] * TILE + torch.arange(-1, TILE + 1)
        self.pixels = pixels.clamp(0, len(plain) - 1).to(device)
        self.tiles = self.blurred.float()[self.pixels]
        self.bound = self.tiles.abs().amax(1)


def _interpolation(scale: float) -> int:
    return cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4


@lru_cache(maxsize=16)
def _enlarging(
    cells: int, size: int, pixels: int, method: int, sigma: float, device: torch.device
) -> _Enlarging:
    def resizing(old: int, new: int, method: int) -> NDArray[np.float64]:
        return cv2.resize(np.eye(old, dtype=np.float32), (old, new), interpolation=method).astype(np.float64)

    by_stride = resizing(cells, cells * STRIDE, cv2.INTER_LANCZOS4)
    return _Enlarging(resizing(size, pixels, method) @ by_stride[:size], sigma, device)


def _at(maps: Tensor, rows: Tensor, columns: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The enlarged maps' values [N] at pixels (y, x); maps [N, h, w]."""
    return torch.einsum("nh,nhw,nw->n", rows[y], maps, columns[x])


def _candidates(heatmap: Tensor, rows: _Enlarging, columns: _Enlarging) -> Tensor:
    """Places [N, 4] (frame, joint, y, x), in that order, where in float32 the blurred map is above the threshold and
    above its four neighbours, or nearly so.

    Joints are few and small: the enlarged map is computed only in those tiles whose upper bound passes the threshold.
    """
    least = PEAK_THRESHOLD - CANDIDATE_MARGIN
    # With numbers that float32 holds only as denormals, such as a Gaussian's tail, a CPU computes ten times as slowly.
    heatmap = torch.where(heatmap.abs() < NEARLY_ZERO, 0, heatmap)
    bound = rows.bound @ heatmap.abs() @ columns.bound.T  # [B, 18, tiles, tiles]
    wide = columns.blurred.float() @ heatmap.mT  # [B, 18, W, h]
    kept = []
    for v, tiles in enumerate(rows.tiles):  # one product for a row of tiles is quicker than one for each
        for some in (bound[:, :, v] > least).nonzero().split(TILES_AT_ONCE):
            frame, joint, u = some.unbind(1)
            strips = wide[frame[:, None], joint[:, None], columns.pixels[u]]  # [M, TILE + 2, h]
            values = strips @ tiles.mT  # [M, TILE + 2, TILE + 2]: x, then y
            centre = values[:, 1:-1, 1:-1] + CANDIDATE_MARGIN
            peak = centre > PEAK_THRESHOLD
            for beside in (slice(0, -2), slice(2, None)):
                peak &= (centre >= values[:, beside, 1:-1]) & (centre >= values[:, 1:-1, beside])
            tile, x, y = peak.nonzero().unbind(1)
            kept.append(torch.stack([frame[tile], joint[tile], v * TILE + y, u[tile] * TILE + x], dim=1))
    if not kept:
        return torch.empty(0, 4, dtype=torch.long, device=heatmap.device)
    found = torch.cat(kept)
    height, width = len(rows.blurred), len(columns.blurred)
    found = found[(found[:, 2] < height) & (found[:, 3] < width)]  # the last tiles hang over
    order = ((found[:, 0] * 18 + found[:, 1]) * height + found[:, 2]) * width + found[:, 3]
    return found[order.argsort()]


# --- limbs and people ------------------------------------------------------------------------------------------------


class _Lines:
    """Pairs of peaks that may be limbs: `ends` [M, 2], their numbers in order of peaks, and `scores` [M].

    Those of limb l of frame f lie between `bounds[19 f + l]` and the next bound.
    """

    def __init__(self, ends: NDArray[np.int64], scores: NDArray[np.float64], bounds: NDArray[np.int64]):
        self.ends, self.scores, self.bounds = ends, scores, bounds

    def of(self, frame: int, limb: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        first, last = self.bounds[frame * len(LIMBS) + limb :][:2]
        return self.ends[first:last], self.scores[first:last]


def _lines(paf: Tensor, peaks: Tensor, rows: Tensor, columns: Tensor, frames: int, height: int) -> "_Lines":
    """The pairs of peaks that may be a limb.

    A score is the field's mean agreement with the straight line between
    two peaks at 10 samples, less a penalty for lines longer than half the frame's height (Cao et al., equation 10).
    Pairs with more than one sample at or below 0.05, or without a positive score, are left out.
    """
    device = peaks.device
    group = peaks[:, 0] * 18 + peaks[:, 1]
    counts = torch.bincount(group, minlength=frames * 18)
    first = counts.cumsum(0) - counts
    start, end = torch.tensor(LIMBS, device=device).unbind(1)
    base = torch.arange(frames, device=device)[:, None] * 18
    starts, ends = (base + start).flatten(), (base + end).flatten()  # groups of each (frame, limb)
    pairs = counts[starts] * counts[ends]
    place = torch.arange(len(pairs), device=device).repeat_interleave(pairs)  # (frame, limb) of each pair
    within = torch.arange(len(place), device=device) - (pairs.cumsum(0) - pairs)[place]
    ends_there = counts[ends][place]
    a = first[starts][place] + within // ends_there
    b = first[ends][place] + within % ends_there

    half = paf.double() @ columns.T  # [B, 38, h, W]: rows are enlarged at the samples only
    channel = torch.tensor(PAF_CHANNELS, device=device)
    kept = []
    for chunk in torch.arange(len(place), device=device).split(PAIRS_AT_ONCE):
        p, q = peaks[a[chunk], 2:].double(), peaks[b[chunk], 2:].double()
        length = (q - p).norm(dim=1).clamp(min=0.001)
        direction = (q - p) / length[:, None]
        step = torch.arange(PAF_SAMPLES, device=device, dtype=torch.float64)[:, None] / (PAF_SAMPLES - 1)
        y, x = (p[:, None] + step * (q - p)[:, None]).round().long().unbind(-1)  # [M, 10]
        frame, limb = place[chunk] // len(LIMBS), place[chunk] % len(LIMBS)
        agreement = torch.zeros(y.shape, device=device, dtype=torch.float64)
        for axis, towards in ((0, direction[:, 1:]), (1, direction[:, :1])):  # the field's x, then y
            column = half[frame[:, None], channel[limb][:, None] + axis, :, x]  # [M, 10, h]
            agreement += torch.einsum("msh,msh->ms", rows[y], column) * towards
        score = agreement.mean(-1) + (0.5 * height / length - 1).clamp(max=0)
        good = ((agreement > PAF_THRESHOLD).sum(-1) > 0.8 * PAF_SAMPLES) & (score > 0)
        kept.append((chunk[good], score[good]))

    chosen = torch.cat([index for index, _ in kept])
    bounds = np.searchsorted(place[chosen].cpu().numpy(), np.arange(frames * len(LIMBS) + 1))
    lines = torch.stack([a[chosen], b[chosen]], dim=1).cpu().numpy()
    return _Lines(lines, torch.cat([score for _, score in kept]).cpu().numpy(), bounds)


def _assemble(
    peaks: NDArray[np.int64],
    scores: NDArray[np.float64],
    lines: "_Lines",
    frames: int,
) -> Iterator[NDArray[np.float32]]:
    """Greedily: the best lines become limbs, no two of a kind sharing a peak; limbs that share a joint, people."""
    keypoints = np.concatenate([peaks[:, :1:-1], np.minimum(scores, 1)[:, None]], axis=1).astype(np.float32)
    for frame in range(frames):
        people: list[_Person] = []
        for limb, (start, end) in enumerate(LIMBS):
            for a, b, score in _best(*lines.of(frame, limb)):
                _join(people, limb, start, end, a, b, score, scores)
        bodies = np.zeros((len(people), 18, 3), np.float32)
        for body, person in zip(bodies, people, strict=True):
            for joint, peak in person.joints.items():
                body[joint] = keypoints[peak]
        whole = [person.parts >= 4 and person.score / person.parts >= 0.4 for person in people]
        yield bodies[np.array(whole, dtype=bool)]


def _best(lines: NDArray[np.int64], values: NDArray[np.float64]) -> Iterator[tuple[int, int, float]]:
    used_a: set[int] = set()
    used_b: set[int] = set()
    for k in np.argsort(-values, kind="stable"):
        a, b = (int(peak) for peak in lines[k])
        if a not in used_a and b not in used_b:
            used_a.add(a)
            used_b.add(b)
            yield a, b, float(values[k])


class _Person:
    def __init__(self, joints: dict[int, int], parts: int, score: float):
        self.joints = joints  # joint -> peak
        self.parts = parts
        self.score = score


def _join(
    people: list[_Person],
    limb: int,
    start: int,
    end: int,
    a: int,
    b: int,
    score: float,
    scores: NDArray[np.float64],
) -> None:
    """Adds the limb from peak a (joint start) to peak b (joint end) to whom it belongs."""
    sharing = [person for person in people if person.joints.get(start) == a or person.joints.get(end) == b]
    if not sharing:
        if limb < DRAWN_LIMBS:
            people.append(_Person({start: a, end: b}, 2, float(scores[a] + scores[b]) + score))
        return
    person = sharing[0]
    # More than two can share a limb's ends only after an end was taken from someone; `Body` fails there.
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
