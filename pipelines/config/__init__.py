"""Configuration of all jobs: one dataclass per job. The docstring of a field is its `--help` text.

Values come from a preset (`pipelines/config/presets/mini.yaml`, `sd15.yaml`), then from YAML files, then from the command line
(`--train.workers 2`); later sources override earlier ones. Defaults in this file do not depend on the model size. Every
preset sets the fields without a default.

This module imports neither torch nor Ray nor MLflow, so that `tcan --help` is fast. `pipelines.config.parser` reads the
command line.
"""

from dataclasses import dataclass, field

from pipelines.config.animate import AnimateConfig, EvaluateConfig
from pipelines.config.preprocess import PreprocessConfig, parse_buckets
from pipelines.config.rules import check, multiple_of
from pipelines.config.study import StudyConfig
from pipelines.config.train import StageConfig, TrainConfig
from tcan.crop import Size, usual_sizes
from tcan.errors import UserError

__all__ = [
    "AnimateConfig",
    "Config",
    "DrawConfig",
    "EvaluateConfig",
    "PreprocessConfig",
    "PretrainedConfig",
    "StageConfig",
    "StudyConfig",
    "TrackingConfig",
    "TrainConfig",
]


@dataclass
class PretrainedConfig:
    """Sources of the frozen, pretrained networks.

    Each is one of: mini (the weights in this package); a single file in its original layout, e.g. an SD1.5 checkpoint,
    control_v11p_sd15_openpose.pth or mm_sd_v15_v2.ckpt; a local folder in diffusers layout, of the component or with the
    component as a subfolder; a hub id owner/name[/subfolder][@revision].
    """

    vae: str
    """Source of the AutoencoderKL."""

    unet: str
    """Source of the UNet2DConditionModel."""

    controlnet: str
    """Source of the ControlNetModel for OpenPose poses."""

    motion_adapter: str
    """Source of the MotionAdapter (AnimateDiff motion modules)."""

    text_encoder: str
    """Source of the CLIPTextModel; only its embedding of the empty prompt is used."""

    scheduler: str
    """Source of the noise schedule (config of a DDIMScheduler); sd15 is the schedule of SD1.5."""

    pose: str
    """Source of the pose network: mini, a local folder or file, or a hub id with body_pose_model.pth; or a local folder with the
    ONNX files of a YOLOX person detector and an RTMPose or DWPose network."""


@dataclass
class DrawConfig:
    """Parts of the pose images next to the body. A model draws what its training has drawn."""

    hands: bool = False
    """Whether pose images show the hands. Training needs a dataset with hands (`preprocess.hands`); other commands detect
    them with the networks of `preprocess.hands`. Always true for a model that was trained with hands."""

    face: bool = False
    """Whether pose images show the face; otherwise like `hands`."""


@dataclass
class TrackingConfig:
    """MLflow tracking of all runs."""

    experiment: str = "tcan"
    """Name of the MLflow experiment of all runs."""

    folder: str = "tcan-mlflow"
    """Folder of the SQLite store and the artifacts, used if neither `uri` nor MLFLOW_TRACKING_URI is set."""

    uri: str | None = None
    """MLflow tracking URI, e.g. http://mlflow:5000. Default: MLFLOW_TRACKING_URI, else the store in `folder`."""

    required: bool = True
    """Whether a job stops with an error if the store is not available at its start. false: the job runs, and its records
    wait in a file for `tcan track sync`. An outage during a job never stops it."""


@dataclass
class Config:
    """All jobs"""

    size: int
    """Height and width of the training images in pixels (multiple of 64), and of the dataset unless `preprocess.canvas`
    is larger. With `preprocess.buckets`, the size whose area `animate` uses by default."""

    pretrained: PretrainedConfig

    train: TrainConfig

    seed: int = 0
    """Seed of every random choice of every job (0 to 2^63 - 1)."""

    draw: DrawConfig = field(default_factory=DrawConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    animate: AnimateConfig = field(default_factory=AnimateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check(self, "", multiple_of(64), size=512)
        if self.canvas < self.size:
            raise UserError(
                f"preprocess.canvas = {self.canvas}: must be at least size = {self.size}, the side of the training crops; "
                "change one of them"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed = {self.seed}: must be from 0 to 2^63 - 1; set e.g. 0")

    @property
    def canvas(self) -> int:
        """Height and width of the clips of a dataset without buckets in pixels."""
        return self.preprocess.canvas or self.size

    @property
    def buckets(self) -> list[Size]:
        """Sizes of the clips of a dataset, sorted; of one without buckets, the canvas."""
        buckets = self.preprocess.buckets
        if buckets is None:
            return [(self.canvas, self.canvas)]
        return sorted(usual_sizes(self.size)) if buckets == "auto" else parse_buckets(buckets)
