"""Every setting of every job, a dataclass a job; the docstring under a field is its `--help`.

The values come from a preset (`pipelines/configs/mini.yaml`, `sd15.yaml`), then from YAML files, then from the
command line (`--train.workers 2`), each overriding the ones before. Defaults below are those that no size changes;
a field without a default is one that every preset must give.

This file imports neither torch nor ray nor mlflow, so that `tcan --help` is quick.
"""

import argparse
import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml
from jsonargparse import ActionConfigFile

from tcan.errors import UserError

PRESETS = {name: Path(__file__).parent / "configs" / f"{name}.yaml" for name in ("mini", "sd15")}


# --- pretrained -----------------------------------------------------------------------------------------------------------


@dataclass
class PretrainedConfig:
    """Where the frozen, pretrained networks come from.

    Each is one of: mini (the weights in this package); a single file that holds it in its original layout, such as an
    SD1.5 checkpoint, control_v11p_sd15_openpose.pth or mm_sd_v15_v2.ckpt; a local folder in diffusers' layout, of the
    part itself or with the part as a subfolder; a hub id owner/name[/subfolder][@revision].
    """

    vae: str
    """AutoencoderKL."""

    unet: str
    """UNet2DConditionModel."""

    controlnet: str
    """ControlNetModel for OpenPose's poses."""

    motion_adapter: str
    """MotionAdapter: AnimateDiff's motion modules."""

    text_encoder: str
    """CLIPTextModel; only its answer to the empty prompt is used."""

    scheduler: str
    """The noise schedule, as DDIMScheduler reads it; sd15: SD1.5's."""

    pose: str
    """The pose network: mini, a local folder or file, or a hub id with body_pose_model.pth."""


# --- preprocess ------------------------------------------------------------------------------------------------------


