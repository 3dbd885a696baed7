"""Configuration of `tcan study`."""

from dataclasses import dataclass
from typing import Literal

from pipelines.config.rules import at_least, between, check

QuestionName = Literal[
    "appa", "temporal_controlnet", "ptm", "controlnet", "scenes", "detectors", "cost", "sampling"
]


@dataclass
class StudyConfig:
    """Rendered puppets -> trainings and evaluations of ablations, with the settings of `train` and `animate`."""

    train_videos: int = 24
    """Number of training videos (>= 1)."""

    train_frames: int = 64
    """Number of frames of each training video (>= 16)."""

    held_out_videos: int = 10
    """Number of held-out videos of each distribution (>= 3, which an interval requires; a verdict
    requires about 9)."""

    frames: int = 16
    """Number of frames of each held-out video (>= 2), instead of `evaluate.frames`."""

    steps: int = 8
    """Number of denoising steps (1 to 1000), instead of `animate.steps`."""

    pose_error_sizes: int = 2
    """Number of sizes of each kind of pose errors (1 to 4)."""

    controlnet_steps: int = 400
    """Number of further training steps of mini's ControlNet for the poses of each detector (>= 1)."""

    weak_controlnet_steps: int = 100
    """Number of training steps of the weak ControlNet (>= 1)."""

    detector_steps: int = 1200
    """Number of training steps of the detector of coordinates (>= 1)."""

    characters: int = 1000
    """Number of rendered characters to train these networks with (>= 32)."""

    def __post_init__(self) -> None:
        check(self, "study.", at_least(1), train_videos=24)
        check(self, "study.", at_least(16), train_frames=64)
        check(
            self, "study.", at_least(1), controlnet_steps=400, weak_controlnet_steps=100, detector_steps=1200
        )
        check(self, "study.", at_least(32), characters=1000)
        check(self, "study.", at_least(2), frames=16)
        check(self, "study.", between(1, 1000), steps=8)
        check(self, "study.", at_least(3), held_out_videos=10)
        check(self, "study.", between(1, 4), pose_error_sizes=2)
