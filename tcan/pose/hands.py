"""Hands and faces: OpenPose's two further networks (Simon et al., CVPR 2017), in squares around the wrists and the head.

Squares, sizes and thresholds are those of controlnet_aux's `Hand` and `Face`, whose points it finds; here the networks
take many squares at once, and what was not found keeps its place: all 0. TCAN draws and trains on bodies alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from tcan.errors import UserError
from tcan.pose.openpose import STRIDE, find_openpose_file, load_openpose_network, open_pose_module

HAND_FILE, FACE_FILE = "hand_pose_model.pth", "facenet.pth"
HAND_POINTS, FACE_POINTS = 21, 70

THRESHOLD = 0.05  # least heatmap at a point
HAND_SIDES = (184, 368, 552, 736)  # a hand is seen at four sizes, whose heatmaps are averaged
HAND_MAP = 128  # side of the averaged heatmap
HAND_SIGMA = 3.0  # of the blur by which a hand's points are told apart from noise
FACE_SIDE = 384
SQUARES_AT_ONCE = 8  # bounds the networks' memory

Square = tuple[int, int, int]  # x, y, side


class HandDetector:
    """network: x [B, 3, s, s] (BGR, value / 256 - 0.5) -> heatmaps [B, 22, s/8, s/8], the last one of the background."""

    def __init__(self, network: nn.Module, device: torch.device | str = "cpu"):
        self.network = network.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: torch.device | str = "cpu") -> "HandDetector":
        """source: as for `OpenPose`: OpenPose's `hand_pose_model.pth` lies beside its `body_pose_model.pth`.

        Raises:
            UserError: there is no such file, or it does not fit.
        """
        network = open_pose_module("model").handpose_model()
        return cls(
            load_openpose_network(network, _file(source, HAND_FILE), HAND_FILE, in_blocks=True), device
        )

    @property
    def fingerprint(self) -> str:
        from tcan.fingerprint import fingerprint

        return fingerprint(self.network)

    def detect(
        self, frames: NDArray[np.uint8], people: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """frames [F, H, W, 3] RGB and the people [P, 18, 3] of each -> their left and right hands' points
        [P, 2, 21, 3] in pixels."""
        found = [np.zeros((len(bodies), 2, HAND_POINTS, 3), np.float32) for bodies in people]
        squares = [
            ((f, p, 0 if is_left else 1), (x, y, side))
            for f, bodies in enumerate(people)
            for p, body in enumerate(bodies)
            for x, y, side, is_left in open_pose_module("util").handDetect(_body(body), frames[f])
        ]
        for some in _chunks(squares):
            crops = [_crop(frames[f], square) for (f, _, _), square in some]
            for ((f, p, hand), (x, y, _)), points in zip(some, self._points(crops), strict=True):
                found[f][p, hand] = _moved(points, x, y)
        return found

    @torch.inference_mode()
    def _points(self, crops: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """BGR [s, s, 3] each -> [21, 3] each, in the crop's pixels."""
        util = open_pose_module("util")
        blurred = [cv2.GaussianBlur(crop, (0, 0), 0.8) for crop in crops]
        maps = np.zeros((len(crops), HAND_MAP, HAND_MAP, HAND_POINTS + 1))
        for side in HAND_SIDES:
            images = _inputs([util.smart_resize(crop, (side, side)) for crop in blurred], self.device)
            heatmaps = self.network(images).permute(0, 2, 3, 1).cpu().numpy()
            for total, heatmap in zip(maps, heatmaps, strict=True):
                full = util.smart_resize_k(heatmap, fx=STRIDE, fy=STRIDE)
                total += util.smart_resize(full, (HAND_MAP, HAND_MAP)) / len(HAND_SIDES)
        return [
            np.stack([_hand_point(heatmap[..., i], len(crop)) for i in range(HAND_POINTS)])
            for heatmap, crop in zip(maps, crops, strict=True)
        ]


