"""A checkpoint: what training needs to go on exactly, reported to Ray Train by all workers together.

    engine/       DeepSpeed's: trained parameters, optimizer state (each worker its shard), step
    model/        only in a stage's last checkpoint: the model folder

Ray Train registers a checkpoint when every worker has uploaded its share: before that it isn't there.
"""

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch import Tensor, nn

ENGINE, MODEL = "engine", "model"


def save(
    engine: Any, step: int, metrics: dict[str, float], save_model: Callable[[Path], None] | None = None
) -> None:
    """Called by all workers at once, after `step` steps; returns when the checkpoint is registered.

    engine: DeepSpeed's. save_model: writes the model folder; called by all workers, and rank 0's is kept.
    """
    # Each worker writes to a folder of its own, as if on its own node; Ray Train puts them together.
    folder = Path(tempfile.mkdtemp(prefix="tcan-checkpoint-"))
    engine.save_checkpoint(folder, ENGINE, {"step": step}, save_latest=False, exclude_frozen_parameters=True)
    if save_model:
        save_model(folder / MODEL)
    ray.train.report(
        {"step": step, **metrics},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        # Never the name of one that a killed worker left half uploaded.
        checkpoint_dir_name=f"step_{step:06d}_{uuid.uuid4().hex[:8]}",
        delete_local_checkpoint_after_upload=True,
    )


def load(engine: Any) -> int:
    """Brings the engine to the last checkpoint, if there is one; returns how many steps it has behind it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        _, state = engine.load_checkpoint(folder, ENGINE, custom_load_fn=_load_trained)
    return state["step"]


def _load_trained(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    """The frozen parameters, and only they, come from the bases rather than from the checkpoint."""
    frozen = {name for name, parameter in dst.named_parameters() if not parameter.requires_grad}
    result = dst.load_state_dict(src, strict=False)
    if result.unexpected_keys or set(result.missing_keys) != frozen:
        differing = set(result.missing_keys) ^ frozen | set(result.unexpected_keys)
        raise RuntimeError(f"checkpoint and model differ in {len(differing)} names, such as {min(differing)}")


def frozen_fingerprint(module: nn.Module) -> str:
    """16 hex digits of all that must not change: frozen parameters (this worker's shard under ZeRO-3) and buffers."""
    digest = hashlib.sha256()
    tensors = [(name, p) for name, p in module.named_parameters() if not p.requires_grad] + [
        *module.named_buffers()
    ]
    for name, tensor in tensors:
        values = getattr(tensor, "ds_tensor", tensor).detach().cpu().contiguous()
        digest.update(name.encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def publish(checkpoint: ray.train.Checkpoint, folder: Path) -> None:
    """The model of a stage's last checkpoint as a folder of its own, which appears when it is whole."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with checkpoint.as_directory() as source:
        shutil.copytree(Path(source) / MODEL, partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
