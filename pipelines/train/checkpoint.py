"""A checkpoint: what training needs to go on exactly, reported to Ray Train by all workers together.

    state.json                  step, steps of the optimizer, what the guard of the loss knows
    trained-*.safetensors       of each trained parameter, in fp32: weight, moments, average; each worker's pieces, flat,
                                as NAME:KEY:START, the place in the parameter at which the piece begins
    model/                      only in a stage's last checkpoint: the model folder

Nothing in it depends on the number of workers, the ZeRO stage or the precision that wrote it. Ray Train registers a
checkpoint when every worker has uploaded its share: before that it isn't there, and `sweep` clears away what never will be.
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
from contextlib import ExitStack
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

from pipelines.storage import is_remote
from pipelines.train.engine import (
    optimizer_steps,
    own_piece,
    refresh,
    set_optimizer_steps,
    set_state,
    state_keys,
    trained,
)

STATE, MODEL = "state.json", "model"
LIST = "checkpoint_manager_snapshot.json"  # Ray Train's, of the checkpoints that it knows
PREFIX = "step_"  # of a checkpoint's folder


def save(
    engine: Any,
    state: dict[str, Any],
    metrics: dict[str, float],
    scratch: Path,
    save_model: Callable[[Path], None] | None = None,
) -> None:
    """Called by all workers at once; returns when this worker's share is on the local disk: the upload goes on beside
    the training, and what fails in it ends the worker.

    scratch: a folder of this worker alone. state: of the loop, with the number of `step`s behind it; comes back from `load`.
    save_model: writes the model folder; called by all workers, and rank 0's is kept.
    """
    # Each worker writes to a folder of its own, as if on its own node; Ray Train puts them together.
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    write(engine, folder, state)
    if save_model:
        save_model(folder / MODEL)
    ray.train.report(
        {"step": state["step"], **metrics},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        # Never the name of one that a killed worker left half uploaded.
        checkpoint_dir_name=f"{PREFIX}{state['step']:06d}_{uuid.uuid4().hex[:8]}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def load(engine: Any) -> dict[str, Any]:
    """Brings the engine to the last checkpoint; returns its state, or that of the start when there is none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {"step": 0}
    with checkpoint.as_directory() as folder:
        return read(engine, Path(folder))


