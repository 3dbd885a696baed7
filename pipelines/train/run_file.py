"""`run.json` in the folder of a stage: MLflow run id, number of finished steps, and the settings that must not change when
the run resumes."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.config import Config, DrawConfig, StageConfig, TrainConfig
from pipelines.dataset import INFO_FILE
from tcan.errors import UserError

RUN_FILE = "run.json"
# Keys that may change when a run is resumed: they change its results by no more than rounding.
RESUME_MAY_CHANGE = {
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "zero_stage",
    "deepspeed",
    "compile",
    "gradient_checkpointing",
    "min_workers",
    "max_failures",
    "num_checkpoints",
    "keep_checkpoints",
    "validation_samples",
    "on_bad_loss",
    "loss_spike_factor",
    "hang_timeout",
    "log_every",
    "profile_steps",
    "data_processes",
    "clip_cache_mb",
    "cache_disk_gb",
}
STAGE_RESUME_MAY_CHANGE = {"steps", "micro_batch", "checkpoint_every", "sample_every", "validate_every"}


def run_settings(stage: int, dataset: str, start: Path | None, config: Config) -> dict[str, Any]:
    """All settings that determine the results of a run."""
    files = sorted(start.rglob("*.safetensors")) if start else []
    start_digest = _digest(file.read_bytes() for file in files) if start else None
    return {
        "seed": config.seed,
        "size": config.size,
        "dataset": _digest([storage.read_bytes(f"{dataset}/{INFO_FILE}")]),
        "from": start_digest,
        **{f"draw.{part}": is_drawn for part, is_drawn in dataclasses.asdict(config.draw).items()},
        **settings_of_config(config, stage),
    }


def settings_of_config(config: Config, stage: int) -> dict[str, Any]:
    values = dataclasses.asdict(config.train)
    relevant = {
        key: value for key, value in values.items() if key not in RESUME_MAY_CHANGE | {"stage1", "stage2"}
    }
    return relevant | {
        key: value for key, value in values[f"stage{stage}"].items() if key not in STAGE_RESUME_MAY_CHANGE
    }


def _digest(files: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for content in files:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def check_same_settings(folder: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Compare the settings of a run with those of its start.

    A field that was added after the start has no value there: the run was started with the behaviour of its default.
    """
    defaults = {
        f"{prefix}{field.name}": field.default
        for prefix, config in (("", TrainConfig), ("", StageConfig), ("draw.", DrawConfig))
        for field in dataclasses.fields(config)
    }
    for key in new:
        started = old.get(key, defaults.get(key))
        if started != new[key]:
            raise UserError(
                f"{folder}: this run was started with {key} = {started}, not {new[key]}; set the same value, or use "
                "another OUT"
            )


def read_run(folder: str) -> dict[str, Any] | None:
    """Read `run.json` of a local folder or a folder in a bucket; None if there is none.

    Raises:
        UserError: it cannot be read, or is not a file of `tcan train`.
    """
    path = f"{folder}/{RUN_FILE}"
    try:
        run = json.loads(storage.read_bytes(path))
        is_valid = isinstance(run["settings"], dict) and isinstance(run["finished_steps"], int)
        is_valid = is_valid and isinstance(run["mlflow_run_id"], str)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise UserError(
            f"{path}: cannot be read, or is not a file of tcan train; restore it or use another OUT"
        )
    return run


def write_run(folder: str, run: dict[str, Any]) -> None:
    if not storage.is_remote(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    storage.write(f"{folder}/{RUN_FILE}", json.dumps(run, indent=2).encode() + b"\n")
