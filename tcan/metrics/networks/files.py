"""Strict loading of the weights of metric networks from local files."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcan.errors import UserError, first_line
from tcan.impostor import impostor
from tcan.weights.common import check_keys, check_shapes

COUNTERS = ".num_batches_tracked"
"""Suffix of counters of batch normalization. Files of PyTorch before 0.4 lack them, and inference does not use them."""


def load_weights(network: nn.Module, path: Path, expected: str, unused: str = "") -> None:
    """Load a file of weights into a network; all keys and shapes must match.

    Args:
        network: its parameters can be on the meta device, so that their initialization takes no time; float32 afterwards.
        path: a PyTorch file with the weights, or with the weights under the key "state_dict"; the prefix `module.` of
            all keys (`DataParallel`) is removed.
        expected: name of the file that has this layout, for error messages.
        unused: regular expression of keys that are allowed and ignored.

    Raises:
        UserError: the file is not a weights file, or has missing keys, unexpected keys or other shapes.
    """
    where = f"{path}: not {expected}"
    weights = {
        name: tensor
        for name, tensor in _read(path, where).items()
        if not name.endswith(COUNTERS) and not (unused and re.fullmatch(unused, name))
    }
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(COUNTERS)}
    check_keys(where, own.keys() - weights.keys(), weights.keys() - own.keys())
    check_shapes(where, own, weights)
    network.load_state_dict(weights, strict=False, assign=True)  # strict=False: without the counters
    network.float()


def check_file(path: Path, where: str) -> None:
    """Recognize the usual impostors of weights files.

    Raises:
        UserError: the file is a Git LFS pointer or an HTML page.
    """
    if found := impostor(path):
        raise UserError(f"{where}: {found}")


def _read(path: Path, where: str) -> dict[str, Tensor]:
    check_file(path, where)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load can raise any exception on a file that is not a pickle
        raise UserError(f"{where}: unreadable ({first_line(error)}); download it again") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(torch.is_tensor(value) for value in content.values()):
        raise UserError(f"{where}: it does not contain named tensors; download it again")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}
