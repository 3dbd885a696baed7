"""Training of a small pose detector of the RTMPose type for the puppet world: two networks in ONNX files.

A network of coordinates finds the joints of a person in a crop: for each joint, scores of the positions along x and along y (SimCC: Li
et al., 2022; RTMPose: Jiang et al., 2023). Unlike `BodyPoseNetwork`, it predicts no maps, and always finds exactly one person. The
crop comes from a network that predicts one box per image, so it suits videos of one person. `tcan.pose.onnx` runs both files.
"""

import math
import warnings
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.puppets.corpus import SIZE, Rendered
from pipelines.puppets.fit import Batch, fit
from pipelines.puppets.mini_pose import EMPTY_IMAGES, augment, empty_image
from tcan.pose.network import ConvNorm
from tcan.pose.onnx import BINS_PER_PIXEL, BOX_PADDING, COCO, MEAN, STD

STEPS = {"boxes": 400, "coordinates": 1200}
LEARNING_RATE = 2e-3
IMAGES = 16
JOINTS = [COCO.index(point) for point in range(17)]
"""OpenPose's joint of each of COCO's points."""
BINS = SIZE * BINS_PER_PIXEL
SPREAD = 4.0
"""Standard deviation in bins of the target scores of a joint; a network that is less certain has lower scores."""
PEAK = 1 / (SPREAD * math.sqrt(2 * math.pi))
BOX_MARGIN = 0.15  # of the extent of the joints, at each side
HIDDEN_WEIGHT = 0.3
"""Loss weight of joints that are not visible, whose target scores are equal everywhere."""
NORM_GROUPS = 8


class PersonBox(nn.Module):
    """Predicts the box of the one person of an image."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 16, 32, 64, 64)
        self.layers = nn.Sequential(
            *(ConvNorm(i, o, NORM_GROUPS, stride=2) for i, o in pairwise(channels)),
            nn.Conv2d(64, 16, 1),
            nn.Flatten(),
            nn.Linear(16 * (SIZE // 16) ** 2, 128),
            nn.ReLU(),
            nn.Linear(128, 5),
        )

    def raw(self, bgr: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes `[B, 4]` (left, top, right, bottom in pixels) and the logit of a person `[B]` of images in [0, 255]."""
        found = self.layers(bgr / 128 - 1)
        return SIZE / 2 * (1 + found[:, :4]), found[:, 4]

    def forward(self, bgr: Tensor) -> Tensor:
        """Boxes and scores `[B, 1, 5]` of images `[B, 3, SIZE, SIZE]` in [0, 255]."""
        box, logit = self.raw(bgr)
        return torch.cat([box, logit.sigmoid()[:, None]], dim=1)[:, None]


