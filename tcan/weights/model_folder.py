"""The folder of a trained model: saved, read, and put on the pretrained that it was trained on."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tcan import __version__
from tcan.appa import save_appa
from tcan.errors import UserError, first_line
from tcan.model import TCAN
from tcan.weights.common import check_keys, check_shapes, quiet
from tcan.weights.pretrained import (
    PretrainedModels,
    load_part,
    load_pose_detector,
    load_scheduler,
    pretrained_fingerprint,
)

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
    pretrained: Mapping[str, Mapping[str, str]],
    stage: int,
    height: int,
    width: int,
    stick_width: int,
    **more: Any,
) -> None:
    """Writes what was trained, and the names and fingerprints of what it was trained on; nothing of the pretrained.

        tcan.json              pretrained, stage, lora_rank, lora_alpha, height, width, stick_width, library_version
        appearance_unet/       a diffusers UNet without what follows its last feature
        appa/                  a LoRA that any diffusers pipeline of the base can load
        motion_adapter/        a diffusers MotionAdapter                                (from stage 2 on)
        temporal_controlnet/   the ControlNet's temporal layers                         (from stage 2 on)

    The folder appears, or replaces the one of its name, when it is whole.

    Args:
        pretrained: `PretrainedModels.info`, and "pose" with the "source" of the pose network if animation is to find poses by itself.
        height, width: of the images it was trained on, in pixels.
        stick_width: of the pose images it was trained on, in pixels.
        more: kept in tcan.json, such as mlflow_run_id.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    lora = tcan.denoiser.peft_config["default"]
    info = {
        "schema_version": SCHEMA_VERSION,
        "library_version": __version__,
        "pretrained": {part: dict(base) for part, base in pretrained.items()},
        "stage": stage,
        "lora_rank": lora.r,
        "lora_alpha": lora.lora_alpha,
        "height": height,
        "width": width,
        "stick_width": stick_width,
        **more,
    }
    with _written_whole(folder) as partial:
        tcan.appearance_unet.save_pretrained(partial / "appearance_unet")
        save_appa(tcan.denoiser, partial / "appa")
        if stage == 2:
            tcan.motion_adapter().save_pretrained(partial / "motion_adapter")
            (partial / "temporal_controlnet").mkdir()
            temporal = {
                name: tensor.contiguous() for name, tensor in tcan.parts()["temporal_controlnet"].items()
            }
            save_file(temporal, partial / MODEL_PARTS["temporal_controlnet"])
        _write_info(info, partial)


def export_model(model: str | os.PathLike, folder: str | os.PathLike, pose: str | None = None) -> None:
    """Writes a model folder that needs no other: what was trained, as `save_model`, and all that it was trained on.

        pretrained/{vae,unet,controlnet,motion_adapter,text_encoder,scheduler,pose}/    in diffusers' layout

    tcan.json names them as `./pretrained/...`, so the folder may be moved. One base at a time is in memory.

    Args:
        model: a model folder.
        pose: the pose network to take where the model folder names none.

    Raises:
        UserError: no whole model folder, a base that can't be loaded or isn't the one it was trained on, no pose
            network named, a folder that can't be written, is the model's own, or holds something else.
    """
    model, folder = Path(model), Path(folder)
    info = read_model_info(model)
    if folder.resolve() == model.resolve():
        raise UserError(f"{folder}: is the model's own folder; name another one")
    if "pose" not in info["pretrained"]:
        if pose is None:
            raise UserError(f"{model}: names no pose network; give one to export with it")
        info["pretrained"]["pose"] = {"source": pose}
    read_parts(model, info, untrained_model(model, info))
    with _written_whole(folder) as partial, quiet():
        for part, base in info["pretrained"].items():
            target = partial / "pretrained" / part
            if part == "scheduler":
                load_scheduler(base["source"]).save_pretrained(target)
            elif part == "pose":
                load_pose_detector(base["source"]).save_pretrained(target)
            else:
                network = load_part(part, base["source"])
                given = {"source": base["source"], "fingerprint": pretrained_fingerprint(part, network)}
                check_base(model, part, base, given)
                network.save_pretrained(target)
            base["source"] = f"./pretrained/{part}"
        for part in _trained_parts(info):
            shutil.copytree(model / part, partial / part)
        _write_info(info, partial)


