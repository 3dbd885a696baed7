"""The folder of a trained model: saved, read, and put on the bases that it was trained on."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tcan import __version__
from tcan.appa import save_appa
from tcan.errors import UserError
from tcan.model import TCAN
from tcan.weights.bases import Bases
from tcan.weights.common import check_keys, check_shapes, first_line

MODEL_FILE = "tcan.json"
MODEL_PARTS = {
    "appearance_unet": "appearance_unet/diffusion_pytorch_model.safetensors",
    "appa": "appa/pytorch_lora_weights.safetensors",
    "motion_adapter": "motion_adapter/diffusion_pytorch_model.safetensors",
    "temporal_controlnet": "temporal_controlnet/diffusion_pytorch_model.safetensors",
}
SCHEMA_VERSION = 1


def save_model(
    tcan: TCAN,
    folder: str | os.PathLike,
    *,
    bases: Mapping[str, Mapping[str, str]],
    stage: int,
    height: int,
    width: int,
    stick_width: int,
    **more: Any,
) -> None:
    """Writes what was trained, and the names and fingerprints of what it was trained on; nothing of the bases.

        tcan.json              bases, stage, lora_rank, lora_alpha, height, width, stick_width, library_version
        appearance_unet/       a diffusers UNet without what follows its last feature
        appa/                  a LoRA that any diffusers pipeline of the base can load
        motion_adapter/        a diffusers MotionAdapter                                (from stage 2 on)
        temporal_controlnet/   the ControlNet's temporal layers                         (from stage 2 on)

    The folder appears, or replaces the one of its name, when it is whole.

    Args:
        bases: `Bases.info`, and "pose" with the "source" of the pose network if animation is to find poses by itself.
        height, width: of the pictures it was trained on, in pixels.
        stick_width: of the pose pictures it was trained on, in pixels.
        more: kept in tcan.json, such as mlflow_run_id.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    lora = tcan.denoiser.peft_config["default"]
    info = {
        "schema_version": SCHEMA_VERSION,
        "library_version": __version__,
        "bases": {part: dict(base) for part, base in bases.items()},
        "stage": stage,
        "lora_rank": lora.r,
        "lora_alpha": lora.lora_alpha,
        "height": height,
        "width": width,
        "stick_width": stick_width,
        **more,
    }
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
    try:
        partial.mkdir(parents=True)
        tcan.appearance_unet.save_pretrained(partial / "appearance_unet")
        save_appa(tcan.denoiser, partial / "appa")
        if stage == 2:
            tcan.motion_adapter().save_pretrained(partial / "motion_adapter")
            (partial / "temporal_controlnet").mkdir()
            temporal = {
                name: tensor.contiguous() for name, tensor in tcan.parts()["temporal_controlnet"].items()
            }
            save_file(temporal, partial / MODEL_PARTS["temporal_controlnet"])
        (partial / MODEL_FILE).write_text(json.dumps(info, indent=2) + "\n")
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot write the model ({first_line(error)}); check the folder and the disk"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def read_model_info(folder: str | os.PathLike) -> dict[str, Any]:
    """What tcan.json says.

    Raises:
        UserError: the folder is missing or no model folder, or of another version.
    """
    file = Path(folder) / MODEL_FILE
    try:
        info = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{folder}: no model folder (no readable {MODEL_FILE} in it); give what tcan train wrote"
        ) from None
    if info.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{file}: schema version {info.get('schema_version')}, this library reads {SCHEMA_VERSION}"
        )
    return info


def load_model(folder: str | os.PathLike, bases: Bases) -> TCAN:
    """TCAN of a model folder on the given bases, in their dtype and on their device, in eval mode.

    Raises:
        UserError: no model folder, a base that isn't the one it was trained on, a file that is missing or doesn't fit.
    """
    folder = Path(folder)
    info = read_model_info(folder)
    for part, trained_on in info["bases"].items():
        given = bases.info.get(part, {})
        if "fingerprint" in given and trained_on.get("fingerprint") != given["fingerprint"]:
            raise UserError(
                f"{folder}: was trained on another {part}: {trained_on['source']} ({trained_on.get('fingerprint')}), "
                f"not {given['source']} ({given['fingerprint']}); give that one, or train on this one"
            )
    tcan = TCAN(
        bases.unet,
        bases.controlnet,
        bases.motion_adapter,
        bases.empty_prompt,
        info["lora_rank"],
        info["lora_alpha"],
    )
    for part, file in MODEL_PARTS.items():
        if info["stage"] == 1 and part in ("motion_adapter", "temporal_controlnet"):
            continue  # as the bases have them
        try:
            weights = load_file(folder / file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder / file}: cannot be read ({first_line(error)}); the folder isn't whole"
            ) from None
        if part == "appa":
            weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items()}
        own = tcan.parts()[part]
        check_keys(f"{folder / file}", own.keys() - weights.keys(), weights.keys() - own.keys())
        check_shapes(f"{folder / file}", own, weights)
        tcan.load_parts({part: weights})
    return tcan.to(bases.empty_prompt.device, bases.empty_prompt.dtype).eval()
