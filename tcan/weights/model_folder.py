"""Save, load and export the folder of a trained model."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tcan import __version__
from tcan.appa import save_appa
from tcan.atomic_write import atomic_write
from tcan.errors import UserError, first_line
from tcan.impostor import impostor
from tcan.model import TCAN
from tcan.variant import Variant
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
    "controlnet": "controlnet/diffusion_pytorch_model.safetensors",
    "motion_adapter": "motion_adapter/diffusion_pytorch_model.safetensors",
    "temporal_controlnet": "temporal_controlnet/diffusion_pytorch_model.safetensors",
}
SCHEMA_VERSION = 1
PIPELINE = """import tcan.weights.components  # the loaders in model_index.json
from tcan.pipeline import TCANPipeline
"""


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
    """Write the trained weights, and the sources and fingerprints of the pretrained models, but not their weights.

        model_index.json, pipeline.py    for `DiffusionPipeline.from_pretrained`
        tcan.json              pretrained, stage, variant, lora_rank, lora_alpha, height, width, stick_width, library_version
        appearance_unet/       a diffusers UNet without the layers after its last feature
        appa/                  a LoRA that diffusers pipelines of the pretrained UNet can load
        controlnet/            a diffusers ControlNetModel                              (fine-tuned only)
        motion_adapter/        a diffusers MotionAdapter                                (stage 2 only)
        temporal_controlnet/   the ControlNet's temporal layers                         (stage 2 only)

    Parts that the variant does not have are absent. The write is atomic. An existing model folder is replaced.

    Args:
        pretrained: `PretrainedModels.info`. Add "pose" with the "source" of the pose network to detect poses in
            animation.
        height, width: size of the training images in pixels.
        stick_width: stick width of the training pose images in pixels.
        more: additional entries of tcan.json: mlflow_run_id; draw, whether the training pose images show {"hands", "face"}
            (absent: neither); others.

    Raises:
        UserError: the folder cannot be written, or exists and is not a model folder.
    """
    folder = Path(folder)
    info = {
        "schema_version": SCHEMA_VERSION,
        "library_version": __version__,
        "pretrained": {part: dict(entry) for part, entry in pretrained.items()},
        "stage": stage,
        "variant": tcan.variant.asdict(),
        "lora_rank": tcan.lora_rank,
        "lora_alpha": tcan.lora_alpha,
        "height": height,
        "width": width,
        "stick_width": stick_width,
        **more,
    }
    with _atomic_model_folder(folder) as partial:
        tcan.appearance_unet.save_pretrained(partial / "appearance_unet")
        if tcan.variant.appa:
            save_appa(tcan.denoiser, partial / "appa")
        if stage == 2:
            tcan.motion_adapter().save_pretrained(partial / "motion_adapter")
        parts = tcan.parts()
        for part in _trained_parts(info).keys() & {"controlnet", "temporal_controlnet"}:
            (partial / part).mkdir()
            weights = {name: tensor.contiguous() for name, tensor in parts[part].items()}
            save_file(weights, partial / MODEL_PARTS[part], metadata={"format": "pt"})
            if part == "controlnet":
                tcan.controlnet.save_config(partial / part)
        _write_info(info, partial)


def export_model(model: str | os.PathLike, folder: str | os.PathLike, pose: str | None = None) -> None:
    """Write a self-contained model folder: the trained weights as in `save_model`, and all pretrained models.

        pretrained/{vae,unet,controlnet,motion_adapter,text_encoder,scheduler,pose}/    in diffusers' layout

    tcan.json refers to them as `./pretrained/...`, so the folder can be moved. One pretrained model at a time is in
    memory.

    Args:
        model: a model folder.
        folder: the folder to write.
        pose: source of the pose network, if the model folder names none.

    Raises:
        UserError: the model folder is incomplete; a pretrained model cannot be loaded or has another fingerprint; no
            pose network is named; `folder` is `model`, exists and is not a model folder, or cannot be written.
    """
    model, folder = Path(model), Path(folder)
    info = read_model_info(model)
    if folder.resolve() == model.resolve():
        raise UserError(f"{folder}: is the model folder itself; choose another output folder")
    if "pose" not in info["pretrained"]:
        if pose is None:
            raise UserError(f"{model}: names no pose network; pass one to include in the export")
        info["pretrained"]["pose"] = {"source": pose}
    read_parts(model, info, untrained_model(model, info))
    with _atomic_model_folder(folder) as partial, quiet():
        for part, entry in info["pretrained"].items():
            target = partial / "pretrained" / part
            if part == "scheduler":
                load_scheduler(entry["source"]).save_pretrained(target)
            elif part == "pose":
                load_pose_detector(entry["source"], **info.get("draw", {})).save_pretrained(target)
            else:
                network = load_part(part, entry["source"])
                actual = {
                    "source": entry["source"],
                    "fingerprint": pretrained_fingerprint(part, network),
                }
                check_fingerprint(model, part, entry, actual)
                network.save_pretrained(target)
            entry["source"] = f"./pretrained/{part}"
        for part in _trained_parts(info):
            shutil.copytree(model / part, partial / part)
        _write_info(info, partial)


def _write_info(info: Mapping[str, Any], folder: Path) -> None:
    """Write tcan.json, and the files with which `DiffusionPipeline.from_pretrained` finds this package."""
    (folder / MODEL_FILE).write_text(json.dumps(info, indent=2) + "\n")
    loaders = {"vae": "Vae", "tcan": "Tcan", "scheduler": "Scheduler"}
    loaders |= {"pose_detector": "Pose"} if "pose" in info["pretrained"] else {}
    index = {"_class_name": ["pipeline", "TCANPipeline"], "_diffusers_version": diffusers.__version__}
    index |= {name: ["tcan.weights.components", loader] for name, loader in loaders.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "pipeline.py").write_text(PIPELINE)


@contextmanager
def _atomic_model_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` at the end of the block.

    Raises:
        UserError: `folder` cannot be written, or exists, is not empty and is not a model folder.
    """
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and not (folder / MODEL_FILE).is_file():
        raise UserError(f"{folder}: already exists and is not a model folder; choose another path")
    try:
        with atomic_write(folder) as partial:
            partial.mkdir(parents=True)
            yield partial
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot write the model ({first_line(error)}); check the path and the free disk space"
        ) from None


