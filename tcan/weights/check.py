"""Identify and validate a file or folder of weights; implements `tcan weights check`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tcan.errors import UserError
from tcan.pose import OpenPose
from tcan.pose.onnx import OnnxPose, describe_onnx
from tcan.pose.openpose_loading import (
    FACE_FILE,
    HAND_FILE,
    OPENPOSE_FILE,
    load_openpose_network,
    open_pose_module,
)
from tcan.weights.model_folder import (
    MODEL_FILE,
    check_fingerprint,
    read_model_info,
    read_parts,
    untrained_model,
)
from tcan.weights.original import (
    TITLES,
    build,
    check_positions,
    convert,
    num_positions,
    split_parts,
)
from tcan.weights.pretrained import (
    NETWORKS,
    check_compatible,
    encode_empty_prompt,
    load_part,
    load_pose_detector,
    load_scheduler,
    pretrained_fingerprint,
)
from tcan.weights_file import open_weights

OPENPOSE_NETWORKS = {
    "hands": (HAND_FILE, "model", "handpose_model", True),
    "face": (FACE_FILE, "face", "FaceNet", False),
}
"""File name, module and class in controlnet_aux, and whether parameter names start with a block name."""


def describe(path: Path) -> str:
    """Return one line with the kind of the weights and the number of parameters of each part, after validating them.

    Of a single file, only names and shapes are validated. Of a folder in diffusers' layout, each part is loaded. Of a
    model folder, the trained parts are loaded, and those pretrained models that are local.

    Raises:
        UserError: the path does not exist, its format is unknown, or its weights do not match the architecture.
    """
    if path.is_file():
        return _describe_file(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; check the path")
    if (path / MODEL_FILE).is_file():
        return _describe_model_folder(path)
    if OnnxPose.is_in(path):
        return f"pose detector in ONNX files, fingerprint {OnnxPose.from_folder(path).fingerprint}"
    names = [Path(name) for name in (OPENPOSE_FILE, HAND_FILE, FACE_FILE)]
    files = [path / file for name in names for file in (name, name.with_suffix(".safetensors"))]
    if found := [file for file in files if file.is_file()]:
        return "; ".join(map(_describe_file, found))
    return _describe_diffusers_folder(path)


def _describe_file(path: Path) -> str:
    if path.suffix == ".onnx":
        return describe_onnx(path)
    descriptions, problem = [], ""
    parts = split_parts(path, open_weights(path))
    for part, weights in parts.items():
        text = f"{TITLES[part]} ({_millions(weights.values())})"
        if part == "pose":
            OpenPose.from_pretrained(path)
        elif part in OPENPOSE_NETWORKS:
            name, module, network, in_blocks = OPENPOSE_NETWORKS[part]
            load_openpose_network(
                getattr(open_pose_module(module), network)(), path, name, in_blocks=in_blocks
            )
        else:
            try:
                weights = convert(part, f"{part} from {path}", weights, build(part, weights))
            except UserError as error:
                if part != "text_encoder" or len(parts) == 1:
                    raise
                problem = f"; the text encoder is not usable: {error}"  # merges; the other parts are
                continue
            text = f"{TITLES[part]} ({_millions(weights.values())})"
        if part == "motion_adapter":
            check_positions(f"{part} from {path}", parts[part])
            text = f"{text[:-1]}, up to {num_positions(parts[part])} frames)"
        descriptions.append(text)
    return f"{', '.join(descriptions)}, as a single file{problem}"


def _describe_diffusers_folder(path: Path) -> str:
    if (path / "config.json").is_file():
        classes = {network.__name__: part for part, network in NETWORKS.items()} | {"BodyPoseNetwork": "pose"}
        try:
            config = json.loads((path / "config.json").read_text())
        except ValueError:
            raise UserError(f"{path / 'config.json'}: invalid JSON; replace the file") from None
        name = config.get("_class_name") or (config.get("architectures") or [None])[0]
        if name not in classes:
            raise UserError(
                f"{path}: contains {name}, which TCAN does not use; provide one of {', '.join(classes)}"
            )
        parts = [classes[name]]
    else:
        parts = [part for part in (*NETWORKS, "pose") if (path / part).is_dir()]
    if not parts:
        raise UserError(
            f"{path}: contains no weights; provide a folder with config.json, {MODEL_FILE} or one of the subfolders "
            f"{', '.join(NETWORKS)}"
        )
    return f"{_describe_parts({part: str(path) for part in parts})}, in diffusers' layout"


def _describe_parts(
    sources: dict[str, str], trained_on: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """Load the parts one at a time, check that they are compatible, and compare fingerprints with `trained_on`."""
    descriptions, configs, prompt_width = [], {}, None
    for part, source in sources.items():
        network: Any = load_pose_detector(source) if part == "pose" else load_part(part, source)
        if isinstance(network, OnnxPose):
            descriptions.append("pose (ONNX)")
            continue
        network = network.network if part == "pose" else network
        limit = f", up to {network.config.motion_max_seq_length} frames" if part == "motion_adapter" else ""
        descriptions.append(f"{part} ({_millions(network.state_dict().values())}{limit})")
        if trained_on and part != "pose":
            actual = {"source": source, "fingerprint": pretrained_fingerprint(part, network)}
            check_fingerprint("this model", part, trained_on[part], actual)
        if part == "text_encoder":
            prompt_width = encode_empty_prompt(network).shape[-1]
        elif part != "pose":
            configs[part] = dict(network.config)
    check_compatible(configs, prompt_width)
    return ", ".join(descriptions)


def _describe_model_folder(path: Path) -> str:
    info = read_model_info(path)
    parts = read_parts(path, info, untrained_model(path, info))
    trained = ", ".join(f"{part} ({_millions(weights.values())})" for part, weights in parts.items())
    sources = {part: model["source"] for part, model in info["pretrained"].items()}
    local = {
        part: source
        for part, source in sources.items()
        if part != "scheduler" and (source == "mini" or Path(source).is_absolute())
    }
    remote = {source for part, source in sources.items() if part not in local and part != "scheduler"}
    if Path(sources["scheduler"]).is_absolute():
        load_scheduler(sources["scheduler"])
    text = f"TCAN of stage {info['stage']} at {info['width']} x {info['height']}: {trained}"
    if local:
        text += f"; local pretrained models: {_describe_parts(local, info['pretrained'])}"
    if remote:
        text += f"; pretrained models not checked: {', '.join(sorted(remote))}"
    return text


def _millions(tensors: Iterable[Tensor]) -> str:
    return f"{sum(tensor.numel() for tensor in tensors) / 1e6:.1f} M"
