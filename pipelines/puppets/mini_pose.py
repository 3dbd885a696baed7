"""The mini preset's pose network: OpenPose in small, read by the same decoder."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from pipelines.puppets.corpus import SIZE, Corpus, Rendered, render_held_out
from pipelines.puppets.fit import fit
from pipelines.puppets.scene import sample_background
from tcan.metrics.pose import joint_errors
from tcan.pose import OpenPose, track_main_person
from tcan.pose.network import BodyPoseNetwork
from tcan.pose.targets import pose_targets

STEPS = 3000
LEARNING_RATE = 3e-3
NOBODY = 2
"""Images of every 16 that show no puppet: without them the network finds one everywhere."""


def train_pose(corpus: Corpus, work: Path) -> BodyPoseNetwork:
    network = BodyPoseNetwork()

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([2, step])
        frames, keypoints, _ = corpus.random_images(rng, 16)
        frames[:NOBODY], keypoints[:NOBODY] = [nobody(rng) for _ in range(NOBODY)], 0
        frames, keypoints = augment(rng, frames, keypoints)
        images = torch.from_numpy(frames[..., ::-1].copy()).permute(0, 3, 1, 2).float().div(256).sub(0.5)
        paf, heatmap, paf_weight = pose_targets(torch.from_numpy(keypoints), SIZE, SIZE)
        loss = images.new_zeros(())
        for paf_out, heatmap_out in network.stages(images):
            loss = (
                loss
                + 10 * (paf_weight * (paf_out - paf).square()).mean()
                + 10 * (heatmap_out - heatmap).square().mean()
            )
        return loss

    held_out = {name: render_held_out(name, 30) for name in ("dance", "bizarre")}

    def look(step: int, average: BodyPoseNetwork) -> str:
        shares = {name: found_shares(average, rendered) for name, rendered in held_out.items()}
        return ", ".join(
            f"{name} {near:.1%} within 5 %, {nearer:.1%} within 3 %"
            for name, (near, nearer) in shares.items()
        )

    return fit("pose", network, loss_at, steps=STEPS, lr=LEARNING_RATE, work=work, look=look)


def found_shares(network: BodyPoseNetwork, rendered: Rendered) -> tuple[float, float]:
    """Shares of the true joints that are found within 5 % and within 3 % of the image's height."""
    detector = OpenPose(network, network.config.input_height, network.config.blur_sigma)
    people = detector.detect(rendered.frames.reshape(-1, SIZE, SIZE, 3))
    found = np.concatenate([track_main_person([everybody], SIZE, SIZE) for everybody in people])
    errors = joint_errors(found, rendered.keypoints.reshape(-1, 18, 3), SIZE)
    counted = ~np.isnan(errors)
    return float((errors[counted] < 0.05).mean()), float((errors[counted] < 0.03).mean())


def nobody(rng: np.random.Generator) -> np.ndarray:
    """An empty scene, or a plain surface, uint8 `[H, W, 3]`."""
    if rng.random() < 0.3:
        return np.full((SIZE, SIZE, 3), rng.integers(256, size=3), np.uint8)
    return sample_background("wide", rng, SIZE)[0]


def augment(
    rng: np.random.Generator, frames: np.ndarray, keypoints: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Other proportions, brightness, contrast and softness: the network must also read creatures that no training saw,
    and what the VAE and the UNet draw."""
    pairs = [stretch(rng, *pair) for pair in zip(frames, keypoints, strict=True)]
    frames, keypoints = np.stack([f for f, _ in pairs]).astype(np.float32), np.stack([k for _, k in pairs])
    frames = (
        (frames - 128) * rng.uniform(0.8, 1.2, (len(frames), 1, 1, 1))
        + 128
        + rng.uniform(-20, 20, (len(frames), 1, 1, 3))
    )
    if rng.random() < 0.5:
        share = rng.uniform(0, 1)
        frames = np.stack([share * cv2.blur(frame, (3, 3)) + (1 - share) * frame for frame in frames])
    frames = frames + rng.normal(0, rng.uniform(0, 8), frames.shape)
    return frames.clip(0, 255).astype(np.uint8), keypoints


def stretch(
    rng: np.random.Generator, frame: np.ndarray, keypoints: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A random, uneven stretch along each axis: large heads, short legs, broad bodies out of ordinary ones.

    Args:
        frame: uint8 `[H, W, 3]`.
        keypoints: `[18, 3]`; a point that leaves the image comes back as not seen.
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
