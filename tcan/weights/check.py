"""What a file or folder of weights is, and whether it fits: `tcan weights check`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tcan.errors import UserError
from tcan.pose import OpenPose
from tcan.pose.openpose_loading import OPENPOSE_FILE
from tcan.weights.model_folder import MODEL_FILE, check_base, read_model_info, read_parts, untrained_model
from tcan.weights.original import LAYOUTS, build, convert, open_weights, parts_of
from tcan.weights.pretrained import (
    NETWORKS,
    check_together,
    encode_empty_prompt,
    load_part,
    load_pose_detector,
    load_scheduler,
    pretrained_fingerprint,
)


def describe(path: Path) -> str:
    """What it is, in one line, and with how many parameters; all of it was found to fit.

    A file: only names and shapes are read. A folder in diffusers' layout: each part is loaded. A model folder: its
    trained parts, and those of its pretrained that are on this machine.

    Raises:
        UserError: it isn't there, is nothing known, or doesn't fit.
    """
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    if (path / MODEL_FILE).is_file():
        return _model_folder(path)
    if (path / OPENPOSE_FILE).is_file():
        return _file(path / OPENPOSE_FILE)
    return _diffusers_folder(path)


def _file(path: Path) -> str:
    found = []
    for part, weights in parts_of(path, open_weights(path)).items():
        if part == "pose":
            OpenPose.from_pretrained(path)
        else:
            weights = convert(part, f"{part} from {path}", weights, build(part))
        found.append(f"{LAYOUTS[part].title} ({_millions(weights.values())})")
    return f"{', '.join(found)}, in the original layout"


def _diffusers_folder(path: Path) -> str:
    if (path / "config.json").is_file():
        classes = {network.__name__: part for part, network in NETWORKS.items()} | {"BodyPoseNetwork": "pose"}
        try:
            config = json.loads((path / "config.json").read_text())
        except ValueError:
            raise UserError(f"{path / 'config.json'}: is no JSON") from None
        name = config.get("_class_name") or (config.get("architectures") or [None])[0]
        if name not in classes:
            raise UserError(f"{path}: holds {name}, which is no part of TCAN; those are {', '.join(classes)}")
        parts = [classes[name]]
    else:
        parts = [part for part in (*NETWORKS, "pose") if (path / part).is_dir()]
    if not parts:
        raise UserError(
            f"{path}: is no folder of weights (no config.json, none of the subfolders {', '.join(NETWORKS)}, no {MODEL_FILE})"
        )
    return f"{_parts({part: str(path) for part in parts})}, in diffusers' layout"


def _parts(sources: dict[str, str], trained_on: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Loads each part, one at a time, and compares their sizes, and their fingerprints with those of `trained_on`."""
    found, configs, width = [], {}, None
    for part, source in sources.items():
        network: Any = load_pose_detector(source).network if part == "pose" else load_part(part, source)
        found.append(f"{part} ({_millions(network.state_dict().values())})")
        if trained_on and part != "pose":
            given = {"source": source, "fingerprint": pretrained_fingerprint(part, network)}
            check_base("this model", part, trained_on[part], given)
        if part == "text_encoder":
            width = encode_empty_prompt(network).shape[-1]
        elif part != "pose":
            configs[part] = dict(network.config)
    check_together(configs, width)
    return ", ".join(found)


def _model_folder(path: Path) -> str:
    info = read_model_info(path)
    parts = read_parts(path, info, untrained_model(path, info))
    trained = ", ".join(f"{part} ({_millions(weights.values())})" for part, weights in parts.items())
    sources = {part: base["source"] for part, base in info["pretrained"].items()}
    here = {
        part: source
        for part, source in sources.items()
        if part != "scheduler" and (source == "mini" or Path(source).is_absolute())
    }
    elsewhere = {source for part, source in sources.items() if part not in here and part != "scheduler"}
    if Path(sources["scheduler"]).is_absolute():
        load_scheduler(sources["scheduler"])
    text = f"TCAN of stage {info['stage']} at {info['width']} x {info['height']}: {trained}"
    if here:
        text += f"; on pretrained here: {_parts(here, info['pretrained'])}"
    if elsewhere:
        text += f"; on pretrained not looked at: {', '.join(sorted(elsewhere))}"
    return text


def _millions(tensors: Iterable[Tensor]) -> str:
    return f"{sum(tensor.numel() for tensor in tensors) / 1e6:.1f} M"
