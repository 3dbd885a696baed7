"""Training of the mini preset's pose network: a small OpenPose network with the same decoder."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from pipelines.puppets.corpus import SIZE, Rendered, render_held_out
from pipelines.puppets.fit import RECIPE, Batch, Setting, fit
from pipelines.puppets.scene import sample_background
from tcan.metrics.pose import joint_errors
from tcan.pose import OpenPose, PoseDetector, track_main_person
from tcan.pose.network import BodyPoseNetwork
from tcan.pose.targets import pose_targets

HELD_OUT_CHARACTERS = 30
STEPS = 3000
LEARNING_RATE = 3e-3
IMAGES = 16
EMPTY_IMAGES = 2
"""Images without a puppet among them. Without them, the network detects puppets in every background."""


def train_pose(images: Rendered, work: Path, setting: Setting = RECIPE) -> BodyPoseNetwork:
    network = BodyPoseNetwork()

    def batch_at(step: int) -> Batch:
        rng = np.random.default_rng([2, step])
        frames, keypoints, _ = images.sample(rng, setting.batch * IMAGES)
        empty = setting.batch * EMPTY_IMAGES
        frames[:empty], keypoints[:empty] = [empty_image(rng) for _ in range(empty)], 0
        frames, keypoints = augment(rng, frames, keypoints)
        pixels = torch.from_numpy(frames[..., ::-1].copy()).permute(0, 3, 1, 2).float().div(256).sub(0.5)
        paf, heatmap, paf_weight = pose_targets(torch.from_numpy(keypoints), SIZE, SIZE)
        return {"pixels": pixels, "paf": paf, "heatmap": heatmap, "paf_weight": paf_weight}

    def loss_of(step: int, batch: Batch) -> Tensor:
        loss = batch["pixels"].new_zeros(())
        for paf, heatmap in network.stages(batch["pixels"]):
            loss = (
                loss
                + 10 * (batch["paf_weight"] * (paf - batch["paf"]).square()).mean()
                + 10 * (heatmap - batch["heatmap"]).square().mean()
            )
        return loss

    held_out = {name: render_held_out(name, HELD_OUT_CHARACTERS) for name in ("dance", "bizarre")}

    def evaluate(step: int, average: BodyPoseNetwork) -> str:
        detector = OpenPose(
            average, average.config.input_height, average.config.blur_sigma, device=setting.device
        )
        fractions = {name: detected_fractions(detector, rendered) for name, rendered in held_out.items()}
        return ", ".join(
            f"{name} {within_5:.1%} within 5 %, {within_3:.1%} within 3 %"
            for name, (within_5, within_3) in fractions.items()
        )

    return fit(
        "pose",
        network,
        batch_at,
        loss_of,
        steps=STEPS,
        lr=LEARNING_RATE,
        work=work,
        setting=setting,
        evaluate=evaluate,
    )


def detected_fractions(detector: PoseDetector, rendered: Rendered) -> tuple[float, float]:
    """Fractions of the true joints detected within 5 % and within 3 % of the image height."""
    people = detector.detect(rendered.frames.reshape(-1, SIZE, SIZE, 3))
    found = np.concatenate([track_main_person([frame_people], SIZE, SIZE) for frame_people in people])
    errors = joint_errors(found, rendered.keypoints.reshape(-1, 18, 3), SIZE)
    valid = ~np.isnan(errors)
    return float((errors[valid] < 0.05).mean()), float((errors[valid] < 0.03).mean())


def empty_image(rng: np.random.Generator) -> np.ndarray:
    """Sample a background or a uniform colour, uint8 `[H, W, 3]`."""
    if rng.random() < 0.3:
        return np.full((SIZE, SIZE, 3), rng.integers(256, size=3), np.uint8)
    return sample_background("wide", rng, SIZE)[0]


def augment(
    rng: np.random.Generator, frames: np.ndarray, keypoints: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Augment proportions, brightness, contrast and blur.

    The network must also detect poses of unseen characters and in images that the VAE and the UNet generate.
    """
    pairs = [stretch(rng, *pair) for pair in zip(frames, keypoints, strict=True)]
    frames, keypoints = np.stack([f for f, _ in pairs]).astype(np.float32), np.stack([k for _, k in pairs])
    frames = (
        (frames - 128) * rng.uniform(0.8, 1.2, (len(frames), 1, 1, 1))
        + 128
        + rng.uniform(-20, 20, (len(frames), 1, 1, 3))
    )
    if rng.random() < 0.5:
        blur = rng.uniform(0, 1)
        frames = np.stack([blur * cv2.blur(frame, (3, 3)) + (1 - blur) * frame for frame in frames])
    frames = frames + rng.normal(0, rng.uniform(0, 8), frames.shape)
    return frames.clip(0, 255).astype(np.uint8), keypoints


def stretch(
    rng: np.random.Generator, frame: np.ndarray, keypoints: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Stretch an image unevenly along each axis, which produces large heads, short legs and broad bodies.

    Args:
        frame: uint8 `[H, W, 3]`.
        keypoints: `[18, 3]`; points that leave the image are returned as zeros (not visible).
    """
    pixels = np.arange(SIZE, dtype=np.float32)
    keypoints = keypoints.copy()
    sources = []
    for axis in (0, 1):
        spacing = np.exp(rng.normal(0, 0.3, 5))
        knots = np.concatenate([[0], np.cumsum(spacing)]) / spacing.sum() * SIZE * rng.uniform(0.95, 1.15)
        knots = knots - knots[-1] / 2 + SIZE / 2 + rng.uniform(-0.06, 0.06) * SIZE
        source = np.interp(pixels, np.linspace(0, SIZE - 1, 6), knots).astype(np.float32)
        keypoints[:, axis] = np.interp(keypoints[:, axis], source, pixels, left=-1, right=-1)
        sources.append(source)
    keypoints[(keypoints[:, 2] == 0) | (keypoints[:, :2] < 0).any(-1)] = 0
    x, y = np.meshgrid(*sources)
    return cv2.remap(frame, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), keypoints