def write(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    """Called by all workers at once; each writes its share into a folder, which may be the same or not."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    share: dict[str, Tensor] = {}
    for name, parameter in trained(engine):
        for key in state_keys(engine):
            start, piece = own_piece(engine, parameter, key)
            if piece.numel():
                share[f"{name}:{key}:{start}"] = piece.cpu().clone()
    path = folder / f"trained-{rank:05d}-of-{workers:05d}.safetensors"
    try:
        save_file(share, path)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):  # what the command line knows how to say
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    if rank == 0:
        text = json.dumps(state | {"optimizer_steps": optimizer_steps(engine)}, indent=2)
        (folder / STATE).write_text(text + "\n")


def read(engine: Any, folder: Path) -> dict[str, Any]:
    """Called by all workers, of any number. Raises RuntimeError unless the names are exactly what the stage trains."""
    with ExitStack() as stack:
        pieces: dict[str, list[tuple[int, Any]]] = defaultdict(list)
        for path in folder.glob("trained-*.safetensors"):
            file = stack.enter_context(safe_open(path, "pt"))
            names = file.keys()  # it is no mapping
            for piece in names:
                whole, start = piece.rsplit(":", 1)
                pieces[whole].append((int(start), file))
        wanted = {f"{name}:{key}" for name, _ in trained(engine) for key in state_keys(engine)}
        if differing := pieces.keys() ^ wanted:
            raise RuntimeError(
                f"checkpoint and model differ in {len(differing)} names, such as {min(differing)}"
            )
        for name, parameter in trained(engine):
            for key in state_keys(engine):
                whole = f"{name}:{key}"
                found = sorted(pieces[whole], key=itemgetter(0))
                value = torch.cat([file.get_tensor(f"{whole}:{start}") for start, file in found])
                set_state(engine, parameter, key, value)
    state = json.loads((folder / STATE).read_text())
    set_optimizer_steps(engine, state["optimizer_steps"])
    refresh(engine)
    return state


def sweep(run: str) -> None:
    """Deletes what a failed upload, or workers that were killed at it, left of checkpoints that never became whole.

    run: path or URI of the run's folder in Ray Train's storage, where nobody is training now.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it tells at length that it found the run
    if not is_remote(run):
        _mend_list(Path(run))
    try:
        known = ray.train.Result.from_path(run)
    except RuntimeError:  # there is nothing yet
        return
    if known.checkpoint is None:
        return
    filesystem, folder = known.checkpoint.filesystem, os.path.dirname(known.checkpoint.path)
    whole = {os.path.basename(checkpoint.path) for checkpoint, _ in known.best_checkpoints}
    for found in filesystem.get_file_info(pafs.FileSelector(folder)):
        if found.base_name.startswith(PREFIX) and found.base_name not in whole:
            filesystem.delete_dir(found.path)


def _mend_list(run: Path) -> None:
    """Ray Train writes its list of checkpoints in place, so that a full disk leaves it empty, and could never start
    again. Then the list is made anew from the checkpoints that are whole, and the others are deleted."""
    path = run / LIST
    try:
        json.loads(path.read_text())
        return
    except (FileNotFoundError, ValueError):
        checkpoints = sorted(run.glob(f"{PREFIX}*"))
    whole = [folder for folder in checkpoints if _is_whole(folder)]
    for folder in set(checkpoints) - set(whole):
        shutil.rmtree(folder)
    path.unlink(missing_ok=True)
    if not whole:
        return
    results = [
        # What it was judged is not in it; the worst, if the best are kept.
        _TrainingResultState(checkpoint_dir_name=folder.name, metrics={"validation_loss": math.inf})
        for folder in whole
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


def _is_whole(folder: Path) -> bool:
    """Whether all workers' files are there to their ends; a stage's last, with the model, is rather made again."""
    shares = list(folder.glob("trained-*.safetensors"))
    try:
        for path in shares:
            with safe_open(path, "pt"):  # compares the file's length with its header
                pass
        last = json.loads((folder / STATE).read_text()).get("model")
    except (OSError, ValueError, SafetensorError):
        return False
    return not last and bool(shares) and len(shares) == int(shares[0].stem.rpartition("-")[2])


class FrozenFingerprint:
    """A hash of every tensor that must not change: frozen parameters (this worker's shard under ZeRO-3) and buffers."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._names, self._hashes = self._hash()

    def _hash(self) -> tuple[list[str], Tensor]:
        named = [(name, p) for name, p in self._module.named_parameters() if not p.requires_grad]
        named += self._module.named_buffers()
        tensors = {name: getattr(tensor, "ds_tensor", tensor).detach() for name, tensor in named}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
        hashes = [torch.hash_tensor(tensor) for tensor in tensors.values()]  # on the device: no copy
        return list(tensors), torch.stack(hashes).cpu()

    def check(self) -> None:
        """Raises RuntimeError, with the name, when one has changed since the start."""
        names, now = self._hash()
        moved = [name for name, a, b in zip(names, now, self._hashes, strict=True) if a != b]
        if moved or names != self._names:
            raise RuntimeError(
                f"{len(moved)} frozen tensors have changed, such as {min(moved or ['their names'])}"
            )


def publish(checkpoint: ray.train.Checkpoint, folder: Path) -> None:
    """The model of a stage's last checkpoint as a folder of its own, which appears when it is whole."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    model = ray.train.Checkpoint(f"{checkpoint.path}/{MODEL}", checkpoint.filesystem)
    with model.as_directory() as source:
        shutil.copytree(source, partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
