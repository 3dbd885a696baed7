"""Files of weights: safetensors and PyTorch pickles."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tcan.errors import UserError, first_line
from tcan.impostor import impostor

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of all keys that `DataParallel` and `torch.compile` add."""


def open_weights(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a safetensors file or a PyTorch pickle on the CPU, by name without `WRAPPERS`.

    The format is recognized by the content: files are renamed, and blobs of the Hub's cache have no suffix. Pickles in
    PyTorch's format before 1.6, which is not a zip file, are read into memory.

    Raises:
        UserError: the file does not exist, is not a weights file, or is a pickle that contains code.
    """
    if found := impostor(path):
        raise UserError(f"{path}: {found}")
    try:
        with (
            path.open("rb") as file,
            torch.serialization.safe_globals([(_Inert, name) for name in _INERT]),
        ):
            # A safetensors file begins with the size of its header in 8 bytes, then the header, which is JSON.
            if file.read(9)[8:] == b"{":
                return _unwrap(load_file(path))
            file.seek(0)
            # torch.load chooses the format of a path by its suffix, and maps only paths.
            mmap = path.suffix != ".safetensors" and zipfile.is_zipfile(path)
            content = torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except pickle.UnpicklingError as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: contains {foreign[1]}, which could execute code; provide the weights as .safetensors"
            ) from None
        raise UserError(
            f"{path}: not a weights file (neither safetensors nor a PyTorch pickle); provide another file"
        ) from None
    except Exception as error:  # torch.load can raise any exception on a file that is not a pickle
        raise UserError(
            f"{path}: not a weights file, or incomplete ({first_line(error)}); copy or download it again"
        ) from None
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # trainers save their state next to it
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{path}: not a weights file: contains values other than tensors; provide another file"
        )
    return _unwrap(content)


def _unwrap(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    while weights and (found := [w for w in WRAPPERS if all(name.startswith(w) for name in weights)]):
        weights = {name.removeprefix(found[0]): tensor for name, tensor in weights.items()}
    return weights


class _Inert:
    """Replaces the other objects in old Lightning checkpoints when they are unpickled; ignores all arguments and state."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
)
