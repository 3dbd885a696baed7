"""Networks of metrics, loaded strictly from local files. Nothing is downloaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from tcan.metrics.networks.embedding import ImageEmbedding
from tcan.metrics.networks.face import FaceEmbedding
from tcan.metrics.networks.i3d import FVDI3D
from tcan.metrics.networks.inception import FIDInception
from tcan.metrics.networks.lpips import LPIPS
from tcan.metrics.networks.resnet3d import FIDVIDResNet

__all__ = [
    "FVDI3D",
    "LPIPS",
    "METRICS",
    "FIDInception",
    "FIDVIDResNet",
    "FaceEmbedding",
    "ImageEmbedding",
    "Networks",
    "load_networks",
]

METRICS: dict[str, tuple[str, ...]] = {
    "alexnet": ("lpips_alex",),
    "vgg16": ("lpips_vgg", "lpips_vgg_disco"),
    "inception": ("fid",),
    "resnet3d": ("fid_vid",),
    "i3d": ("fvd",),
    "image": ("image_similarity",),
    "face": ("face_similarity",),
}
"""Network -> metrics that need it."""

LOADERS: dict[str, Callable[[Path], nn.Module]] = {
    "alexnet": lambda path: LPIPS("alex", path),
    "vgg16": lambda path: LPIPS("vgg", path),
    "inception": FIDInception,
    "resnet3d": FIDVIDResNet,
    "i3d": FVDI3D,
    "image": ImageEmbedding,
    "face": FaceEmbedding,
}


@dataclass(frozen=True)
class Networks:
    """The loaded networks by name, and why the metrics of the others are unavailable (metric -> reason)."""

    loaded: Mapping[str, nn.Module] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)


def load_networks(
    files: Mapping[str, str | None], device: torch.device | str = "cpu", prefix: str = ""
) -> Networks:
    """Load the networks whose files exist.

    Args:
        files: network (a key of `METRICS`) -> local file or folder; None: not given.
        device: of the loaded networks.
        prefix: of the keys in the reasons, e.g. "evaluate.networks.".

    Raises:
        UserError: a file exists, but is not the file of its network.
    """
    loaded: dict[str, nn.Module] = {}
    unavailable: dict[str, str] = {}
    for name, metrics in METRICS.items():
        file = files.get(name)
        if file is None:
            unavailable |= dict.fromkeys(metrics, f"{prefix}{name} is not set")
        elif not Path(file).exists():
            unavailable |= dict.fromkeys(metrics, f"{prefix}{name} = {file}: no such file or folder")
        else:
            loaded[name] = LOADERS[name](Path(file)).to(device)
    return Networks(loaded, unavailable)