class Coordinates(nn.Module):
    """Predicts scores of the positions of 17 joints along x and y."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ConvNorm(3, 32, NORM_GROUPS, stride=2),
            ConvNorm(32, 64, NORM_GROUPS, stride=2),
            ConvNorm(64, 96, NORM_GROUPS, stride=2),
            *(ConvNorm(96, 96, NORM_GROUPS, dilation=dilation) for dilation in (1, 2, 4)),
            nn.Conv2d(96, len(JOINTS), 1),
            nn.Flatten(start_dim=2),
        )
        cells = (SIZE // 8) ** 2
        self.x, self.y = nn.Linear(cells, BINS), nn.Linear(cells, BINS)

    def logits(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, 17, BINS]` along x and along y of normalized crops `[B, 3, SIZE, SIZE]`."""
        features = self.layers(rgb)
        return self.x(features), self.y(features)

    def forward(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `[B, 17, BINS]` along x and along y: probabilities relative to the highest one of the targets."""
        x, y = self.logits(rgb)
        return x.softmax(dim=2) / PEAK, y.softmax(dim=2) / PEAK


def train_detector(images: Rendered, work: Path, folder: Path, steps: Mapping[str, int] = STEPS) -> None:
    """Train both networks and write them to `folder` for `tcan.pose.onnx.OnnxPose.from_folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    boxes, coordinates = PersonBox(), Coordinates()
    trained = [
        fit(name, network, batch_at, loss_of, steps=steps[name], lr=LEARNING_RATE, work=work)
        for name, network, batch_at, loss_of in (
            (
                "boxes",
                boxes,
                lambda step: box_batch(*images_at(images, step)),
                lambda step, batch: box_loss(boxes, batch),
            ),
            (
                "coordinates",
                coordinates,
                lambda step: crop_batch(*images_at(images, step), np.random.default_rng([7, step])),
                lambda step, batch: coordinate_loss(coordinates, batch),
            ),
        )
    ]
    export(trained[0], folder / "boxes.onnx", ["boxes"])
    export(trained[1], folder / "coordinates.onnx", ["simcc_x", "simcc_y"])


def images_at(images: Rendered, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Augmented frames uint8 `[B, SIZE, SIZE, 3]` and keypoints `[B, 18, 3]`, all 0 in the `EMPTY_IMAGES` first ones."""
    rng = np.random.default_rng([6, step])
    frames, keypoints, _ = images.sample(rng, IMAGES)
    frames[:EMPTY_IMAGES], keypoints[:EMPTY_IMAGES] = [empty_image(rng) for _ in range(EMPTY_IMAGES)], 0
    return augment(rng, frames, keypoints)


def person_box(keypoints: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom of the joints `[18, 3]` with a margin."""
    found = keypoints[keypoints[:, 2] > 0, :2]
    low, high = found.min(axis=0), found.max(axis=0)
    margin = BOX_MARGIN * (high - low)
    return np.concatenate([low - margin, high + margin]).astype(np.float32)


def box_batch(frames: np.ndarray, keypoints: np.ndarray) -> Batch:
    """Images, whether they show a person, and the boxes of those that do."""
    is_person = keypoints[..., 2].any(axis=1)
    return {
        "bgr": torch.from_numpy(frames[..., ::-1].copy()).permute(0, 3, 1, 2).float(),
        "is_person": torch.from_numpy(is_person),
        "boxes": torch.from_numpy(np.stack([person_box(body) for body in keypoints[is_person]])),
    }


def box_loss(network: PersonBox, batch: Batch) -> Tensor:
    found, logit = network.raw(batch["bgr"])
    target = batch["is_person"]
    distance = (found[target] - batch["boxes"]).abs().mean() / SIZE
    return 10 * distance + functional.binary_cross_entropy_with_logits(logit, target.float())


def crop_batch(frames: np.ndarray, keypoints: np.ndarray, rng: np.random.Generator) -> Batch:
    """Normalized crops around the joints, with errors like those of predicted boxes, and the joints in them."""
    crops, points = [], []
    for frame, body in zip(frames, keypoints, strict=True):
        if not body[:, 2].any():
            continue
        left, top, right, bottom = person_box(body)
        side = max(right - left, bottom - top) * BOX_PADDING * rng.uniform(0.85, 1.2)
        center = np.array([left + right, top + bottom]) / 2 + rng.normal(0, 0.04, 2) * side
        scale = SIZE / side
        affine = np.column_stack([np.eye(2) * scale, SIZE / 2 - center * scale])
        crops.append(cv2.warpAffine(frame, affine, (SIZE, SIZE), flags=cv2.INTER_LINEAR))
        points.append(np.column_stack([body[JOINTS, :2] * scale + affine[:, 2], body[JOINTS, 2]]))
    normalized = (np.stack(crops) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return {
        "rgb": torch.from_numpy(normalized.astype(np.float32)).permute(0, 3, 1, 2),
        "joints": torch.from_numpy(np.stack(points).astype(np.float32)),
    }


def coordinate_loss(network: Coordinates, batch: Batch) -> Tensor:
    """Cross entropy of the positions of the joints `[B, 17, 3]`."""
    joints = batch["joints"]
    inside = ((joints[..., :2] >= 0) & (joints[..., :2] < SIZE)).all(-1) & (joints[..., 2] > 0)
    weight = torch.where(inside, 1.0, HIDDEN_WEIGHT)
    bins = torch.arange(BINS, device=joints.device)
    loss = joints.new_zeros(())
    for axis, logits in enumerate(network.logits(batch["rgb"])):
        distance = (bins - joints[..., axis, None] * BINS_PER_PIXEL) / SPREAD
        target = torch.where(inside[..., None], (-0.5 * distance.square()).softmax(dim=2), 1 / BINS)
        loss = loss - (weight[..., None] * target * logits.log_softmax(dim=2)).sum(2).mean()
    return loss


def export(network: nn.Module, file: Path, outputs: list[str]) -> None:
    """Write an ONNX file. The person detector takes one image at a time, the network of coordinates any number."""
    axes = {} if len(outputs) == 1 else {name: {0: "batch"} for name in ("input", *outputs)}
    image = torch.zeros(1, 3, SIZE, SIZE)
    with warnings.catch_warnings(action="ignore"):  # torch recommends an exporter that needs another package
        torch.onnx.export(
            network.eval(),
            (image,),
            file,
            input_names=["input"],
            output_names=outputs,
            dynamic_axes=axes,
            dynamo=False,
        )