class FaceDetector:
    """network: x [B, 3, 384, 384] (BGR, value / 256 - 0.5) -> heatmaps [B, 71, 48, 48] of each of its stages, the last
    map of the background."""

    def __init__(self, network: nn.Module, device: torch.device | str = "cpu"):
        self.network = network.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: torch.device | str = "cpu") -> "FaceDetector":
        """source: as for `OpenPose`: OpenPose's `facenet.pth` lies beside its `body_pose_model.pth`.

        Raises:
            UserError: there is no such file, or it does not fit.
        """
        network = open_pose_module("face").FaceNet()
        return cls(
            load_openpose_network(network, _file(source, FACE_FILE), FACE_FILE, in_blocks=False), device
        )

    @property
    def fingerprint(self) -> str:
        from tcan.fingerprint import fingerprint

        return fingerprint(self.network)

    @torch.inference_mode()
    def detect(
        self, frames: NDArray[np.uint8], people: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """frames [F, H, W, 3] RGB and the people [P, 18, 3] of each -> their faces' points [P, 70, 3] in pixels."""
        util = open_pose_module("util")
        found = [np.zeros((len(bodies), FACE_POINTS, 3), np.float32) for bodies in people]
        squares = [
            ((f, p), square)
            for f, bodies in enumerate(people)
            for p, body in enumerate(bodies)
            if (square := util.faceDetect(_body(body), frames[f])) is not None
        ]
        for some in _chunks(squares):
            crops = [_crop(frames[f], square) for (f, _), square in some]
            resized = [util.smart_resize(crop, (FACE_SIDE, FACE_SIDE)) for crop in crops]
            heatmaps = self.network(_inputs(resized, self.device))[-1]
            for ((f, p), (x, y, _)), crop, heatmap in zip(some, crops, heatmaps, strict=True):
                maps = F.interpolate(heatmap[None], crop.shape[:2], mode="bilinear", align_corners=True)[0]
                score, place = maps[:FACE_POINTS].flatten(1).max(dim=1)
                points = torch.stack([place % crop.shape[1], place // crop.shape[1], score], dim=1)
                found[f][p] = _moved(torch.where(score[:, None] > THRESHOLD, points, 0).cpu().numpy(), x, y)
        return found


def _file(source: str | Path, name: str) -> Path:
    path = Path(source).expanduser()
    path = path / "pose" if (path / "pose").is_dir() else path
    if source == "mini" or (path / "config.json").is_file():
        raise UserError(
            f"pose network {source}: finds bodies alone; hands and faces need OpenPose's own, with {name} beside it"
        )
    local = path.parent if path.is_file() else path
    return find_openpose_file(local if local.is_dir() else source, name)


def _body(keypoints: NDArray[np.float32]) -> Any:
    """[18, 3] as controlnet_aux has it."""
    body = open_pose_module("body")
    joints = [
        body.Keypoint(float(x), float(y), float(score)) if score > 0 else None for x, y, score in keypoints
    ]
    return body.BodyResult(joints, 0.0, 0)


def _chunks(squares: list[Any]) -> list[list[Any]]:
    return [squares[i : i + SQUARES_AT_ONCE] for i in range(0, len(squares), SQUARES_AT_ONCE)]


def _crop(frame: NDArray[np.uint8], square: Square) -> NDArray[np.uint8]:
    """BGR [side, side, 3]; less where the square hangs over the frame."""
    x, y, side = square
    return np.ascontiguousarray(frame[y : y + side, x : x + side, ::-1])


def _inputs(images: list[NDArray[np.uint8]], device: torch.device) -> torch.Tensor:
    stacked = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
    return (stacked.float() / 256 - 0.5).contiguous()


def _hand_point(heatmap: NDArray[np.float64], side: int) -> NDArray[np.float32]:
    """(x, y, score): the peak of the patch that has the most of the heatmap, in a square of `side` pixels."""
    patches, count = ndimage.label(ndimage.gaussian_filter(heatmap, HAND_SIGMA) > THRESHOLD, np.ones((3, 3)))
    if not count:
        return np.zeros(3, np.float32)
    largest = 1 + np.argmax(ndimage.sum_labels(heatmap, patches, np.arange(1, count + 1)))
    inside = np.where(patches == largest, heatmap, 0)
    y, x = np.unravel_index(inside.argmax(), inside.shape)
    return np.array([int(x * side / HAND_MAP), int(y * side / HAND_MAP), min(1, inside[y, x])], np.float32)


def _moved(points: NDArray[np.float32], x: int, y: int) -> NDArray[np.float32]:
    """[N, 3] in a square's pixels -> in its frame's; what was not found stays 0."""
    return np.where(points[:, 2:] > 0, points + np.array([x, y, 0], np.float32), 0).astype(np.float32)
