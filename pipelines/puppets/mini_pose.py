"""The mini preset's pose network: OpenPose in small, read by the same decoder."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.puppets.corpus import SIZE, Corpus, Rendered, render_held_out
from pipelines.puppets.fit import fit
from pipelines.puppets.scene import sample_background
from tcan.metrics.pose import joint_errors
from tcan.pose import OpenPose, follow_main_person
from tcan.pose.network import BodyPoseNetwork
from tcan.pose.targets import pose_targets

STEPS = 1000
LEARNING_RATE = 3e-3
NOBODY = 2
"""Pictures of every 16 that show no puppet: without them the network finds one everywhere."""


def train_pose(corpus: Corpus, work: Path) -> BodyPoseNetwork:
    network = BodyPoseNetwork()

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([2, step])
        frames, keypoints, _ = corpus.random_pictures(rng, 16)
        frames[:NOBODY], keypoints[:NOBODY] = [nobody(rng) for _ in range(NOBODY)], 0
        frames, keypoints = augment(rng, frames, keypoints)
        pictures = torch.from_numpy(frames[..., ::-1].copy()).permute(0, 3, 1, 2).float().div(256).sub(0.5)
        paf, heatmap, paf_weight = pose_targets(torch.from_numpy(keypoints), SIZE, SIZE)
        loss = pictures.new_zeros(())
        for paf_out, heatmap_out in network.stages(pictures):
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
    """Shares of the true joints that are found within 5 % and within 3 % of the picture's height."""
    detector = OpenPose(network, network.config.input_height, network.config.blur_sigma)
    people = detector.detect(rendered.frames.reshape(-1, SIZE, SIZE, 3))
    found = np.concatenate([follow_main_person([everybody], SIZE, SIZE) for everybody in people])
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
    """Brightness, contrast, shifts and softness: the network must also read what the VAE and the UNet draw."""
    frames, keypoints = frames.astype(np.float32), keypoints.copy()
    frames = (
        (frames - 128) * rng.uniform(0.8, 1.2, (len(frames), 1, 1, 1))
        + 128
        + rng.uniform(-20, 20, (len(frames), 1, 1, 3))
    )
    dy, dx = rng.integers(-10, 11, 2)
    frames = np.roll(frames, (dy, dx), (1, 2))
    seen = keypoints[..., 2] > 0
    keypoints[..., 0] += dx
    keypoints[..., 1] += dy
    inside = ((keypoints[..., :2] >= 0) & (keypoints[..., :2] < SIZE)).all(-1)
    keypoints[~(seen & inside)] = 0
    if rng.random() < 0.5:
        soft = (
            F.avg_pool2d(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), 3, 1, 1)
            .permute(0, 2, 3, 1)
            .numpy()
        )
        share = rng.uniform(0, 1)
        frames = share * soft + (1 - share) * frames
    frames = frames + rng.normal(0, rng.uniform(0, 8), frames.shape)
    return frames.clip(0, 255).astype(np.uint8), keypoints
