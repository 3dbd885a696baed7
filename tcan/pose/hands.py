"""Hand and face keypoints: OpenPose's hand and face networks (Simon et al., CVPR 2017), on crops around wrists and heads.

Crops, sizes and thresholds are those of controlnet_aux's `Hand` and `Face`, and the points are the same. Here the
networks process crops in batches, and a point that was not found keeps its index and is all 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from tcan.errors import UserError
from tcan.fingerprint import fingerprint
from tcan.pose.openpose import OpenPose
from tcan.pose.openpose_loading import (
    FACE_FILE,
    HAND_FILE,
    find_openpose_file,
    load_openpose_network,
    open_pose_module,
)
from tcan.pose.parts import join_parts
from tcan.pose.skeleton import STRIDE
from tcan.transfer import HostCopy, upload

HAND_POINTS, FACE_POINTS = 21, 70

THRESHOLD = 0.05  # minimum heatmap value at a point
HAND_SIDES = (184, 368, 552, 736)  # input sizes of the hand network, over which heatmaps are averaged
HAND_MAP = 128  # side of the averaged heatmap
HAND_SIGMA = 3.0  # blur of the averaged heatmap before thresholding, to suppress noise
FACE_SIDE = 384  # input size of the face network
CROPS_PER_BATCH = 8  # bounds the networks' memory

Square = tuple[int, int, int]  # x, y, side


class PartDetector:
    """A network for one part of the body, and its device."""

    def __init__(self, network: nn.Module, device: torch.device | str = "cpu"):
        self.network = network.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)

    def to(self, device: torch.device | str) -> None:
        """Move the network to a device."""
        self.network.to(device)
        self.device = torch.device(device)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the weights."""
        return fingerprint(self.network)


