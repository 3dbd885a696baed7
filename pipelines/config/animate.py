"""Configuration of `tcan animate` and `tcan evaluate`."""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.config.rules import at_least, between, check, multiple_of
from tcan.errors import UserError
from tcan.sampling import SamplingConfig


@dataclass
class PoseErrorConfig:
    """Synthetic errors of one kind in the driving poses, to test how a model reacts to them."""

    kind: Literal["none", "missing", "jitter", "outliers", "swaps", "frozen", "offset", "burst"] = "none"
    """Kind of the errors. missing: removed joints. jitter: Gaussian noise. outliers: unusable poses of single frames. swaps:
    left and right exchanged. frozen: the pose of the previous frame. offset: all frames shifted. burst: consecutive
    unusable poses."""

    share: float = 0.1
    """Fraction of the joints (missing) or of the frames (all other kinds but offset) with errors (0 to 1)."""

    size: float = 0.03
    """Standard deviation of jitter, and distance of offset, as a fraction of the image height (0 to 1)."""

    seed: int = 0
    """Seed of the errors (>= 0)."""

    def __post_init__(self) -> None:
        check(self, "animate.pose_errors.", between(0, 1), share=0.1, size=0.03)
        check(self, "animate.pose_errors.", at_least(0), seed=0)


@dataclass
class AnimateConfig(SamplingConfig):
    """Image + driving video -> video."""

    scheduler: str = "DDIMScheduler"
    """Class name of the diffusers scheduler for sampling, e.g. DPMSolverMultistepScheduler."""

    lora: str | None = None
    """LoRA of SD1.5 that is merged into the denoising UNet: a file, or a folder or hub id with one. Default: none."""

    lora_scale: float = 1.0
    """Scale of `animate.lora` (>= 0)."""

    retarget: Literal["robust", "paper", "none"] = "robust"
    """Retargeting of the poses to the proportions and the position of the character. robust: bone lengths estimated over
    the driving video; paper: relative to its first frame; none: the poses are only scaled and cropped."""

    smoothing_window: int = 0
    """Smoothing window of the poses in frames (odd, >= 5), after outlier removal. 0 disables both."""

    pose_errors: PoseErrorConfig = field(default_factory=PoseErrorConfig)
    """Synthetic errors of the driving poses, added before retargeting."""

    height: int | None = None
    """Height of the result in pixels (multiple of 8). Default: from `width` and the
    aspect ratio of the image; if both are unset, the size of about the model's training area (see `preprocess.buckets`
    auto) with the nearest aspect ratio."""

    width: int | None = None
    """Width of the result in pixels, like `height`."""

    fit: Literal["crop", "pad"] = "crop"
    """How the image gets the aspect ratio of the result; it is never stretched. crop: cropped around the person. pad: shown
    completely, its border pixels repeated outside of it."""

    decode_batch: int = 8
    """Batch size of VAE decoding in frames (>= 1)."""

    device: str = "auto"
    """Device: cpu, cuda or cuda:N. auto: a GPU if available, else the CPU."""

    offload: Literal["none", "model", "sequential"] = "none"
    """Offloading of weights from the GPU to host memory. model: one network at a time is on the GPU. sequential: one layer
    at a time, which is much slower."""

    vae_tiling: bool = False
    """Encoding and decoding in overlapping tiles, which are blended: less memory for large frames."""

    compile: bool | Literal["auto"] = "auto"
    """Compilation of the networks with torch.compile: faster steps after a first step of minutes. auto: on GPUs.
    With offloading, the networks are never compiled."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Data type of weights and activations."""

    pretrained: Literal["model", "config"] = "model"
    """Source of the pretrained models. model: the sources named in the model folder. config: the keys of `pretrained`."""

    workers: int = 0
    """Number of workers of --pairs (>= 0), each with a GPU if the cluster has GPUs or if `device` is cuda, else with a CPU core.
    If they do not fit, an autoscaling cluster adds nodes. 0: as many as the cluster has room for at the start of the job."""

    prefix: ClassVar[str] = "animate."

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "animate.", at_least(1), decode_batch=8)
        check(self, "animate.", at_least(0), workers=0, lora_scale=1)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"animate.device = {self.device}: no such device; use auto, cpu, cuda or cuda:N")
        if self.smoothing_window and (self.smoothing_window < 5 or self.smoothing_window % 2 == 0):
            raise UserError(
                f"animate.smoothing_window = {self.smoothing_window}: must be odd and at least 5; set e.g. 7, or 0 to "
                "disable smoothing"
            )
        check(self, "animate.", multiple_of(8), height=512, width=512)


@dataclass
class MetricNetworksConfig:
    """Local files of the networks of metrics. Nothing is downloaded: without its file, a metric is reported as unavailable."""

    alexnet: str | None = None
    """File of LPIPS (AlexNet): torchvision's alexnet-owt-7be5be79.pth."""

    vgg16: str | None = None
    """File of LPIPS (VGG): torchvision's vgg16-397923af.pth."""

    inception: str | None = None
    """File of FID: torch-fidelity's weights-inception-2015-12-05-6726825d.pth."""

    resnet3d: str | None = None
    """File of FID-VID: the 3D ResNet-50 resnet-50-kinetics.pth that DisCo uses."""

    i3d: str | None = None
    """File of FVD: i3d_torchscript.pt."""

    image: str | None = None
    """Folder of a CLIP or DINO model in transformers' layout, for the image similarity."""

    face: str | None = None
    """File of the face similarity: a face recognition network in InsightFace's format (ArcFace), such as w600k_r50.onnx."""


@dataclass
class EvaluateConfig:
    """Model folder + held-out videos -> metrics. Results are sampled with the settings of `animate`."""

    frames: int = 48
    """Number of frames to animate and evaluate of each video (>= 1), from its first frame."""

    videos: int = 0
    """Maximum number of videos, sorted by name (>= 0). 0: all videos."""

    poses: Literal["detected", "true"] = "detected"
    """Driving poses. detected: those that the pose network finds in the video. true: those of the pose file next to each
    video, with its name and .json."""

    detector: str | None = None
    """Source of the pose network that finds the joints in the results, in the forms of `pretrained.pose`. Default: the network
    of the model. To compare models of different pose networks, set the same one."""

    protocol: Literal["none", "tiktok-disco"] = "none"
    """Protocol of published results. tiktok-disco: all frames of the 10 test videos of DisCo, at 256 x 256, with its
    conventions of the metrics; `evaluate.frames` and `evaluate.videos` have no effect."""

    networks: MetricNetworksConfig = field(default_factory=MetricNetworksConfig)
    """Local files of the networks of metrics."""

    def __post_init__(self) -> None:
        check(self, "evaluate.", at_least(1), frames=48)
        check(self, "evaluate.", at_least(0), videos=0)
