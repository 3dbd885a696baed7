"""Check of an animation: a short video is written, read again and scored."""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch

from pipelines.doctor.finding import Finding, grade
from pipelines.doctor.sample import FRAMES
from pipelines.doctor.subject import Subject
from pipelines.inference import PRECISIONS
from pipelines.tracking import local_model
from tcan.metrics import colour_distance, part_colours, pose_metrics
from tcan.model import TCAN
from tcan.pipeline import TCANPipeline
from tcan.pixels import to_uint8
from tcan.schedule import noise_schedule
from tcan.video import read_video, write_video
from tcan.weights import PretrainedModels, load_model

STEPS = 8
FPS = 8
OK, SUSPICIOUS = 0.75, 0.25
COLOUR = 25.0
"""Upper limit of the colour distance (CIE dE) to the reference. 11 with the mini networks, 44 with a random UNet."""
PARTS = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler", "pose")
PRETRAINED = ("vae", "unet", "controlnet", "motion_adapter")


def short_video(subject: Subject) -> Finding:
    """Joints of the driving pose that the pose network finds in the result, and colour distance to the reference."""
    sample, pipe = subject.sample, _pipeline(subject)
    size = sample.image.shape[0]
    frames = to_uint8(
        pipe(
            sample.image,
            sample.motion,
            sampling=subject.config.animate,
            retarget="none",
            height=size,
            width=size,
            generator=torch.Generator().manual_seed(subject.config.seed),
            steps=min(STEPS, subject.config.animate.steps),
            window=FRAMES,
            overlap=0,
            # Guidance exaggerates the errors of networks that were not trained together.
            guidance_scale=1.0 if subject.model is None else subject.config.animate.guidance_scale,
        ).frames
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "animation.mp4"
        write_video(frames, path, FPS)
        video, _ = read_video(path)
        content = path.read_bytes()
    people = pipe.pose_detector.detect(video)
    found = np.stack([p[0] if len(p) else np.zeros((18, 3), np.float32) for p in people])
    followed = pose_metrics(found, sample.motion, size)["pose_10"]
    reference = part_colours(sample.image[None], sample.keypoints[None])[0]
    distance = float(np.nanmean(colour_distance(part_colours(video, sample.motion), reference)))
    model = "untrained networks" if subject.model is None else f"model {subject.model}"
    return Finding(
        "animation",
        grade(followed >= OK and distance <= COLOUR, followed >= SUSPICIOUS and len(video) == FRAMES),
        f"{len(video)} frames with {model}: {followed:.0%} of the joints follow the driving pose within 10 % of the height; "
        f"color distance to the reference {distance:.1f} dE",
        f"at least {OK:.0%} and at most {COLOUR:g} dE (mini: 95 %, 11 dE; without a ControlNet: 24 %, 30 dE)",
        "if another check is not OK, fix it first; look at animation.mp4 next to the report",
        {"animation.mp4": content},
    )


def _pipeline(subject: Subject) -> TCANPipeline:
    """The model, or a TCAN without training, on the subject's networks."""
    dtype = PRECISIONS[subject.config.animate.precision] if subject.device.type == "cuda" else torch.float32
    networks, train = subject.networks, subject.config.train
    pretrained = PretrainedModels(
        **{part: networks[part] for part in PRETRAINED},
        empty_prompt=subject.prompt().cpu(),
        scheduler=networks["scheduler"],
        info=subject.info,
    )
    if subject.model is not None:
        tcan = load_model(local_model(subject.model, subject.config.tracking), pretrained)
    else:
        torch.manual_seed(subject.config.seed)
        tcan = TCAN(
            pretrained.unet,
            pretrained.controlnet,
            pretrained.motion_adapter,
            pretrained.empty_prompt,
            train.lora_rank,
            train.lora_alpha,
        )
    schedule = noise_schedule(networks["scheduler"], **tcan.info.get("schedule", {}))
    # A copy of the VAE: the pipeline moves and casts its networks in place.
    pipe = TCANPipeline(copy.deepcopy(networks["vae"]), tcan, schedule, networks["pose"])
    pipe.model_info = {
        "stick_width": train.stick_width,
        "pose_style": train.pose_style,
    } | pipe.model_info
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(subject.device, dtype)
