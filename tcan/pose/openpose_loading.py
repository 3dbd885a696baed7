"""Weights of OpenPose's networks: locate or download the files, and load them into the networks of controlnet_aux."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from tcan.errors import UserError, first_line
from tcan.weights_file import open_weights

OPENPOSE_FILE = "body_pose_model.pth"
HAND_FILE = "hand_pose_model.pth"
FACE_FILE = "facenet.pth"


def find_openpose_file(source: str | Path, name: str) -> Path:
    """Path of one of OpenPose's files in a folder or in a Hugging Face Hub repository (`owner/name[@revision]`).

    A folder can contain it as .safetensors, too.

    Raises:
        UserError: the folder lacks the file, or the download failed.
    """
    if not Path(source).is_dir():
        return _download(str(source), name)
    path = Path(source) / name
    if not path.is_file() and (converted := path.with_suffix(".safetensors")).is_file():
        return converted
    if not path.is_file():
        missing = f"neither config.json nor {name}" if name == OPENPOSE_FILE else f"no {name}"
        raise UserError(
            f"pose network {source}: {missing} in this folder; add the file or give another folder"
        )
    return path


def _download(source: str, name: str) -> Path:
    try:
        repository, _, revision = source.partition("@")
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"pose network {source}: no such file or folder, and the download from the Hugging Face Hub failed "
            f"({first_line(error)}); check the name and the connection"
        ) from error


def load_openpose_network(network: nn.Module, path: Path, name: str, *, in_blocks: bool) -> nn.Module:
    """Load one of OpenPose's weights files into the matching network of controlnet_aux.

    Args:
        network: modified in place and returned.
        path: the weights file, in any form of `open_weights`.
        name: OpenPose's name of that file, for error messages.
        in_blocks: the network's parameter names start with a block name that the file's keys lack.

    Raises:
        UserError: the file is not readable, or its keys or shapes do not match the network.
    """
    try:
        weights = open_weights(path)
    except UserError as error:
        raise UserError(f"pose network {error}") from None
    names = {key.split(".", 1)[1] if in_blocks else key: key for key in network.state_dict()}
    if weights.keys() != names.keys():
        missing, unexpected = sorted(names.keys() - weights.keys()), sorted(weights.keys() - names.keys())
        raise UserError(
            f"pose network {path}: not OpenPose's {name}: {len(missing)} keys missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}; give the original file"
        )
    try:
        network.load_state_dict({names[key]: value for key, value in weights.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"pose network {path}: shapes do not match OpenPose's {name} ({reason}); give the original file"
        ) from error
    return network


def open_pose_module(name: str) -> Any:
    """Import `controlnet_aux.open_pose.{name}` without its parent packages, whose import takes 10 s and prints warnings.

    Raises:
        UserError: the package controlnet-aux is not installed.
    """
    package = "controlnet_aux_open_pose"
    if package not in sys.modules:
        parent = importlib.util.find_spec("controlnet_aux")
        if parent is None or parent.submodule_search_locations is None:
            raise UserError(
                "OpenPose's networks: package controlnet-aux is missing; run pip install controlnet-aux"
            )
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(Path(parent.submodule_search_locations[0]) / "open_pose")]
    return importlib.import_module(f"{package}.{name}")
