"""Configuration of `tcan preprocess`."""

import re
from dataclasses import dataclass
from typing import Literal

from pipelines.config.rules import ABOVE_0, FRAME_RATE, at_least, between, check, multiple_of
from tcan.crop import Size
from tcan.errors import UserError


@dataclass
class PreprocessConfig:
    """Videos -> clip dataset."""

    canvas: int | None = None
    """Height and width of the clips in pixels (multiple of 8, >= `size`). Default: `size`. From a larger canvas, each
    training sample is a random square crop of `size`."""

    buckets: list[str] | Literal["auto"] | None = None
    """Sizes of the clips, HEIGHTxWIDTH in pixels (multiples of 8), e.g. [512x512, 704x384]; each video uses the one with
    the nearest aspect ratio. auto: nine sizes of about the area of `size`, from 1:2 to 2:1 (with sd15, multiples of 64 from
    384 to 768). Default: all clips are squares of `canvas`."""

    crop: Literal["person", "centre"] = "person"
    """Crop of a video to the size of its clips, the same for all of them. person: around the main person, so that an
    off-center person in a wide video is fully visible. centre: the center of the video. With person, the models process
    full frames: 1.8 times the work for squares of a 16:9 video, no difference if the aspect ratios are equal."""

    people: Literal["main", "all"] = "main"
    """People whose poses training draws. main: the main person. all: also the other people who are detected in 50% of the
    frames and are not much smaller; the crop holds as many of them as fit. The filters apply to the main person."""

    clip_frames: int = 64
    """Maximum number of frames of a clip (>= `min_clip_frames`). A clip is one dataset row and is held in memory."""

    min_clip_frames: int = 16
    """Minimum number of frames of a clip (1 to `clip_frames`). A shorter remainder of a video is dropped; a shorter
    video is rejected. Use at least `train.clip_frames`."""

    fps: float | None = None
    """Frame rate to resample to in frames per second (0.1 to 1000). Default: the frame rate of each video."""

    min_person_fraction: float = 0.8
    """Minimum fraction of the frames that show a person (0 to 1). Videos below it are rejected."""

    min_person_height: float = 0.0
    """Minimum height of the main person as a fraction of the canvas height (0 to 1). Videos below it are rejected."""

    min_seconds: float = 0.0
    """Minimum duration of a video in seconds (0 to `max_seconds`). Shorter videos are rejected."""

    max_seconds: float | None = None
    """Maximum duration of a video in seconds (> 0). Longer videos are rejected. Default: no limit."""

    cut_threshold: float = 27.0
    """Scene cut threshold: mean color difference of consecutive frames (0 to 255). A clip ends at a cut. 0 disables cut
    detection."""

    validation_fraction: float = 0.1
    """Fraction of the videos used for validation (0 to 1), assigned by content: stable when videos are added."""

    batch_frames: int = 16
    """Batch size of the pose network and the VAE in frames (>= 1). Use the largest that fits in device memory."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Data type of the VAE encoder and the body pose network. fp16 and bf16 are faster on a GPU and less accurate: with mini,
    the error of the mean is 0.35 (fp16) or 2.5 (bf16) times the posterior's standard deviation, which training samples from,
    and joints move by 0 (fp16) or at most 1 (bf16) pixel."""

    compile: bool | Literal["auto"] = "auto"
    """Compilation of the body pose network and the VAE encoder with torch.compile: faster after a start of minutes. auto: on
    GPUs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the pose network and the VAE. auto: the GPUs of the cluster at the start of the job, else its CPUs."""

    actors: int | Literal["auto"] = "auto"
    """Number of actors (pose network and VAE), >= 1. auto: as many as fit into the cluster at the start of the job. If a number
    needs more CPUs or GPUs than the cluster has, an autoscaling cluster adds nodes; a single machine runs as many as fit."""

    gpus_per_actor: float = 1.0
    """GPUs reserved per actor, > 0; fractions share a GPU. Ignored on CPUs."""

    hands: bool = False
    """Hand keypoints (21 per hand) of all people, for `draw.hands`: detected with OpenPose's hand_pose_model.pth in the folder of
    the body network, or with an ONNX network of 133 points; not available with mini."""

    face: bool = False
    """Face keypoints (70) of all people, for `draw.face`: detected with OpenPose's facenet.pth; otherwise like `hands`."""

    decode_timeout: float = 120.0
    """Timeout of opening a video and of decoding each clip in seconds (> 0). Videos that exceed it are rejected."""

    shard_megabytes: int = 256
    """Approximate size of a Parquet file of clips in MiB (>= 1)."""

    commit_seconds: float = 60.0
    """Approximate maximum time in seconds (>= 0) until a finished video is written. A killed job repeats at most this
    much work."""

    def __post_init__(self) -> None:
        check(self, "preprocess.", multiple_of(8), canvas=576)
        if isinstance(self.buckets, list):
            parse_buckets(self.buckets)
        if self.buckets is not None and self.canvas is not None:
            raise UserError(
                f"preprocess.canvas = {self.canvas}: has no effect with preprocess.buckets, which sets the sizes; unset one "
                "of them"
            )
        if not 1 <= self.min_clip_frames <= self.clip_frames:
            raise UserError(
                f"preprocess.min_clip_frames = {self.min_clip_frames}: must be from 1 to clip_frames = "
                f"{self.clip_frames}; change one of them"
            )
        check(self, "preprocess.", between(0, 255), cut_threshold=27)
        check(self, "preprocess.", at_least(1), batch_frames=16, shard_megabytes=256)
        if self.actors != "auto":
            check(self, "preprocess.", at_least(1), actors=8)
        check(self, "preprocess.", ABOVE_0, max_seconds=600, gpus_per_actor=1, decode_timeout=120)
        check(self, "preprocess.", FRAME_RATE, fps=25)  # far above, a clip would repeat one frame without end
        check(self, "preprocess.", at_least(0), min_seconds=0, commit_seconds=60)
        if self.max_seconds is not None and self.min_seconds > self.max_seconds:
            raise UserError(
                f"preprocess.min_seconds = {self.min_seconds}: must be at most max_seconds = {self.max_seconds}; change one "
                "of them"
            )
        check(self, "preprocess.", between(0, 1), min_person_fraction=0.8, min_person_height=0)
        check(self, "preprocess.", between(0, 1), validation_fraction=0.1)


def parse_buckets(buckets: list[str]) -> list[Size]:
    """Sizes of `preprocess.buckets`, sorted.

    Raises:
        UserError: no sizes, a size that is not HEIGHTxWIDTH or not a multiple of 8, or one that is listed twice.
    """
    sizes = []
    for bucket in buckets:
        match = re.fullmatch(r"(\d+)x(\d+)", bucket)
        height, width = (int(match[1]), int(match[2])) if match else (0, 0)
        if not height or not width or height % 8 or width % 8:
            raise UserError(
                f"preprocess.buckets: {bucket} is not HEIGHTxWIDTH in multiples of 8; set e.g. [512x512, 704x384]"
            )
        sizes.append((height, width))
    if len(set(sizes)) < max(1, len(sizes)):
        raise UserError(
            f"preprocess.buckets = [{', '.join(buckets)}]: must contain different sizes; set e.g. [512x512, 704x384]"
        )
    return sorted(sizes)
