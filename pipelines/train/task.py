"""The task of a training stage, which the driver sends to every worker."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pipelines.config import Config, StageConfig, TrainConfig
from tcan.crop import Size
from tcan.variant import Variant


@dataclass(frozen=True)
class Task:
    config: Config
    stage: int
    """1 or 2."""
    dataset: str
    buckets: list[Size] | None
    """Sizes of the dataset's clips and of the training images; None: squares of `config.size`."""
    vae_scaling_factor: float
    from_model: str | None
    """Model folder to start from, a path or URI that is valid on every machine; None: the pretrained models."""
    run_id: str
    """Of the MLflow run."""
    deepspeed: dict[str, Any]
    """The user's DeepSpeed settings (`train.deepspeed`)."""
    monitor: Any
    """Handle of the run's `RunMonitor` actor."""
    mailbox: Any
    """Handle of the run's `Mailbox` actor."""
    show_bar: bool
    """Whether the driver shows a progress bar; if not, rank 0 prints progress lines."""
    model_info: dict[str, Any]
    """Additional entries of the model folder's tcan.json."""

    @property
    def stage_config(self) -> StageConfig:
        return stage_config(self.config, self.stage)

    @property
    def largest_size(self) -> Size:
        """Of the training images."""
        sizes = self.buckets or [(self.config.size, self.config.size)]
        return max(sizes, key=lambda size: size[0] * size[1])

    @property
    def micro_batch(self) -> int:
        """A number: "auto" is replaced when a worker starts (`pipelines.train.micro_batch`)."""
        assert self.stage_config.micro_batch != "auto"
        return self.stage_config.micro_batch


def stage_config(config: Config, stage: int) -> StageConfig:
    return config.train.stage1 if stage == 1 else config.train.stage2


def pretrained_sources(config: Config) -> dict[str, str]:
    """Arguments of `tcan.weights.load_pretrained`; training needs no pose network."""
    sources = dataclasses.asdict(config.pretrained)
    del sources["pose"]
    return sources


def variant(config: TrainConfig) -> Variant:
    return Variant(config.appa, config.controlnet, config.temporal_controlnet)


def schedule_options(config: TrainConfig) -> dict[str, Any]:
    """Arguments of `tcan.schedule.noise_schedule`, stored in the model folder as "schedule"."""
    return {"prediction_type": config.prediction_type, "zero_terminal_snr": config.zero_terminal_snr}
