"""Loaders of the components of a model folder for `DiffusionPipeline.from_pretrained`; `model_index.json` names them.

The folder's `pipeline.py` imports this module, because diffusers imports no other module that a model folder names.
diffusers calls `from_pretrained` of each class with the model folder and `torch_dtype`. The base classes decide which
method it calls, so their names must exist in this module.
"""

import os
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin

from tcan.model import TCAN
from tcan.pose import PoseDetector
from tcan.schedule import noise_schedule
from tcan.weights.common import quiet
from tcan.weights.model_folder import check_fingerprint, load_model, read_model_info
from tcan.weights.pretrained import (
    load_part,
    load_pose_detector,
    load_pretrained,
    load_scheduler,
    pretrained_fingerprint,
)

Folder = str | os.PathLike


class Vae(ModelMixin):
    """Loader of the VAE."""

    @classmethod
    def from_pretrained(
        cls, folder: Folder, torch_dtype: torch.dtype | None = None, variant: str | None = None, **unused: Any
    ) -> AutoencoderKL:
        """Load the VAE that the model was trained on."""
        entry = read_model_info(folder)["pretrained"]["vae"]
        vae = load_part("vae", entry["source"], variant)
        actual = {"source": entry["source"], "fingerprint": pretrained_fingerprint("vae", vae)}
        check_fingerprint(os.fspath(folder), "vae", entry, actual)
        with quiet():
            return vae.to(dtype=torch_dtype or torch.float32).requires_grad_(False).eval()


class Tcan(ModelMixin):
    """Loader of TCAN."""

    @classmethod
    def from_pretrained(
        cls, folder: Folder, torch_dtype: torch.dtype | None = None, variant: str | None = None, **unused: Any
    ) -> TCAN:
        """Load the trained parts and the pretrained models that they need."""
        models = read_model_info(folder)["pretrained"]
        sources = {part: model["source"] for part, model in models.items() if part != "pose"}
        return load_model(
            folder, load_pretrained(**sources, variant=variant, dtype=torch_dtype or torch.float32)
        )


class Scheduler(SchedulerMixin):
    """Loader of the noise schedule."""

    @classmethod
    def from_pretrained(cls, folder: Folder, **unused: Any) -> Any:
        """Load the schedule with the options of the training."""
        info = read_model_info(folder)
        return noise_schedule(
            load_scheduler(info["pretrained"]["scheduler"]["source"]), **info.get("schedule", {})
        )


class Pose(ModelMixin):
    """Loader of the pose network."""

    @classmethod
    def from_pretrained(cls, folder: Folder, **unused: Any) -> PoseDetector:
        """Load the pose network that the model folder names, with the parts that the model draws."""
        info = read_model_info(folder)
        return load_pose_detector(info["pretrained"]["pose"]["source"], **info.get("draw", {}))