@dataclass
class PreprocessConfig:
    """Videos -> clip dataset."""

    canvas: int | None = None
    """Height and width of the clips in pixels, a multiple of 8; unset: `size`. Of a larger canvas, each training sample
    takes a square of `size`, at random."""

    crop: Literal["person", "centre"] = "person"
    """The square of a video that becomes its clips, one for all of them: around the main person, so that someone at the
    side of a wide image is whole in it; or the centre. With person, the models see the whole images: of 16:9, 1.8
    times the work of their squares; of square videos nothing changes."""

    clip_frames: int = 64
    """Frames of a clip, at most: a row of the dataset, and what is held in memory at a time."""

    min_clip_frames: int = 16
    """A shorter rest of a video is dropped, a shorter video rejected; not below the window that is trained on."""

    fps: float | None = None
    """Frames a second to resample to; unset: each video's own."""

    min_person_fraction: float = 0.8
    """A video in which fewer of the frames (0 to 1) show a person is rejected."""

    min_person_height: float = 0.0
    """A video whose main person is smaller than this share (0 to 1) of the canvas's height is rejected."""

    min_seconds: float = 0.0
    """A shorter video is rejected."""

    max_seconds: float | None = None
    """A longer video is rejected; unset: none is."""

    cut_threshold: float = 27.0
    """Mean change of colour (0 to 255) from one frame to the next that is a cut between scenes: a clip ends there; 0:
    cuts are not looked for."""

    validation_fraction: float = 0.1
    """Share of the videos (0 to 1) kept for validation, drawn by their content: stable when videos are added."""

    batch_frames: int = 16
    """Frames that the pose network and the VAE take at a time; as many as the device's memory allows."""

    gpus_per_actor: float = 1.0
    """GPUs, or the share of one, that an actor (pose network and VAE) reserves; only where the cluster has GPUs."""

    hands: bool = False
    """Find the hands too (21 points each) of everybody, with OpenPose's hand_pose_model.pth from beside its body network:
    not with mini's. For other uses of the dataset: TCAN itself draws and trains on bodies alone."""

    face: bool = False
    """The same of the faces (70 points), with OpenPose's facenet.pth."""

    decode_timeout: float = 120.0
    """Seconds that opening a video, and then each of its clips, may take before the video is rejected."""

    shard_megabytes: int = 256
    """Size of a Parquet file of clips, about."""

    commit_seconds: float = 60.0
    """Finished videos wait no longer than about this for their file: what a job that dies has to do again."""

    def __post_init__(self) -> None:
        if self.canvas is not None and (self.canvas <= 0 or self.canvas % 8):
            raise UserError(
                f"preprocess.canvas = {self.canvas}: must be above 0 and a multiple of 8, such as 576"
            )
        if not 1 <= self.min_clip_frames <= self.clip_frames:
            raise UserError(
                f"preprocess.min_clip_frames = {self.min_clip_frames}: must be from 1 to clip_frames ({self.clip_frames})"
            )
        for name in (
            "fps",
            "max_seconds",
            "batch_frames",
            "gpus_per_actor",
            "decode_timeout",
            "shard_megabytes",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"preprocess.{name} = {value}: must be more than 0")
        for name in ("cut_threshold", "min_seconds", "commit_seconds"):
            if getattr(self, name) < 0:
                raise UserError(f"preprocess.{name} = {getattr(self, name)}: must not be below 0")
        for name in ("min_person_fraction", "min_person_height", "validation_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"preprocess.{name} = {getattr(self, name)}: must be from 0 to 1")


# --- train -----------------------------------------------------------------------------------------------------------


@dataclass
class StageConfig:
    """One stage of training. What comes at a step depends on the seed, the step and these, not on the workers."""

    steps: int
    """Optimizer steps of the whole stage."""

    batch_size: int
    """Images (stage 1) or clips (stage 2) of one optimizer step, over all workers and accumulation together."""

    micro_batch: int
    """What one worker takes through the model at once: batch_size = workers x micro_batch x accumulation."""

    lr: float = 1e-5
    """AdamW's learning rate, constant after the warm-up."""

    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to `lr`."""

    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always makes one."""

    sample_every: int = 500
    """Steps between sample images in the run (reference, pose, prediction, truth), in stage 2 a clip too; 0: none."""

    validate_every: int = 500
    """Steps between metrics of the validation loss, by band of timesteps, where the dataset has such videos; 0: none."""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "micro_batch", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise UserError(f"train: {key} = {getattr(self, key)}: must be at least 1")
        if self.lr <= 0:
            raise UserError(f"train: lr = {self.lr}: must be above 0")


@dataclass
class TrainConfig:
    """Clip dataset -> model folder."""

    stage1: StageConfig
    """Appearance UNet and APPA, on images."""

    stage2: StageConfig
    """Temporal layers, on clips."""

    stick_width: int
    """Stick width and joint radius of the drawn poses in pixels; goes into the model folder."""

    frames: int = 16
    """Consecutive frames of a clip in stage 2."""

    drop_reference: float = 0.1
    """Share of stage 1's samples without a reference: what guidance needs."""

    stage1_reference: Literal["random", "first"] = "random"
    """Reference of stage 1's images: any frame of the video, far from the target (the paper's); or its first."""

    stage2_reference: Literal["first", "random"] = "first"
    """Reference of stage 2's clips: the video's first frame (the paper's), or any."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What is predicted: the noise (the paper's), or v, a mixture of noise and image. Goes into the model folder."""

    zero_terminal_snr: bool = False
    """Rescale the schedule so that nothing of the image is left at the last timestep: very dark and very bright results
    become possible. Needs v_prediction. Goes into the model folder."""

    snr_gamma: float | None = None
    """Min-SNR-gamma: timesteps with little noise weigh less in the loss, 5 is usual; unset: all weigh the same."""

    noise_offset: float = 0.0
    """Noise of this size added alike to a whole clip, a number a channel, 0.05 is usual: brightness is learned better."""

    pose_dropout: float = 0.0
    """Errors in stage 2's poses, for the temporal layers to learn to bridge them: share of the joints that are missing."""

    pose_jitter: float = 0.0
    """Likewise: standard deviation of a joint's distance from its place, as a share of the image's side, such as 0.01."""

    pose_outliers: float = 0.0
    """Likewise: share of the frames whose joints have changed places, or in half of them are not found."""

    lora_rank: int = 16
    """Rank of APPA."""

    lora_alpha: int = 16
    """Alpha of APPA: its weight is alpha / rank."""

    weight_decay: float = 0.01
    """AdamW's."""

    clip_norm: float = 1.0
    """The gradient's norm is clipped to this."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and arithmetic; with bf16 the optimizer keeps fp32 copies of what it trains."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 1 shards the optimizer's state over the workers, 2 the gradients too, 3 the weights too."""

    deepspeed: str | None = None
    """A JSON file of more DeepSpeed settings, such as offloading to the CPU; what contradicts these keys is an error."""

    ema_decay: float = 0.0
    """Decay a step of an average of the weights, which is then what is saved as the model and judged; 0: none."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass rather than keep them: less memory, about 1.4 times the time
    (`make bench`; `tcan memory` says how much less)."""

    workers: int = 1
    """Workers of Ray Train, each with a DeepSpeed engine."""

    min_workers: int | None = None
    """Go on with as few as these while the cluster has no room for more, up to `workers`; unset: wait for all."""

    storage: str | None = None
    """Where the checkpoints go, such as s3://bucket/this-run; for one run alone. Unset: OUT."""

    cpus_per_worker: int = 1
    """CPU cores of a worker; without a GPU also its threads."""

    gpus_per_worker: Literal[0, 1] = 0
    """1: a worker trains on a GPU."""

    max_failures: int = 3
    """How often dead workers are replaced, from the last checkpoint, before the job gives up."""

    keep_checkpoints: int = 2
    """So many checkpoints stay."""

    keep: Literal["last", "best"] = "last"
    """Which stay: the last ones, or those of the lowest validation loss and the last one."""

    validation_samples: int = 8
    """Images or clips of the validation loss, each at four timesteps."""

    bad_loss: Literal["stop", "skip"] = "stop"
    """At a loss that is no number, or a spike: stop and say where, or leave the step out."""

    spike: float = 20.0
    """A loss so many times its running mean is a spike; 0: nothing is."""

    hang_seconds: float = 900.0
    """A worker whose step takes longer is taken to hang: all are started anew from the last checkpoint."""

    log_every: int = 10
    """Steps between lines of progress; each step's numbers are recorded."""

    profile: int = 0
    """Record so many steps, from the third after the start on, in a trace of the first worker for ui.perfetto.dev: the
    run's artifact profile/; 0: none."""

    cache_mb: int = 1024
    """Memory of a worker for clips already read from the dataset."""

    def __post_init__(self) -> None:
        for key in (
            "workers",
            "cpus_per_worker",
            "lora_rank",
            "stick_width",
            "log_every",
            "keep_checkpoints",
            "validation_samples",
        ):
            if getattr(self, key) < 1:
                raise UserError(f"train.{key} = {getattr(self, key)}: must be at least 1")
        if self.zero_terminal_snr and self.prediction_type != "v_prediction":
            raise UserError("train.zero_terminal_snr: needs train.prediction_type v_prediction")
        if (self.snr_gamma is not None and self.snr_gamma <= 0) or self.noise_offset < 0:
            raise UserError("train: snr_gamma must be above 0, noise_offset at least 0")
        for name in ("pose_dropout", "pose_outliers", "pose_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"train.{name} = {getattr(self, name)}: must be from 0 to 1")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise UserError(
                f"train.min_workers = {self.min_workers}: must be from 1 to train.workers ({self.workers})"
            )
        if self.hang_seconds <= 0 or self.spike < 0 or self.profile < 0:
            raise UserError("train: hang_seconds must be above 0, spike and profile at least 0")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"train.ema_decay = {self.ema_decay}: must be from 0 to below 1, such as 0.999")
        if self.frames < 2:
            raise UserError(
                f"train.frames = {self.frames}: must be at least 2, one frame has no motion to learn from"
            )
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            for workers in range(self.min_workers or self.workers, self.workers + 1):
                if stage.batch_size % (workers * stage.micro_batch):
                    raise UserError(
                        f"train.{name}.batch_size = {stage.batch_size} is no multiple of train.workers x micro_batch = "
                        f"{workers} x {stage.micro_batch}; change one of them"
                    )


