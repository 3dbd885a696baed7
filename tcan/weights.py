"""Where weights come from and go to: the frozen bases, and the folder of a trained model."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from tcan import __version__
from tcan.appa import save_appa
from tcan.errors import UserError
from tcan.model import TCAN
from tcan.pose import OpenPose

MINI = Path(__file__).parent / "mini"
NETWORKS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "controlnet": ControlNetModel,
    "motion_adapter": MotionAdapter,
    "text_encoder": CLIPTextModel,
}


def fingerprint(module: nn.Module | Mapping[str, Tensor]) -> str:
    """16 hex digits of the names, shapes and values of a module's parameters and buffers (or of a dict of tensors).

    Values are taken as float32, so the same weights stored as fp16 and as fp32 have one fingerprint.
    """
    tensors = module.state_dict() if isinstance(module, nn.Module) else module
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]


# --- bases -----------------------------------------------------------------------------------------------------------


@dataclass
class Bases:
    """The frozen, pretrained networks that TCAN stands on."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    motion_adapter: MotionAdapter
    empty_prompt: Tensor
    """The text encoder's answer to the empty prompt, `[1, T, D]`; all that is kept of the text encoder."""
    scheduler: DDIMScheduler
    info: dict[str, dict[str, str]]
    """Per part its "source" as asked for and its "fingerprint" (of the text encoder: the empty prompt's)."""


def load_bases(
    *,
    vae: str,
    unet: str,
    controlnet: str,
    motion_adapter: str,
    text_encoder: str,
    scheduler: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Bases:
    """Loads every base, strictly: a key that a file lacks, or has too many, is an error.

    Args: for each part one of
        "mini": the weights that this package holds;
        a local folder in diffusers' layout, of the part itself or with the part as a subfolder of its name;
        a hub id `owner/name[/subfolder][@revision]`.

    Fingerprints are those of the stored weights, before they are cast to `dtype`.

    Raises:
        UserError: a source that isn't there, isn't readable, isn't this part, or whose keys don't fit.
    """
    sources = {
        "vae": vae,
        "unet": unet,
        "controlnet": controlnet,
        "motion_adapter": motion_adapter,
        "text_encoder": text_encoder,
        "scheduler": scheduler,
    }
    loaded: dict[str, Any] = {}
    info = {}
    for part in ("vae", "unet", "controlnet", "motion_adapter"):
        module = load_part(part, sources[part])
        info[part] = {"source": portable_source(sources[part]), "fingerprint": fingerprint(module)}
        with _quiet():
            loaded[part] = module.to(device, dtype).requires_grad_(False).eval()
    prompt = encode_empty_prompt(load_part("text_encoder", text_encoder))
    info["text_encoder"] = {
        "source": portable_source(text_encoder),
        "fingerprint": fingerprint({"empty_prompt": prompt}),
    }
    info["scheduler"] = {"source": portable_source(scheduler)}
    where, options = locate(scheduler, "scheduler", "scheduler_config.json")
    try:
        schedule = DDIMScheduler.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"scheduler: cannot be loaded from {scheduler}: {_first_line(error)}") from None
    return Bases(**loaded, empty_prompt=prompt.to(device, dtype), scheduler=schedule, info=info)


def locate(source: str, part: str, config_name: str = "config.json") -> tuple[str, dict[str, str]]:
    """A base's source as `from_pretrained` takes it: the folder or hub id, and `subfolder` and `revision` if any.

    Raises:
        UserError: neither "mini", nor a folder that holds the part, nor a possible hub id.
    """
    folder = MINI if source == "mini" else Path(source).expanduser()
    if folder.is_dir():
        for candidate in (folder / part, folder):
            if (candidate / config_name).is_file():
                return str(candidate), {}
        raise UserError(
            f"{part}: no {config_name} in {folder} nor in {folder / part}; name a folder in diffusers' layout"
        )
    name, _, revision = source.partition("@")
    owner, _, rest = name.partition("/")
    repository, _, subfolder = rest.partition("/")
    if source == "mini" or not repository or source.startswith((".", "/", "~")):
        raise UserError(
            f"{part}: no folder {folder}; give mini, a folder in diffusers' layout, or a hub id owner/name"
        )
    options = {"subfolder": subfolder} if subfolder else {}
    return f"{owner}/{repository}", options | ({"revision": revision} if revision else {})


