"""Variant of the architecture: the paper's, or one of its ablations."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Variant:
    """Which parts a model has and trains; the defaults are the paper's. Saved in the model folder as "variant"."""

    appa: bool = True
    """Whether the spatial attentions of the denoiser have APPA."""
    controlnet: Literal["frozen", "finetune"] = "frozen"
    """finetune: stage 1 also trains the ControlNet, and the model folder contains its weights."""
    temporal_controlnet: bool = True
    """Whether the ControlNet has temporal layers."""

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


PAPER = Variant()