# --- animate ---------------------------------------------------------------------------------------------------------


@dataclass
class AnimateConfig:
    """Image + driving video -> video."""

    scheduler: str = "DDIMScheduler"
    """Class name of the diffusers scheduler that samples, such as DPMSolverMultistepScheduler."""

    steps: int = 25
    """Its steps."""

    guidance_scale: float = 7.5
    """Of the appearance; 1: none, at half the time."""

    window: int = 16
    """Frames that attend to each other."""

    overlap: int = 4
    """Frames that neighbouring windows share."""

    loop: bool = False
    """The driving video ends where it begins; so will the result, without a seam."""

    controlnet_scale: float = 1.0
    """Of the poses' weight: 1 is the paper's."""

    ptm: bool = True
    """The pose-driven temperature map: less flicker away from the person."""

    ptm_strength: float = 1.0
    """How steeply it rises with the distance from the person: 1 is the paper's, 0 is none."""

    ptm_limit: int | None = None
    """It acts only in layers whose grid has at most so many cells on its longer side (64, 32, 16, 8 at 512 pixels);
    unset: in all of them."""

    start_from_reference: bool = False
    """Begin with the image under noise rather than with noise alone (the paper's): brightness that flickers, as that of
    small images does, is steady."""

    retarget: bool = True
    """Fit the poses to the character's proportions and place."""

    smooth: int = 0
    """Frames over which the poses' movement is smoothed, joints that jump away first taken out: odd, such as 7; 0: not."""

    height: int | None = None
    """Of the result in pixels, a multiple of 64; unset: that of the model's training."""

    width: int | None = None
    """Of the result in pixels, a multiple of 64; unset: that of the model's training."""

    decode_batch: int = 8
    """Frames that the VAE decodes at once."""

    device: str = "auto"
    """Such as cpu, cuda, cuda:1; auto: a GPU if there is one."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of weights and arithmetic."""

    pretrained: Literal["model", "config"] = "model"
    """Take the pretrained from where the model folder says, or from where `pretrained` of this configuration says."""

    workers: int = 0
    """Workers of --pairs, each with a GPU where the cluster has some, else with a CPU; 0: as many as there is room for."""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise UserError(
                f"animate.steps = {self.steps}: must be from 1 to 1000, the levels of noise there are"
            )
        if self.guidance_scale < 0:
            raise UserError(f"animate.guidance_scale = {self.guidance_scale}: must not be below 0")
        if self.decode_batch < 1:
            raise UserError(f"animate.decode_batch = {self.decode_batch}: must be at least 1")
        if self.smooth and (self.smooth < 5 or self.smooth % 2 == 0):
            raise UserError(f"animate.smooth = {self.smooth}: must be odd and at least 5, or 0")
        for name in ("height", "width"):
            if (value := getattr(self, name)) is not None and (value <= 0 or value % 64):
                raise UserError(
                    f"animate.{name} = {value}: must be above 0 and a multiple of 64, such as 512 or 768"
                )
        if self.workers < 0:
            raise UserError(f"animate.workers = {self.workers}: must be at least 0")
        if not 0 <= self.overlap < self.window:
            raise UserError(
                f"animate: overlap = {self.overlap}: must be from 0 to below window = {self.window}"
            )
        for key in ("controlnet_scale", "ptm_strength"):
            if getattr(self, key) < 0:
                raise UserError(f"animate.{key} = {getattr(self, key)}: must be at least 0")


