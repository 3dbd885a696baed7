"""Strict loading of every network: a missing, unexpected or misshaped weight is an error."""

from collections.abc import Callable
from typing import Any

from torch import nn

from pipelines.doctor.finding import Finding
from pipelines.doctor.subject import Subject
from tcan.pose.onnx import OnnxPose
from tcan.weights import load_part, load_pose_detector, portable_source
from tcan.weights.pretrained import NETWORKS, check_compatible, load_scheduler, pretrained_fingerprint

PARTS = (*NETWORKS, "scheduler", "pose")


def loading(part: str) -> Callable[[Subject], Finding]:
    """The check that loads a part into `Subject.networks`."""

    def load(subject: Subject) -> Finding:
        source = getattr(subject.config.pretrained, part)
        network = _load(part, source)
        count, fingerprint = _describe(part, network)
        subject.networks[part] = network
        subject.info[part] = {"source": portable_source(source)}
        if part in NETWORKS:  # model folders have no fingerprints of the other parts
            subject.info[part]["fingerprint"] = fingerprint
        found = f"{source}: {count}" + (f", fingerprint {fingerprint}" if fingerprint else "")
        return Finding(f"load {part}", "OK", found)

    return load


def _load(part: str, source: str) -> Any:
    if part == "pose":
        return load_pose_detector(source)
    if part == "scheduler":
        return load_scheduler(source)
    return load_part(part, source).requires_grad_(False).eval()


def _describe(part: str, network: Any) -> tuple[str, str]:
    if part == "scheduler":
        return f"{network.config.num_train_timesteps} timesteps, {network.config.prediction_type}", ""
    if isinstance(network, OnnxPose):
        return "ONNX files", network.fingerprint
    fingerprint = network.fingerprint if part == "pose" else pretrained_fingerprint(part, network)
    module: nn.Module = network.network if part == "pose" else network
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters", fingerprint


def compatibility(subject: Subject) -> Finding:
    """The loaded networks have one architecture: widths, layers, channels."""
    encoder = subject.networks.get("text_encoder")
    loaded = [part for part in NETWORKS if part in subject.networks]
    check_compatible(
        {part: dict(subject.networks[part].config) for part in loaded if part != "text_encoder"},
        None if encoder is None else encoder.config.hidden_size,
    )
    return Finding("compatibility", "OK", f"{', '.join(loaded)} have one architecture")
