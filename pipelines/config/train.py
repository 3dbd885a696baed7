"""Configuration of `tcan train`."""

import re
from dataclasses import dataclass
from typing import Literal

from pipelines.config.rules import ABOVE_0, DECAY, at_least, between, check
from tcan.errors import UserError


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

    micro_batch: int | Literal["auto"]
    """Batch size of one forward pass of one worker (>= 1): batch_size = workers x micro_batch x accumulation steps. auto:
    the largest that fits into memory by the estimate of `tcan memory`, halved when a step runs out of memory."""

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

    pose_style: Literal["skeleton", "body_map"] = "skeleton"
    """Style of the pose images. skeleton (the paper's): OpenPose's sticks. body_map: parts of the body filled with colors
    as in DensePose's images, which requires a ControlNet trained on them. Saved in the model folder."""

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
    """Standard deviation of the stage 2 joint noise as a fraction of the shorter image side (0 to 1, e.g. 0.01). 0 disables."""

    pose_outliers: float = 0.0
    """Fraction of the stage 2 frames with unusable poses (0 to 1): joints shuffled in 50 % of them, all joints missing in
    50 %. 0 disables."""

    appa: bool = True
    """APPA layers (LoRA on the spatial attention of the denoiser). false: the reference features are concatenated, but the
    projections remain the pretrained ones. Saved in the model folder."""

    controlnet: Literal["frozen", "finetune"] = "frozen"
    """Training of the ControlNet in stage 1. frozen (the paper's): none. finetune: with the same learning rate as the other
    networks; its weights are saved in the model folder."""

    temporal_controlnet: bool = True
    """Temporal layers of the ControlNet, trained in stage 2. Saved in the model folder."""

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

    compile: bool | Literal["auto"] = "auto"
    """Compilation of the networks with torch.compile: faster steps after a first step of minutes. auto: on GPUs, except
    with ZeRO 3."""

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
    """Action on a NaN/inf loss or gradient, or a loss spike: stop with a report, or skip the step."""

    loss_spike_factor: float = 20.0
    """Loss spike threshold as a multiple of the running mean of the loss (> 1). 0 disables spike detection."""

    hang_timeout: float = 900.0
    """Timeout of a training step in seconds (> 0), after which all workers restart from the last checkpoint."""

    log_every: int = 10
    """Interval in steps (>= 1) at which metrics are copied from the device and written, with a progress line. The metrics
    of all steps are recorded. A bad loss or gradient is noticed at these steps and before checkpoints."""

    profile_steps: int = 0
    """Number of steps to profile on the first worker (>= 0), from the third step after the start. The trace for
    ui.perfetto.dev is stored in the artifact folder profile/. 0 disables."""

    data_processes: int | Literal["auto"] = "auto"
    """Number of processes of a worker that create its batches (>= 0); 0: a thread. auto: on GPUs `cpus_per_worker` - 1, at
    least 1; otherwise 0."""

    clip_cache_mb: int = 1024
    """Memory of a worker for clips read from the dataset in MiB (>= 0), shared equally among its data processes."""

    cache_disk_gb: float = 0.0
    """Local disk of a worker for clips read from a bucket in GiB (>= 0), in the temporary folder, shared equally among its
    data processes. 0 disables."""

    def __post_init__(self) -> None:
        for name, stage in (("train.stage1.", self.stage1), ("train.stage2.", self.stage2)):
            check(stage, name, at_least(1), steps=1000, batch_size=8, checkpoint_every=500)
            if stage.micro_batch != "auto":
                check(stage, name, at_least(1), micro_batch=1)
            check(stage, name, at_least(0), warmup_steps=0, sample_every=500, validate_every=500)
            check(stage, name, ABOVE_0, lr=1e-5)
        check(self, "train.", at_least(1), stick_width=4, lora_rank=16, lora_alpha=16, workers=1)
        check(self, "train.", at_least(1), cpus_per_worker=1, num_checkpoints=2, validation_samples=8)
        check(self, "train.", at_least(1), log_every=10)
        check(self, "train.", at_least(0), noise_offset=0.05, weight_decay=0.01, max_grad_norm=1)
        if self.loss_spike_factor and not self.loss_spike_factor > 1:
            raise UserError(
                f"train.loss_spike_factor = {self.loss_spike_factor}: must be above 1, or 0 to disable spike detection; set e.g. 20"
            )
        check(self, "train.", at_least(0), profile_steps=3, clip_cache_mb=1024, cache_disk_gb=50)
        if self.data_processes != "auto":
            check(self, "train.", at_least(0), data_processes=2)
        check(self, "train.", at_least(2), clip_frames=16)
        check(self, "train.", at_least(-1), max_failures=3)
        check(self, "train.", DECAY, ema_decay=0.999)
        check(self, "train.", ABOVE_0, snr_gamma=5, hang_timeout=900)
        check(self, "train.", between(0, 1), drop_reference=0.1, pose_dropout=0.1, pose_jitter=0.01)
        check(self, "train.", between(0, 1), pose_outliers=0.05)
        if self.compile is True and self.zero_stage == 3:
            raise UserError(
                "train.compile = True: not supported with ZeRO 3, which gathers weights between layers; set train.zero_stage "
                "2 or train.compile auto"
            )
        if self.storage is not None and not re.fullmatch(
            r"((s3|gs)://[^/]+.*|file:///.+|(?!\w+://).+)", self.storage
        ):
            raise UserError(
                f"train.storage = {self.storage}: not a folder; set a path, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
            )
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
                micro_batch = 1 if stage.micro_batch == "auto" else stage.micro_batch
                if stage.batch_size % (workers * micro_batch):
                    raise UserError(
                        f"train.{name}.batch_size = {stage.batch_size}: not a multiple of train.workers x micro_batch = "
                        f"{workers} x {stage.micro_batch}; change one of them"
                    )