# --- evaluate --------------------------------------------------------------------------------------------------------


@dataclass
class EvaluateConfig:
    """Model folder + held-out videos -> metrics. The results are made as `animate` says."""

    frames: int = 48
    """First frames of each video that are animated and measured."""

    videos: int = 0
    """At most so many videos, in the order of their names; 0: all."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.videos < 0:
            raise UserError("evaluate: frames must be at least 1, videos at least 0")


# --- tracking --------------------------------------------------------------------------------------------------------


@dataclass
class TrackingConfig:
    """Where runs are recorded (MLflow)."""

    experiment: str = "tcan"
    """The MLflow experiment that all runs belong to."""

    folder: str = "tcan-mlflow"
    """Folder of the SQLite store and the artifacts, used when neither `uri` nor MLFLOW_TRACKING_URI names a server."""

    uri: str | None = None
    """MLflow tracking URI, e.g. http://mlflow:5000; unset: MLFLOW_TRACKING_URI, else the folder above."""


# --- all of it -------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every job"""

    size: int
    """Height and width of the images in pixels, a multiple of 64: in training, and in the dataset unless
    `preprocess.canvas` is larger."""

    pretrained: PretrainedConfig

    train: TrainConfig

    seed: int = 0
    """Every random choice of every job follows from it."""

    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    animate: AnimateConfig = field(default_factory=AnimateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.size <= 0 or self.size % 64:
            raise UserError(f"size = {self.size}: must be above 0 and a multiple of 64, such as 128 or 512")
        if self.canvas < self.size:
            raise UserError(
                f"preprocess.canvas = {self.canvas}: must be at least size = {self.size}, which training takes of it"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed = {self.seed}: must be from 0 to 2^63 - 1")

    @property
    def canvas(self) -> int:
        """Height and width of a dataset's clips in pixels."""
        return self.preprocess.canvas or self.size


# --- from the command line -------------------------------------------------------------------------------------------


class _Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser, with a help for those who run the jobs."""

    def format_help(self, *arguments: Any) -> str:
        text = super().format_help(*arguments)
        text = re.sub(r"default config file locations:.*?\n\n", "", text, flags=re.DOTALL)
        return re.sub(r"\(required,(\s+)type:", r"(type:", text)  # the preset gives it


def make_parser(prog: str, description: str, sections: Collection[str] = ()) -> jsonargparse.ArgumentParser:
    """A parser for one job: it knows `--config` and every key; the job's own arguments are added to it.

    sections: whose keys the job reads; its help leaves out the others, so that one file of keys still does for all jobs.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "%(prog)s ARGUMENTS [--config mini|sd15|FILE.yaml] [--key.path VALUE ...]"
    epilog = "The other jobs' keys are taken too, so that one file does for all; `tcan demo --help` lists every key."
    parser = _Parser(prog=prog, description=description, usage=usage, epilog=epilog, exit_on_error=False)
    parser.add_argument(
        "--config",
        action=_ConfigFile,
        metavar="mini|sd15|FILE.yaml",
        help="A preset, or a YAML file of the keys that differ from it (from mini, unless a preset stands before it). "
        "Keys on the command line override both.",
    )
    parser.add_class_arguments(Config)
    whole = {key.rpartition(".")[0] for key in _all_keys(Config)}  # a file for one section only: no use
    for action in parser._actions:
        section, _, key = action.dest.partition(".")
        if action.dest in whole or (key and section not in sections):
            action.help = argparse.SUPPRESS
    return parser


def parse(
    parser: jsonargparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[Config, jsonargparse.Namespace]:
    """The configuration and the job's own arguments.

    Raises UserError, in one line: a file that is missing or no YAML, a key that is not known, a value of another type,
    an argument that is missing or too many.
    """
    files, others = _split_config_files(arguments)
    preset = files.pop(0) if files and files[0] in PRESETS else "mini"
    parser.default_config_files = [PRESETS[preset]]  # so that --help shows the values of the preset
    try:
        namespace = parser.parse_args([*(f"--config={file}" for file in files), *others])
    except jsonargparse.ArgumentError as error:
        raise UserError(_one_line(str(error.message), parser, files, others)) from None
    values = parser.instantiate(namespace)
    config = Config(**{name.name: values.pop(name.name) for name in fields(Config)})
    return config, values


def load_config(*arguments: str) -> Config:
    """The same from Python: `load_config("--config", "sd15", "--train.workers", "2")`; no arguments: mini."""
    return parse(make_parser("config", ""), arguments)[0]


def _split_config_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--config X` and `--config=X` taken out of the arguments: they apply before the keys, wherever they stand."""
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            files.append(next(rest, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            others.append(argument)
    return files, others


class _ConfigFile(ActionConfigFile):
    """`--config`: a preset's name or a file, its keys checked before its values."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = PRESETS.get(values) or Path(values)
        try:
            keys = yaml.load(path.read_text(), _UniqueKeys)
        except OSError as error:
            raise UserError(
                f"--config {values}: {error.strerror}; give {', '.join(PRESETS)} or a YAML file"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not YAML: {' '.join(str(error).split()).rstrip(' ^')}") from None
        if not isinstance(keys, dict):
            raise UserError(f"{path}: must hold keys and values, such as `seed: 1`")
        _check_keys(keys, Config, str(path))
        super().__call__(parser, cfg, str(path), option_string)


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML would take the last of two values of one key without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                problem = f"{key.value} is given twice, first in line {first[key.value]}, again"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _check_keys(values: dict[str, Any], config: type, where: str, prefix: str = "") -> None:
    known = {item.name: item.type for item in fields(config)}
    for key, value in values.items():
        if f"{prefix}{key}" in _all_keys(Config) and "." in key:
            outer, _, inner = key.partition(".")
            raise UserError(f"{where}: write {key} as {outer}: {{{inner}: ...}}, a key inside another")
        if key not in known:
            raise UserError(
                f"{where}: no such key: {prefix}{key}{_nearest(f'{prefix}{key}', _all_keys(Config))}"
            )
        section = known[key]
        if is_dataclass(section) and isinstance(section, type):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {prefix}{key} must hold keys and values")
            _check_keys(value, section, where, f"{prefix}{key}.")


def _all_keys(config: type, prefix: str = "") -> list[str]:
    keys = []
    for item in fields(config):
        if is_dataclass(item.type) and isinstance(item.type, type):
            keys += _all_keys(item.type, f"{prefix}{item.name}.")
        else:
            keys.append(prefix + item.name)
    return keys


def _nearest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; --help lists them all"


def _one_line(
    message: str, parser: jsonargparse.ArgumentParser, files: list[str], arguments: list[str]
) -> str:
    """jsonargparse's error as one line that names the key and where it was given, and the nearest key for one unknown."""
    message = " ".join(message.split())
    options = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    if unknown := re.match(r"unrecognized arguments: (\S+)", message, re.IGNORECASE):
        key = unknown[1].split("=")[0]
        if not key.startswith("--"):
            return f"unexpected argument: {unknown[1]}; {parser.prog} --help lists what it takes"
        sections = {name.split(".")[0] for name in _all_keys(Config) if "." in name}
        return f"no such key: {key}{_nearest(key, [f'--{o}' for o in options if o not in sections])}"
    if missing := re.match(r"the following arguments are required: (.+)", message):
        names = [f"--{name}" if name in options else name.upper() for name in missing[1].split(", ")]
        return f"missing: {', '.join(names)}; {parser.prog} --help explains"
    message = re.sub(
        r"Does not validate .*? Subtypes: \[(.+?)\] Errors: .* Given value: ",
        r"Expected a \1. Got value: ",
        message,
    )
    message = re.sub(r"<class '(.+?)'>", r"\1", message).replace("typing.", "")
    message = message.replace("Expected a ", "expected ").replace(". Got value: ", ", got ")
    if typed := re.match(r'Parser key "([^"]+)": (.+)', message):
        on_command_line = any(argument.split("=")[0] == f"--{typed[1]}" for argument in arguments)
        where = "" if on_command_line or not files else f"{', '.join(files)}: "
        return f"{where}{typed[1]}: {typed[2]}"
    return message