def _write_info(info: Mapping[str, Any], folder: Path) -> None:
    (folder / MODEL_FILE).write_text(json.dumps(info, indent=2) + "\n")


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name, and the place, of `folder` when all is written.

    Raises:
        UserError: it can't be written, or something else than a model is there, which would be lost.
    """
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and not (folder / MODEL_FILE).is_file():
        raise UserError(f"{folder}: is there already and no model folder; name another one")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
    try:
        partial.mkdir(parents=True)
        yield partial
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
    """What tcan.json says; the sources of pretrained that lie in the folder itself as absolute paths.

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
    for base in info["pretrained"].values():
        if base["source"].startswith("./"):
            base["source"] = str((Path(folder) / base["source"]).resolve())
    return info


def load_model(folder: str | os.PathLike, pretrained: PretrainedModels) -> TCAN:
    """TCAN of a model folder on the given pretrained, in their dtype and on their device, in eval mode.

    Raises:
        UserError: no model folder, a base that isn't the one it was trained on, a file that is missing or doesn't fit.
    """
    folder = Path(folder)
    info = read_model_info(folder)
    for part, trained_on in info["pretrained"].items():
        check_base(folder, part, trained_on, pretrained.info.get(part, {}))
    tcan = TCAN(
        pretrained.unet,
        pretrained.controlnet,
        pretrained.motion_adapter,
        pretrained.empty_prompt,
        info["lora_rank"],
        info["lora_alpha"],
    )
    tcan.load_parts(read_parts(folder, info, tcan))
    return tcan.to(pretrained.empty_prompt.device, pretrained.empty_prompt.dtype).eval()


def check_base(
    folder: Path | str, part: str, trained_on: Mapping[str, str], given: Mapping[str, str]
) -> None:
    """Raises UserError when a base isn't the one that the model of the folder was trained on."""
    if "fingerprint" in given and trained_on.get("fingerprint") != given["fingerprint"]:
        raise UserError(
            f"{folder}: was trained on another {part}: {trained_on['source']} ({trained_on.get('fingerprint')}), "
            f"not {given['source']} ({given['fingerprint']}); give that one (of the mini "
            "weights: the version of this package that had it), or train on this one"
        )


def _trained_parts(info: Mapping[str, Any]) -> dict[str, str]:
    """The parts that a model folder holds, and their files: after stage 1 the temporal layers are those of the pretrained."""
    stage1 = ("appearance_unet", "appa")
    return {part: file for part, file in MODEL_PARTS.items() if info["stage"] == 2 or part in stage1}


def read_parts(folder: Path, info: Mapping[str, Any], tcan: TCAN) -> dict[str, dict[str, Tensor]]:
    """What `TCAN.load_parts` takes, read from a model folder; names and shapes are exactly this model's.

    Raises:
        UserError: a file that is missing or doesn't fit.
    """
    expected, parts = tcan.parts(), {}
    for part, file in _trained_parts(info).items():
        try:
            weights = load_file(folder / file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder / file}: cannot be read ({first_line(error)}); the folder isn't whole"
            ) from None
        if part == "appa":
            weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items()}
        own = expected[part]
        check_keys(f"{folder / file}", own.keys() - weights.keys(), weights.keys() - own.keys())
        check_shapes(f"{folder / file}", own, weights)
        parts[part] = weights
    return parts


def untrained_model(folder: Path, info: Mapping[str, Any]) -> TCAN:
    """A TCAN of the sizes of a model folder on torch's meta device: names and shapes, no memory, no pretrained.

    Raises:
        UserError: a configuration that can't be read.
    """
    try:
        with torch.device("meta"), quiet():
            unet = UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(folder / "appearance_unet")
            )
            if info["stage"] == 2:
                adapter = MotionAdapter.from_config(MotionAdapter.load_config(folder / "motion_adapter"))
            else:
                adapter = MotionAdapter(
                    block_out_channels=unet.config.block_out_channels,
                    motion_layers_per_block=unet.config.layers_per_block,
                    motion_norm_num_groups=unet.config.norm_num_groups,
                    use_motion_mid_block=False,
                )
            prompt = torch.zeros(1, 1, unet.config.cross_attention_dim)
            controlnet = ControlNetModel.from_unet(unet)
            return TCAN(unet, controlnet, adapter, prompt, info["lora_rank"], info["lora_alpha"])
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({first_line(error)}); the folder isn't whole") from None