def read_model_info(folder: str | os.PathLike) -> dict[str, Any]:
    """Read tcan.json. Sources of pretrained models inside the folder are returned as absolute paths.

    Raises:
        UserError: the folder does not exist, is not a model folder, or has another schema version.
    """
    file = Path(folder) / MODEL_FILE
    try:
        info = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{folder}: not a model folder (no readable {MODEL_FILE}); pass the model folder of tcan train"
        ) from None
    if info.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{file}: schema version {info.get('schema_version')}, expected {SCHEMA_VERSION}; train the model again, or "
            "use the version of tcan that wrote it"
        )
    for entry in info["pretrained"].values():
        if entry["source"].startswith("./"):
            entry["source"] = str((Path(folder) / entry["source"]).absolute())
    return info


def read_variant(info: Mapping[str, Any]) -> Variant:
    """The variant in the contents of tcan.json."""
    return Variant(**info.get("variant", {}))


def load_model(
    folder: str | os.PathLike, pretrained: PretrainedModels, temporal_controlnet: bool | None = None
) -> TCAN:
    """Load a model folder onto pretrained models, in their dtype and on their device, in eval mode.

    Args:
        temporal_controlnet: for a model of stage 1, whether the ControlNet gets temporal layers; None: as in the folder.

    Raises:
        UserError: not a model folder; a pretrained model has another fingerprint than in training; a file is missing or
            does not match the architecture.
    """
    folder = Path(folder)
    info = read_model_info(folder)
    for part, trained_on in info["pretrained"].items():
        check_fingerprint(folder, part, trained_on, pretrained.info.get(part, {}))
    if temporal_controlnet is not None:
        info["variant"] = read_variant(info).asdict() | {"temporal_controlnet": temporal_controlnet}
    tcan = TCAN(
        pretrained.unet,
        pretrained.controlnet,
        pretrained.motion_adapter,
        pretrained.empty_prompt,
        info["lora_rank"],
        info["lora_alpha"],
        read_variant(info),
    )
    tcan.load_parts(read_parts(folder, info, tcan))
    tcan.info = info
    return tcan.to(pretrained.empty_prompt.device, pretrained.empty_prompt.dtype).eval()


def check_fingerprint(
    folder: Path | str, part: str, trained_on: Mapping[str, str], actual: Mapping[str, str]
) -> None:
    """Require that a pretrained model is the one that the model in `folder` was trained on.

    Args:
        folder: start of the error message.
        part: name of the pretrained model, such as "unet".
        trained_on, actual: "source" and "fingerprint", in training and now. Without a fingerprint in `actual`, nothing
            is checked.

    Raises:
        UserError: the fingerprints differ.
    """
    if "fingerprint" in actual and trained_on.get("fingerprint") != actual["fingerprint"]:
        raise UserError(
            f"{folder}: was trained on another {part}: {trained_on['source']} ({trained_on.get('fingerprint')}), "
            f"not {actual['source']} ({actual['fingerprint']}); use the {part} of the training (for mini: the package "
            "version that contained it), or train again"
        )


def _trained_parts(info: Mapping[str, Any]) -> dict[str, str]:
    """The parts in a model folder and their files. After stage 1, the temporal layers are the pretrained ones."""
    variant, temporal = read_variant(info), info["stage"] == 2
    has = {
        "appearance_unet": True,
        "appa": variant.appa,
        "controlnet": variant.controlnet == "finetune",
        "motion_adapter": temporal,
        "temporal_controlnet": temporal and variant.temporal_controlnet,
    }
    return {part: file for part, file in MODEL_PARTS.items() if has[part]}


def read_parts(folder: Path, info: Mapping[str, Any], tcan: TCAN) -> dict[str, dict[str, Tensor]]:
    """Read the argument of `TCAN.load_parts` from a model folder, with exactly the names and shapes of `tcan`.

    Raises:
        UserError: a file is missing or does not match the architecture.
    """
    expected, parts = tcan.parts(), {}
    for part, file in _trained_parts(info).items():
        if found := impostor(folder / file):
            raise UserError(f"{folder / file}: {found}")
        try:
            weights = load_file(folder / file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder / file}: cannot be read ({first_line(error)}); the model folder is incomplete, copy it again"
            ) from None
        if part == "appa":
            weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items()}
        reference = expected[part]
        check_keys(f"{folder / file}", reference.keys() - weights.keys(), weights.keys() - reference.keys())
        check_shapes(f"{folder / file}", reference, weights)
        parts[part] = weights
    return parts


def untrained_model(folder: Path, info: Mapping[str, Any]) -> TCAN:
    """Build a TCAN with the sizes of a model folder on the meta device, without pretrained models.

    Raises:
        UserError: a configuration cannot be read.
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
            return TCAN(
                unet, controlnet, adapter, prompt, info["lora_rank"], info["lora_alpha"], read_variant(info)
            )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: cannot be read ({first_line(error)}); the model folder is incomplete, copy it again"
        ) from None
