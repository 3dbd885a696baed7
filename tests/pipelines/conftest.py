"""A model folder on random bases, for jobs that need one rather than a good one."""

from pathlib import Path

import pytest
import torch

from tcan.model import TCAN
from tcan.weights import load_bases, save_model

PARTS = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")


@pytest.fixture(scope="session")
def model_folder(bases_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 64 x 64 pixels, nothing in it at its zero initialisation. It names no pose network: mini's is taken."""
    bases = load_bases(**dict.fromkeys(PARTS, str(bases_folder)))
    torch.manual_seed(0)
    tcan = TCAN(bases.unet, bases.controlnet, bases.motion_adapter, bases.empty_prompt)
    for part in tcan.parts().values():
        for tensor in part.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.02)
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(tcan, folder, bases=bases.info, stage=2, height=64, width=64, stick_width=2)
    return folder
