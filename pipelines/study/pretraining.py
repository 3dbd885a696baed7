"""Networks that the study trains itself: a second pose detector, and ControlNets of mini for other pose images.

The ControlNets are trained like mini's, on characters of the distribution `wide`, with the poses that a detector finds in the images.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel

from pipelines.config import Config
from pipelines.puppets.corpus import SIZE, Rendered, image_corpus, render_held_out
from pipelines.puppets.mini_coordinates import train_detector
from pipelines.puppets.mini_diffusion import Samples, train_controlnet
from pipelines.puppets.mini_pose import HELD_OUT_CHARACTERS, detected_fractions
from pipelines.puppets.mini_vae import encode
from pipelines.study.questions import ControlNet
from tcan.errors import UserError
from tcan.pose import PoseDetector, track_main_person
from tcan.pose.parts import BODY
from tcan.weights import load_pose_detector, load_pretrained

PARTS = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")


def render_corpus(folder: Path, config: Config) -> None:
    """Render the training images, and encode them.

    Raises:
        UserError: another preset than mini, whose networks the training of ControlNets requires.
    """
    if config.pretrained.unet != "mini" or config.size != SIZE:
        raise UserError(
            f"pretrained.unet = {config.pretrained.unet}: the ControlNets of the questions controlnet and detectors are "
            "trained for mini; use --config mini, or other --questions"
        )
    images = image_corpus(folder, config.study.characters)
    encode(load_pretrained(**dict.fromkeys(PARTS, "mini")).vae, images.frames, folder / "latents.pt")


def train_coordinates(corpus: Path, folder: Path, config: Config) -> dict[str, float]:
    """Train the detector of coordinates and write it to `folder`/pose.

    Returns:
        coordinates_{dance,bizarre}, openpose_{dance,bizarre}: fractions of the joints of held-out characters that this detector and
        mini's OpenPose network find within 5 % of the image height.
    """
    torch.manual_seed(config.seed)
    steps = config.study.detector_steps
    images = image_corpus(corpus, config.study.characters)
    train_detector(images, folder, folder / "pose", {"boxes": max(1, steps // 3), "coordinates": steps})
    values = {}
    for name, source in (("coordinates", str(folder / "pose")), ("openpose", config.pretrained.pose)):
        detector = load_pose_detector(source)
        for videos in ("dance", "bizarre"):
            rendered = render_held_out(videos, HELD_OUT_CHARACTERS)
            values[f"{name}_{videos}"] = detected_fractions(detector, rendered)[0]
    return values


def train(controlnet: ControlNet, corpus: Path, folder: Path, detector: str, config: Config) -> None:
    """Train a ControlNet and write it to `folder`/controlnet.

    Args:
        corpus: folder of `render_corpus`.
        detector: source of the pose network.
    """
    torch.manual_seed(config.seed)
    images = image_corpus(corpus, config.study.characters)
    images = with_detected_poses(images, load_pose_detector(detector))
    mini = load_pretrained(**dict.fromkeys(PARTS, "mini"))
    latents = encode(mini.vae, images.frames, corpus / "latents.pt")
    samples = Samples(images, latents, controlnet.pose_style)
    folder.mkdir(parents=True, exist_ok=True)
    trained: ControlNetModel = train_controlnet(
        samples,
        mini.unet,
        mini.empty_prompt,
        folder,
        start=None if controlnet.is_weak else mini.controlnet,
        steps=config.study.weak_controlnet_steps if controlnet.is_weak else config.study.controlnet_steps,
    )
    trained.save_pretrained(folder / "controlnet")


def with_detected_poses(images: Rendered, detector: PoseDetector) -> Rendered:
    """The images `[N, F, H, W, 3]` with the poses that a detector finds in them; all 0 where it finds nobody."""
    keypoints = np.zeros_like(images.keypoints)
    for index, frames in enumerate(images.frames):
        for frame, people in enumerate(detector.detect(frames)):
            keypoints[index, frame] = track_main_person([people], SIZE, SIZE)[0, BODY]
    return dataclasses.replace(images, keypoints=keypoints)