class HandDetector(PartDetector):
    """Hand keypoint detector.

    Args:
        network: maps x `[B, 3, s, s]` (BGR, value / 256 - 0.5) to heatmaps `[B, 22, s/8, s/8]`, the last one of the
            background.
        device: of the network.
    """

    @classmethod
    def from_pretrained(cls, source: str | Path, device: torch.device | str = "cpu") -> "HandDetector":
        """Load OpenPose's `hand_pose_model.pth` from the same folder or repository as `body_pose_model.pth`.

        Args:
            source: as for `OpenPose.from_pretrained`.
            device: of the network.

        Raises:
            UserError: the file does not exist or does not match the network.
        """
        network = open_pose_module("model").handpose_model()
        return cls(
            load_openpose_network(network, _file(source, HAND_FILE), HAND_FILE, in_blocks=True), device
        )

    def detect(
        self, frames: NDArray[np.uint8], people: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """Left and right hand keypoints `[P, 2, 21, 3]` in pixels of each frame's people.

        Args:
            frames: `[F, H, W, 3]` RGB.
            people: body keypoints `[P, 18, 3]` of each frame.
        """
        found = [np.zeros((len(bodies), 2, HAND_POINTS, 3), np.float32) for bodies in people]
        squares = [
            ((f, p, 0 if is_left else 1), (x, y, side))
            for f, bodies in enumerate(people)
            for p, body in enumerate(bodies)
            for x, y, side, is_left in open_pose_module("util").handDetect(_body(body), frames[f])
        ]
        for batch in _batches(squares):
            crops = [_crop(frames[f], square) for (f, _, _), square in batch]
            for ((f, p, hand), (x, y, _)), points in zip(batch, self._points(crops), strict=True):
                found[f][p, hand] = _to_frame(points, x, y)
        return found

    @torch.inference_mode()
    def _points(self, crops: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """Keypoints `[21, 3]` in crop pixels of each BGR crop `[s, s, 3]`."""
        util = open_pose_module("util")
        blurred = [cv2.GaussianBlur(crop, (0, 0), 0.8) for crop in crops]
        maps = np.zeros((len(crops), HAND_MAP, HAND_MAP, HAND_POINTS + 1))
        # All scales are launched before the host waits for the first one.
        copies = [
            HostCopy(
                self.heatmaps(
                    _upload([util.smart_resize(crop, (side, side)) for crop in blurred], self.device)
                )
            )
            for side in HAND_SIDES
        ]
        for copy in copies:
            for total, heatmap in zip(maps, copy.numpy(), strict=True):
                full = util.smart_resize_k(heatmap, fx=STRIDE, fy=STRIDE)
                total += util.smart_resize(full, (HAND_MAP, HAND_MAP)) / len(HAND_SIDES)
        return [
            np.stack([_hand_point(heatmap[..., i], len(crop)) for i in range(HAND_POINTS)])
            for heatmap, crop in zip(maps, crops, strict=True)
        ]

    def heatmaps(self, crops: Tensor) -> Tensor:
        """float32 `[B, s/8, s/8, 22]` of BGR uint8 crops `[B, s, s, 3]` on the network's device, without a synchronization."""
        return self.network(_normalized(crops, self.network)).float().permute(0, 2, 3, 1)


class FaceDetector(PartDetector):
    """Face keypoint detector.

    Args:
        network: maps x `[B, 3, 384, 384]` (BGR, value / 256 - 0.5) to the heatmaps `[B, 71, 48, 48]` of each stage, the
            last map of the background.
        device: of the network.
    """

    @classmethod
    def from_pretrained(cls, source: str | Path, device: torch.device | str = "cpu") -> "FaceDetector":
        """Load OpenPose's `facenet.pth` from the same folder or repository as `body_pose_model.pth`.

        Args:
            source: as for `OpenPose.from_pretrained`.
            device: of the network.

        Raises:
            UserError: the file does not exist or does not match the network.
        """
        network = open_pose_module("face").FaceNet()
        return cls(
            load_openpose_network(network, _file(source, FACE_FILE), FACE_FILE, in_blocks=False), device
        )

    @torch.inference_mode()
    def detect(
        self, frames: NDArray[np.uint8], people: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """Face keypoints `[P, 70, 3]` in pixels of each frame's people.

        Args:
            frames: `[F, H, W, 3]` RGB.
            people: body keypoints `[P, 18, 3]` of each frame.
        """
        util = open_pose_module("util")
        found = [np.zeros((len(bodies), FACE_POINTS, 3), np.float32) for bodies in people]
        squares = [
            ((f, p), square)
            for f, bodies in enumerate(people)
            for p, body in enumerate(bodies)
            if (square := util.faceDetect(_body(body), frames[f])) is not None
        ]
        copies = []
        for batch in _batches(squares):
            crops = [_crop(frames[f], square) for (f, _), square in batch]
            resized = [util.smart_resize(crop, (FACE_SIDE, FACE_SIDE)) for crop in crops]
            copies.append(
                HostCopy(self.points(_upload(resized, self.device), [crop.shape[:2] for crop in crops]))
            )
        for batch, copy in zip(_batches(squares), copies, strict=True):
            for ((f, p), (x, y, _)), points in zip(batch, copy.numpy(), strict=True):
                found[f][p] = _to_frame(points, x, y)
        return found

    def points(self, crops: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Keypoints `[B, 70, 3]` in pixels of the original crops, without a host synchronization.

        Args:
            crops: BGR uint8 `[B, 384, 384, 3]` on the network's device.
            sizes: height and width of each original crop.
        """
        heatmaps = self.network(_normalized(crops, self.network))[-1].float()
        found = []
        for heatmap, size in zip(heatmaps, sizes, strict=True):
            maps = F.interpolate(heatmap[None], size, mode="bilinear", align_corners=True)[0]
            score, index = maps[:FACE_POINTS].flatten(1).max(dim=1)
            points = torch.stack([index % size[1], index // size[1], score], dim=1)
            found.append(torch.where(score[:, None] > THRESHOLD, points, 0))
        return torch.stack(found)


class OpenPoseParts:
    """OpenPose's networks of the body and of hands, faces or both, as a `tcan.pose.PoseDetector` of keypoints `[P, 130, 3]`.

    Args:
        body: detector of the bodies.
        hands, face: detectors of the parts, at least one of them; parts without a detector are all 0.
    """

    def __init__(self, body: OpenPose, hands: HandDetector | None, face: FaceDetector | None):
        self.body, self.hands, self.face = body, hands, face

    @property
    def fingerprint(self) -> str:
        """That of the body network."""
        return self.body.fingerprint

    @property
    def part_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the networks of "hand" and "face"."""
        parts = {"hand": self.hands, "face": self.face}
        return {name: part.fingerprint for name, part in parts.items() if part is not None}

    def to(self, device: torch.device | str) -> "OpenPoseParts":
        """Move the networks to a device."""
        self.body.to(device)
        for part in (self.hands, self.face):
            if part is not None:
                part.to(device)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Save OpenPose's files to a folder for `tcan.weights.load_pose_detector`."""
        self.body.save_pretrained(folder)
        if self.hands is not None:
            weights = self.hands.network.state_dict()
            torch.save({name.split(".", 1)[1]: weights[name] for name in weights}, Path(folder) / HAND_FILE)
        if self.face is not None:
            torch.save(dict(self.face.network.state_dict()), Path(folder) / FACE_FILE)

    def detect(
        self, frames: NDArray[np.uint8], batch_size: int = 16, zoom: float = 1.0
    ) -> list[NDArray[np.float32]]:
        """Detect people in frames `[F, H, W, 3]` (RGB), as specified by `PoseDetector`: keypoints `[P, 130, 3]` of each frame."""
        people = self.body.detect(frames, batch_size, zoom)
        nothing = [None] * len(people)
        hands = nothing if self.hands is None else self.hands.detect(frames, people)
        faces = nothing if self.face is None else self.face.detect(frames, people)
        return [join_parts(*parts) for parts in zip(people, hands, faces, strict=True)]


def _file(source: str | Path, name: str) -> Path:
    path = Path(source).expanduser()
    path = path / "pose" if (path / "pose").is_dir() else path
    if source == "mini" or (path / "config.json").is_file():
        raise UserError(
            f"pose network {source}: detects only bodies; for hands and faces give OpenPose's networks, including {name}"
        )
    local = path.parent if path.is_file() else path
    return find_openpose_file(local if local.is_dir() else source, name)


def _body(keypoints: NDArray[np.float32]) -> Any:
    """Keypoints `[18, 3]` as controlnet_aux's BodyResult."""
    body = open_pose_module("body")
    joints = [
        body.Keypoint(float(x), float(y), float(score)) if score > 0 else None for x, y, score in keypoints
    ]
    return body.BodyResult(joints, 0.0, 0)


def _batches(squares: list[Any]) -> list[list[Any]]:
    return [squares[i : i + CROPS_PER_BATCH] for i in range(0, len(squares), CROPS_PER_BATCH)]


def _crop(frame: NDArray[np.uint8], square: Square) -> NDArray[np.uint8]:
    """BGR crop `[side, side, 3]`; smaller if the square extends past the frame."""
    x, y, side = square
    return np.ascontiguousarray(frame[y : y + side, x : x + side, ::-1])


def _upload(images: list[NDArray[np.uint8]], device: torch.device) -> Tensor:
    return upload(np.stack(images), device)


def _normalized(images: Tensor, network: nn.Module) -> Tensor:
    """The network's input of uint8 images `[B, h, w, 3]`."""
    dtype = next(network.parameters()).dtype
    return (images.permute(0, 3, 1, 2).float() / 256 - 0.5).to(dtype).contiguous()


def _hand_point(heatmap: NDArray[np.float64], side: int) -> NDArray[np.float32]:
    """(x, y, score) of the peak in the region with the largest heatmap sum, in pixels of a crop of `side` pixels."""
    regions, count = ndimage.label(ndimage.gaussian_filter(heatmap, HAND_SIGMA) > THRESHOLD, np.ones((3, 3)))
    if not count:
        return np.zeros(3, np.float32)
    largest = 1 + np.argmax(ndimage.sum_labels(heatmap, regions, np.arange(1, count + 1)))
    inside = np.where(regions == largest, heatmap, 0)
    y, x = np.unravel_index(inside.argmax(), inside.shape)
    return np.array([int(x * side / HAND_MAP), int(y * side / HAND_MAP), min(1, inside[y, x])], np.float32)


def _to_frame(points: NDArray[np.float32], x: int, y: int) -> NDArray[np.float32]:
    """Convert points `[N, 3]` from crop pixels to frame pixels; points that were not found stay 0."""
    return np.where(points[:, 2:] > 0, points + np.array([x, y, 0], np.float32), 0).astype(np.float32)
