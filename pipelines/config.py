"""Configuration of all jobs: one dataclass per job. The docstring of a field is its `--help` text.

Values come from a preset (`pipelines/configs/mini.yaml`, `sd15.yaml`), then from YAML files, then from the command line
(`--train.workers 2`); later sources override earlier ones. Defaults in this file do not depend on the model size. Every
preset sets the fields without a default.

This module imports neither torch nor Ray nor MLflow, so that `tcan --help` is fast. `pipelines.config_parser` reads the
command line.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.config_rules import ABOVE_0, DECAY, at_least, between, check, multiple_of
from tcan.errors import UserError
from tcan.sampling import SamplingConfig


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
    """Source of the pose network: mini, a local folder or file, or a hub id with body_pose_model.pth."""


@dataclass
class PreprocessConfig:
    """Videos -> clip dataset."""

    canvas: int | None = None
    """Height and width of the clips in pixels (multiple of 8, >= `size`). Default: `size`. From a larger canvas, each
    training sample is a random square crop of `size`."""

    crop: Literal["person", "centre"] = "person"
    """Square crop of a video, the same for all its clips. person: around the main person, so that an off-center person
    in a wide video is fully visible. centre: the center of the video. With person, the models process full frames: 1.8
    times the work at 16:9, no difference for square videos."""

    clip_frames: int = 64
    """Maximum number of frames of a clip (>= `min_clip_frames`). A clip is one dataset row and is held in memory."""

    min_clip_frames: int = 16
    """Minimum number of frames of a clip (1 to `clip_frames`). A shorter remainder of a video is dropped; a shorter
    video is rejected. Use at least `train.clip_frames`."""

    fps: float | None = None
    """Frame rate to resample to in frames per second (> 0). Default: the frame rate of each video."""

    min_person_fraction: float = 0.8
    """Minimum fraction of the frames that show a person (0 to 1). Videos below it are rejected."""

    min_person_height: float = 0.0
    """Minimum height of the main person as a fraction of the canvas height (0 to 1). Videos below it are rejected."""

    min_seconds: float = 0.0
    """Minimum duration of a video in seconds (>= 0). Shorter videos are rejected."""

    max_seconds: float | None = None
    """Maximum duration of a video in seconds (> 0). Longer videos are rejected. Default: no limit."""

    cut_threshold: float = 27.0
    """Scene cut threshold: mean color difference of consecutive frames (0 to 255). A clip ends at a cut. 0 disables cut
    detection."""

    validation_fraction: float = 0.1
    """Fraction of the videos used for validation (0 to 1), assigned by content: stable when videos are added."""

    batch_frames: int = 16
    """Batch size of the pose network and the VAE in frames (>= 1). Use the largest that fits in device memory."""

    gpus_per_actor: float = 1.0
    """GPUs reserved per actor (pose network and VAE), > 0; fractions share a GPU. Ignored if the cluster has no GPUs."""

    hands: bool = False
    """Hand keypoints (21 per hand) of all people, detected with OpenPose's hand_pose_model.pth in the folder of the body
    network; not available with mini. Stored for other uses of the dataset: TCAN trains on body keypoints only."""

    face: bool = False
    """Face keypoints (70) of all people, detected with OpenPose's facenet.pth; otherwise like `hands`."""

    decode_timeout: float = 120.0
    """Timeout of opening a video and of decoding each clip in seconds (> 0). Videos that exceed it are rejected."""

    shard_megabytes: int = 256
    """Approximate size of a Parquet file of clips in MiB (>= 1)."""

    commit_seconds: float = 60.0
    """Approximate maximum time in seconds (>= 0) until a finished video is written. A killed job repeats at most this
    much work."""

    def __post_init__(self) -> None:
        check(self, "preprocess.", multiple_of(8), canvas=576)
        if not 1 <= self.min_clip_frames <= self.clip_frames:
            raise UserError(
                f"preprocess.min_clip_frames = {self.min_clip_frames}: must be from 1 to clip_frames = "
                f"{self.clip_frames}; change one of them"
            )
        check(self, "preprocess.", between(0, 255), cut_threshold=27)
        check(self, "preprocess.", at_least(1), batch_frames=16, shard_megabytes=256)
        check(self, "preprocess.", ABOVE_0, fps=25, max_seconds=600, gpus_per_actor=1, decode_timeout=120)
        check(self, "preprocess.", at_least(0), min_seconds=0, commit_seconds=60)
        check(self, "preprocess.", between(0, 1), min_person_fraction=0.8, min_person_height=0)
        check(self, "preprocess.", between(0, 1), validation_fraction=0.1)