def portable_source(source: str) -> str:
    """A source that means the same from another working folder: local folders become absolute."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if source != "mini" and folder.is_dir() else source


def load_part(part: str, source: str) -> Any:
    """One network of the bases, in float32 on the CPU: "vae", "unet", "controlnet", "motion_adapter", "text_encoder".

    Raises:
        UserError: as `load_bases`.
    """
    where, options = locate(source, part)
    try:
        with _quiet():
            module, report = NETWORKS[part].from_pretrained(
                where, output_loading_info=True, torch_dtype=torch.float32, **options
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{part}: cannot be loaded from {source}: {_first_line(error)}") from None
    _check_keys(f"{part} from {source}", report["missing_keys"], report["unexpected_keys"])
    if part == "motion_adapter" and module.mid_block is not None:
        module.mid_block = None  # AnimateDiff's mm_sd_v15_v2 has temporal layers there, TCAN has none
        module.register_to_config(use_motion_mid_block=False)
    return module


def load_pose_detector(source: str, device: torch.device | str = "cpu") -> OpenPose:
    """The pose network: "mini", a folder of bases with the subfolder pose, or what `OpenPose.from_pretrained` takes.

    Raises:
        UserError: as `OpenPose.from_pretrained`.
    """
    folder = MINI if source == "mini" else Path(source).expanduser()
    inside = (folder / "pose" / "config.json").is_file() or source == "mini"
    with _quiet():
        return OpenPose.from_pretrained(folder / "pose" if inside else source, device=device)


@contextmanager
def _quiet() -> Iterator[None]:
    """What the loaders have to say is said once and in one line, by the errors raised here."""
    verbosity = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    progress = transformers_logging.is_progress_bar_enabled()
    for library, _ in verbosity:
        library.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in verbosity:
            library.set_verbosity(level)
        if progress:
            transformers_logging.enable_progress_bar()


def encode_empty_prompt(text_encoder: CLIPTextModel) -> Tensor:
    """The text encoder's answer to the empty prompt, `[1, T, D]`.

    The tokenizer's work on it is so small that none is needed: begin, then end up to the full length. CLIP's vocabulary ends with these two. The ids in the configuration of SD1.5's text encoder name other tokens.
    """
    config = text_encoder.config
    begin, end = config.vocab_size - 2, config.vocab_size - 1
    tokens = torch.full((1, config.max_position_embeddings), end)
    tokens[0, 0] = begin
    with torch.no_grad():
        return text_encoder.eval()(tokens).last_hidden_state


def _check_keys(what: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    for kind, keys in (("lacks", sorted(missing)), ("has too many", sorted(unexpected))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"{what}: does not fit: {kind} {', '.join(keys[:3])}{more}; give weights of this architecture"
            )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


# --- the folder of a trained model -----------------------------------------------------------------------------------

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
            f"{folder}: cannot write the model ({_first_line(error)}); check the folder and the disk"
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
                f"{folder / file}: cannot be read ({_first_line(error)}); the folder isn't whole"
            ) from None
        if part == "appa":
            weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items()}
        own = tcan.parts()[part]
        _check_keys(f"{folder / file}", own.keys() - weights.keys(), weights.keys() - own.keys())
        for name in own:
            if own[name].shape != weights[name].shape:
                raise UserError(
                    f"{folder / file}: does not fit: {name} is {list(weights[name].shape)}, not {list(own[name].shape)}"
                )
        tcan.load_parts({part: weights})
    return tcan.to(bases.empty_prompt.device, bases.empty_prompt.dtype).eval()
