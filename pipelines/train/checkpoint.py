"""Checkpoints: the exact state to resume a training from, reported to Ray Train by all workers together.

    state.json                  step, optimizer steps, running mean of the loss
    trained-*.safetensors       fp32 weight, moments and EMA of each trained parameter: the flat shards of one worker,
                                named NAME:KEY:START, with START the offset of the shard in the parameter
    model/                      only in the last checkpoint of a stage: the model folder

A checkpoint does not depend on the number of workers, the ZeRO stage or the precision that wrote it. Ray Train registers
it when every worker has uploaded its shards; `remove_incomplete` deletes checkpoints that were never registered.
"""

import errno
import json
import logging
import math
import os
import shutil
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray.train
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines import storage
from pipelines.staging import local_output
from pipelines.train.engine import (
    copy_to_module,
    local_shard,
    optimizer_steps,
    set_optimizer_steps,
    set_state,
    state_keys,
    trained_parameters,
)
from tcan.atomic_write import atomic_write

STATE, MODEL = "state.json", "model"
CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"  # Ray Train's list of registered checkpoints
PREFIX = "step_"  # of the checkpoint folders


def save(
    engine: Any,
    state: dict[str, Any],
    metrics: dict[str, float],
    scratch: Path,
    save_model: Callable[[Path], None] | None = None,
) -> None:
    """Save and report a checkpoint. Called by all workers; returns when this worker's shards are on the local disk.

    The upload continues during the training; an error in it ends the worker.

    Args:
        state: state of the training loop, with the number of steps as `step`; `load` returns it.
        scratch: local folder of this worker.
        save_model: writes the model folder; called by all workers, rank 0's is uploaded.
    """
    # Each worker writes to its own folder, as if on its own node; Ray Train merges them.
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    write(engine, folder, state)
    if save_model:
        save_model(folder / MODEL)
    ray.train.report(
        {"step": state["step"], **metrics},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        # Unique, so that it never merges with a partial upload of a killed worker.
        checkpoint_dir_name=f"{PREFIX}{state['step']:06d}_{uuid.uuid4().hex[:8]}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def load(engine: Any) -> dict[str, Any]:
    """Load the last checkpoint into the engine; returns its state, or {"step": 0} without one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {"step": 0}
    if isinstance(checkpoint.filesystem, pafs.LocalFileSystem):
        return read(engine, Path(checkpoint.path))
    # A folder for each worker: `Checkpoint.as_directory` may download again into files that another worker of this machine has
    # mapped into memory, which is then killed by SIGBUS.
    with tempfile.TemporaryDirectory() as folder:
        return read(engine, Path(checkpoint.to_directory(folder)))


def write(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write this worker's shards. Called by all workers; their folders may be the same or different ones."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    shards: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(engine):
        for key in state_keys(engine):
            start, shard = local_shard(engine, parameter, key)
            if shard.numel():
                shards[f"{name}:{key}:{start}"] = shard.cpu().clone()
    path = folder / f"trained-{rank:05d}-of-{workers:05d}.safetensors"
    try:
        save_file(shards, path)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):  # which the command line reports as a user error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    if rank == 0:
        text = json.dumps(state | {"optimizer_steps": optimizer_steps(engine)}, indent=2)
        (folder / STATE).write_text(text + "\n")


def read(engine: Any, folder: Path) -> dict[str, Any]:
    """Load a checkpoint into the engine; returns its state. Called by all workers; their number may differ from the writer's.

    Raises:
        RuntimeError: the parameter names are not exactly those that the stage trains.
    """
    with ExitStack() as stack:
        shards: dict[str, list[tuple[int, Any]]] = defaultdict(list)
        for path in folder.glob("trained-*.safetensors"):
            file = stack.enter_context(safe_open(path, "pt"))
            names = file.keys()  # safe_open is not iterable
            for shard in names:
                name, start = shard.rsplit(":", 1)
                shards[name].append((int(start), file))
        expected = {f"{name}:{key}" for name, _ in trained_parameters(engine) for key in state_keys(engine)}
        if differing := shards.keys() ^ expected:
            raise RuntimeError(
                f"checkpoint and model differ in {len(differing)} names, such as {min(differing)}"
            )
        for name, parameter in trained_parameters(engine):
            for key in state_keys(engine):
                full_name = f"{name}:{key}"
                ordered = sorted(shards[full_name], key=itemgetter(0))
                value = torch.cat([file.get_tensor(f"{full_name}:{start}") for start, file in ordered])
                set_state(engine, parameter, key, value)
    state = json.loads((folder / STATE).read_text())
    set_optimizer_steps(engine, state["optimizer_steps"])
    copy_to_module(engine)
    return state


def remove_incomplete(run: str) -> None:
    """Delete checkpoints that were not completely uploaded, because the upload failed or workers were killed.

    run: path or URI of the run's folder in Ray Train's storage; no training may be running there.
    """
    logging.getLogger("ray.train").setLevel(
        logging.WARNING
    )  # otherwise it logs at length that it found the run
    run = storage.absolute(run)
    if not storage.is_remote(run):
        _repair_checkpoint_list(Path(run))
    complete = set()
    if storage.exists(f"{run}/{CHECKPOINT_LIST}"):
        known = ray.train.Result.from_path(run)
        complete = {os.path.basename(checkpoint.path) for checkpoint, _ in known.best_checkpoints}
    filesystem, folder = storage.locate(run)
    # Recursive, because Google Cloud Storage lists no folders.
    selector = pafs.FileSelector(folder, allow_not_found=True, recursive=True)
    names = {item.path[len(folder) + 1 :].partition("/")[0] for item in filesystem.get_file_info(selector)}
    for name in sorted(names - complete):
        if name.startswith(PREFIX):
            with suppress(FileNotFoundError):  # raised there after the deletion of the files in a folder
                filesystem.delete_dir(f"{folder}/{name}")


def _repair_checkpoint_list(run: Path) -> None:
    """Rebuild Ray Train's list of checkpoints if a full disk has left it empty, and delete incomplete checkpoints.

    Ray Train overwrites the list in place and cannot restart with an empty one.
    """
    path = run / CHECKPOINT_LIST
    try:
        json.loads(path.read_text())
        return
    except (FileNotFoundError, ValueError):
        checkpoints = sorted(run.glob(f"{PREFIX}*"))
    complete = [folder for folder in checkpoints if _is_complete(folder)]
    for folder in set(checkpoints) - set(complete):
        shutil.rmtree(folder)
    path.unlink(missing_ok=True)
    if not complete:
        return
    results = [
        # Its validation loss is unknown: it ranks last if the best checkpoints are kept.
        _TrainingResultState(checkpoint_dir_name=folder.name, metrics={"validation_loss": math.inf})
        for folder in complete
    ]
    state = _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(results))),
        latest_checkpoint_result=results[-1],
        current_report_index=len(results),
        pending_training_results=[],
        pending_validation_specs=[],
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    path.write_text(state.json())


def _is_complete(folder: Path) -> bool:
    """Whether the files of all workers are complete. The last checkpoint of a stage, with the model, is recomputed."""
    files = list(folder.glob("trained-*.safetensors"))
    try:
        for path in files:
            with safe_open(path, "pt"):  # compares the file size with its header
                pass
        last = json.loads((folder / STATE).read_text()).get("model")
    except (OSError, ValueError, SafetensorError):
        return False
    return not last and bool(files) and len(files) == int(files[0].stem.rpartition("-")[2])


class FrozenFingerprint:
    """Hashes of every tensor that must not change: frozen parameters (the local shard under ZeRO-3) and buffers."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._names, self._hashes = self._hash()

    def _hash(self) -> tuple[list[str], Tensor]:
        named = [(name, p) for name, p in self._module.named_parameters() if not p.requires_grad]
        named += self._module.named_buffers()
        tensors = {name: getattr(tensor, "ds_tensor", tensor).detach() for name, tensor in named}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
        hashes = [
            torch.hash_tensor(tensor) for tensor in tensors.values()
        ]  # on the device, without copying the tensors
        return list(tensors), torch.stack(hashes).cpu()

    def check(self) -> None:
        """Raises:
        RuntimeError: a tensor has changed since the start, with its name.
        """
        names, now = self._hash()
        changed = [name for name, a, b in zip(names, now, self._hashes, strict=True) if a != b]
        if changed or names != self._names:
            raise RuntimeError(
                f"{len(changed)} frozen tensors have changed, such as {min(changed or ['their names'])}"
            )


def publish(checkpoint: ray.train.Checkpoint, folder: str) -> None:
    """Copy the model of a stage's last checkpoint to a model folder, local (atomically) or in a bucket (tcan.json last)."""
    model = ray.train.Checkpoint(f"{checkpoint.path}/{MODEL}", checkpoint.filesystem)
    with model.as_directory() as source, local_output(folder) as local, atomic_write(local) as partial:
        shutil.copytree(source, partial)