@dataclass
class StageConfig:
    """One training stage.

    The samples of a step depend on the seed, the step and these settings, not on the number of workers. `TrainConfig`
    validates the values, because its error messages name the stage.
    """

    steps: int
    """Number of optimizer steps of the stage (>= 1)."""

    batch_size: int
    """Images (stage 1) or clips (stage 2) per optimizer step (>= 1), over all workers and accumulation steps."""

    micro_batch: int
    """Batch size of one forward pass of one worker (>= 1): batch_size = workers x micro_batch x accumulation steps."""

    lr: float = 1e-5
    """Learning rate of AdamW (> 0), constant after warm-up."""

    warmup_steps: int = 0
    """Number of warm-up steps (>= 0), in which the learning rate rises linearly to `lr`."""

    checkpoint_every: int = 500
    """Interval between checkpoints in steps (>= 1). The last step always writes one."""

    sample_every: int = 500
    """Interval between sample images in steps (>= 0), with reference, pose, prediction and ground truth; in stage 2 also
    a clip. 0 disables."""

    validate_every: int = 500
    """Interval between validation losses (by timestep range) in steps (>= 0), on validation videos. 0 disables."""


@dataclass
class TrainConfig:
    """Clip dataset -> model folder."""

    stage1: StageConfig
    """Stage 1: appearance UNet and APPA, trained on images."""

    stage2: StageConfig
    """Stage 2: temporal layers, trained on clips."""

    stick_width: int
    """Stick width and joint radius of the drawn poses in pixels (>= 1). Saved in the model folder."""

    clip_frames: int = 16
    """Number of consecutive frames of a clip in stage 2 (>= 2)."""

    drop_reference: float = 0.1
    """Fraction of the stage 1 samples without a reference (0 to 1). Classifier-free guidance requires such samples."""

    stage1_reference: Literal["random", "first"] = "random"
    """Reference of a stage 1 sample. random (the paper's): any frame of the video, far from the target. first: the first
    frame of the video."""

    stage2_reference: Literal["first", "random"] = "first"
    """Reference of a stage 2 clip. first (the paper's): the first frame of the video. random: any frame of the video."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """Prediction target. epsilon (the paper's): the noise. v_prediction: a mixture of noise and image. Saved in the model
    folder."""

    zero_terminal_snr: bool = False
    """Rescaling of the noise schedule to zero SNR at the last timestep; allows very dark and very bright results.
    Requires v_prediction. Saved in the model folder."""

    snr_gamma: float | None = None
    """Gamma of the Min-SNR loss weights (> 0, usually 5), which are lower at timesteps with little noise. Default: equal
    weights."""

    noise_offset: float = 0.0
    """Scale of the noise offset (>= 0, usually 0.05): one random value per channel of a sample, shared by its pixels and
    frames. Improves the brightness of results. 0 disables."""

    pose_dropout: float = 0.0
    """Fraction of the stage 2 joints to remove (0 to 1). Such pose errors train the temporal layers to bridge them. 0
    disables."""

    pose_jitter: float = 0.0
    """Standard deviation of the stage 2 joint noise as a fraction of the image side (0 to 1, e.g. 0.01). 0 disables."""

    pose_outliers: float = 0.0
    """Fraction of the stage 2 frames with unusable poses (0 to 1): joints shuffled in 50 % of them, all joints missing in
    50 %. 0 disables."""

    lora_rank: int = 16
    """Rank of the APPA layers (>= 1)."""

    lora_alpha: int = 16
    """Alpha of the APPA layers (>= 1); their weight is alpha / rank."""

    weight_decay: float = 0.01
    """Weight decay of AdamW (>= 0)."""

    max_grad_norm: float = 1.0
    """Maximum norm of the gradient (>= 0); larger gradients are clipped. 0 disables clipping."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Data type of weights and activations. With bf16, the optimizer keeps fp32 copies of the trained weights."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1 shards the optimizer state, 2 also the gradients, 3 also the weights; 0 shards nothing."""

    deepspeed: str | None = None
    """JSON file of more DeepSpeed settings, e.g. CPU offloading; contradictions to these keys are errors. Default: none."""

    ema_decay: float = 0.0
    """EMA decay per step (>= 0, < 1). If > 0, the EMA weights are validated and saved. 0 disables EMA."""

    gradient_checkpointing: bool = False
    """Recomputation of activations in the backward pass: less memory, about 1.4 times the time (`make bench`). `tcan
    memory` prints the memory with and without."""

    workers: int = 1
    """Number of Ray Train workers (>= 1), each with a DeepSpeed engine."""

    min_workers: int | None = None
    """Minimum number of workers (1 to `workers`). Training runs with fewer than `workers` while the cluster has no room
    for more. Default: `workers`; training waits for all."""

    storage: str | None = None
    """Location of the checkpoints, e.g. s3://bucket/this-run, used by a single run. Default: OUT."""

    cpus_per_worker: int = 1
    """Number of CPU cores of a worker (>= 1); without a GPU also its number of threads."""

    gpus_per_worker: Literal[0, 1] = 0
    """Number of GPUs of a worker; 0 trains on the CPU."""

    max_failures: int = 3
    """Maximum number of worker failures (>= -1; -1: no limit). Each failure restarts from the last checkpoint."""

    num_checkpoints: int = 2
    """Number of checkpoints to keep (>= 1)."""

    keep_checkpoints: Literal["last", "best"] = "last"
    """Checkpoints to keep: the last ones, or the ones with the lowest validation loss and the last one (best)."""

    validation_samples: int = 8
    """Number of images or clips of the validation loss (>= 1), each at four timesteps."""

    on_bad_loss: Literal["stop", "skip"] = "stop"
    """Action on a NaN/inf loss or a loss spike: stop with a report, or skip the step."""

    loss_spike_factor: float = 20.0
    """Loss spike threshold as a multiple of the running mean of the loss (>= 0). 0 disables spike detection."""

    hang_timeout: float = 900.0
    """Timeout of a training step in seconds (> 0), after which all workers restart from the last checkpoint."""

    log_every: int = 10
    """Interval between progress lines in steps (>= 1). Metrics are recorded at every step."""

    profile_steps: int = 0
    """Number of steps to profile on the first worker (>= 0), from the third step after the start. The trace for
    ui.perfetto.dev is stored in the artifact folder profile/. 0 disables."""

    clip_cache_mb: int = 1024
    """Memory of a worker for clips read from the dataset in MiB (>= 0)."""

    def __post_init__(self) -> None:
        for name, stage in (("train.stage1.", self.stage1), ("train.stage2.", self.stage2)):
            check(stage, name, at_least(1), steps=1000, batch_size=8, micro_batch=1, checkpoint_every=500)
            check(stage, name, at_least(0), warmup_steps=0, sample_every=500, validate_every=500)
            check(stage, name, ABOVE_0, lr=1e-5)
        check(self, "train.", at_least(1), stick_width=4, lora_rank=16, lora_alpha=16, workers=1)
        check(self, "train.", at_least(1), cpus_per_worker=1, num_checkpoints=2, validation_samples=8)
        check(self, "train.", at_least(1), log_every=10)
        check(self, "train.", at_least(0), noise_offset=0.05, weight_decay=0.01, max_grad_norm=1)
        check(self, "train.", at_least(0), loss_spike_factor=20)
        check(self, "train.", at_least(0), profile_steps=3, clip_cache_mb=1024)
        check(self, "train.", at_least(2), clip_frames=16)
        check(self, "train.", at_least(-1), max_failures=3)
        check(self, "train.", DECAY, ema_decay=0.999)
        check(self, "train.", ABOVE_0, snr_gamma=5, hang_timeout=900)
        check(self, "train.", between(0, 1), drop_reference=0.1, pose_dropout=0.1, pose_jitter=0.01)
        check(self, "train.", between(0, 1), pose_outliers=0.05)
        if self.zero_terminal_snr and self.prediction_type != "v_prediction":
            raise UserError(
                f"train.zero_terminal_snr = True: requires v_prediction, not {self.prediction_type}; set "
                "train.prediction_type v_prediction"
            )
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise UserError(
                f"train.min_workers = {self.min_workers}: must be from 1 to train.workers = {self.workers}; change one "
                "of them"
            )
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            for workers in range(self.min_workers or self.workers, self.workers + 1):
                if stage.batch_size % (workers * stage.micro_batch):
                    raise UserError(
                        f"train.{name}.batch_size = {stage.batch_size}: not a multiple of train.workers x micro_batch = "
                        f"{workers} x {stage.micro_batch}; change one of them"
                    )


@dataclass
class AnimateConfig(SamplingConfig):
    """Image + driving video -> video."""

    scheduler: str = "DDIMScheduler"
    """Class name of the diffusers scheduler for sampling, e.g. DPMSolverMultistepScheduler."""

    retarget: bool = True
    """Retargeting of the poses to the proportions and the position of the character."""

    smoothing_window: int = 0
    """Smoothing window of the poses in frames (odd, >= 5), after outlier removal. 0 disables both."""

    height: int | None = None
    """Height of the result in pixels (multiple of 64). Default: the training size of the model."""

    width: int | None = None
    """Width of the result in pixels (multiple of 64). Default: the training size of the model."""

    decode_batch: int = 8
    """Batch size of VAE decoding in frames (>= 1)."""

    device: str = "auto"
    """Device, e.g. cpu, cuda or cuda:1. auto: a GPU if available, else the CPU."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Data type of weights and activations."""

    pretrained: Literal["model", "config"] = "model"
    """Source of the pretrained models. model: the sources named in the model folder. config: the keys of `pretrained`."""

    workers: int = 0
    """Number of workers of --pairs (>= 0), each with a GPU if the cluster has GPUs, else with a CPU core. 0: as many as
    the cluster has room for."""

    prefix: ClassVar[str] = "animate."

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "animate.", at_least(1), decode_batch=8)
        check(self, "animate.", at_least(0), workers=0)
        if self.smoothing_window and (self.smoothing_window < 5 or self.smoothing_window % 2 == 0):
            raise UserError(
                f"animate.smoothing_window = {self.smoothing_window}: must be odd and at least 5; set e.g. 7, or 0 to "
                "disable smoothing"
            )
        check(self, "animate.", multiple_of(64), height=512, width=512)


@dataclass
class EvaluateConfig:
    """Model folder + held-out videos -> metrics. Results are sampled with the settings of `animate`."""

    frames: int = 48
    """Number of frames to animate and evaluate of each video (>= 1), from its first frame."""

    videos: int = 0
    """Maximum number of videos, sorted by name (>= 0). 0: all videos."""

    def __post_init__(self) -> None:
        check(self, "evaluate.", at_least(1), frames=48)
        check(self, "evaluate.", at_least(0), videos=0)


@dataclass
class TrackingConfig:
    """MLflow tracking of all runs."""

    experiment: str = "tcan"
    """Name of the MLflow experiment of all runs."""

    folder: str = "tcan-mlflow"
    """Folder of the SQLite store and the artifacts, used if neither `uri` nor MLFLOW_TRACKING_URI is set."""

    uri: str | None = None
    """MLflow tracking URI, e.g. http://mlflow:5000. Default: MLFLOW_TRACKING_URI, else the store in `folder`."""


@dataclass
class Config:
    """All jobs"""

    size: int
    """Height and width of the training images in pixels (multiple of 64), and of the dataset unless `preprocess.canvas`
    is larger."""

    pretrained: PretrainedConfig

    train: TrainConfig

    seed: int = 0
    """Seed of every random choice of every job (0 to 2^63 - 1)."""

    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    animate: AnimateConfig = field(default_factory=AnimateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
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
        """Height and width of the clips of a dataset in pixels."""
        return self.preprocess.canvas or self.size
