"""Load the frozen pretrained models strictly, from files, folders or the Hugging Face Hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel

from tcan.errors import UserError, first_line
from tcan.fingerprint import fingerprint
from tcan.impostor import impostor
from tcan.pose import OpenPose
from tcan.pose.hands import FaceDetector, HandDetector, OpenPoseParts
from tcan.pose.onnx import OnnxPose
from tcan.weights.common import check_keys, quiet
from tcan.weights.original import (
    SD15,
    SUFFIXES,
    check_positions,
    load_original,
    num_positions,
    original_part,
)

MINI = Path(__file__).parents[1] / "mini"
MINI_MODEL = MINI / "trained"
"""Model folder of a TCAN trained on the mini weights."""
NETWORKS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "controlnet": ControlNetModel,
    "motion_adapter": MotionAdapter,
    "text_encoder": CLIPTextModel,
}


@dataclass
class PretrainedModels:
    """The frozen pretrained models that TCAN is built from."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    motion_adapter: MotionAdapter
    empty_prompt: Tensor
    """Last hidden state of the text encoder for the empty prompt, `[1, T, D]`. The text encoder itself is not kept."""
    scheduler: DDIMScheduler
    info: dict[str, dict[str, str]]
    """For each part, its "source" as requested and its "fingerprint" (for the text encoder, of the empty prompt)."""


def load_pretrained(
    *,
    vae: str,
    unet: str,
    controlnet: str,
    motion_adapter: str,
    text_encoder: str,
    scheduler: str,
    variant: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PretrainedModels:
    """Load every pretrained model strictly: missing and unexpected keys are errors.

    Fingerprints are computed from the stored weights, before the cast to `dtype`. They do not depend on the layout.

    Args: for each part, one of
        "mini": the weights in this package;
        a single file that contains the part in its original layout (`tcan.weights.original`), e.g. an SD1.5 checkpoint;
        a local folder in diffusers' layout: of the part itself, or with the part in a subfolder of its name;
        a Hugging Face Hub id `owner/name[/subfolder][@revision]`.
    variant: see `load_part`.

    The scheduler can also be "sd15", SD1.5's noise schedule. A single file as the scheduler means the same.

    Raises:
        UserError: a source does not exist, is not readable or does not contain the part; its keys do not match the
            architecture; the parts are not compatible with each other.
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
        module = load_part(part, sources[part], variant)
        info[part] = {
            "source": portable_source(sources[part]),
            "fingerprint": pretrained_fingerprint(part, module),
        }
        with quiet():
            loaded[part] = module.to(device, dtype).requires_grad_(False).eval()
    encoder = load_part("text_encoder", text_encoder, variant)
    prompt = encode_empty_prompt(encoder)
    info["text_encoder"] = {
        "source": portable_source(text_encoder),
        "fingerprint": pretrained_fingerprint("text_encoder", encoder),
    }
    check_compatible({part: dict(module.config) for part, module in loaded.items()}, prompt.shape[-1])
    info["scheduler"] = {"source": portable_source(scheduler)}
    schedule = load_scheduler(scheduler)
    return PretrainedModels(**loaded, empty_prompt=prompt.to(device, dtype), scheduler=schedule, info=info)


def check_compatible(configs: Mapping[str, Mapping[str, Any]], prompt_width: int | None = None) -> None:
    """Require that parts have the same architecture, given their diffusers configurations. Missing parts are skipped.

    Raises:
        UserError: two parts are not compatible; the message names the differing values.
    """
    equal = (
        ("unet", "block_out_channels", "controlnet", "block_out_channels"),
        ("unet", "cross_attention_dim", "controlnet", "cross_attention_dim"),
        ("unet", "layers_per_block", "controlnet", "layers_per_block"),
        ("unet", "in_channels", "controlnet", "in_channels"),
        ("unet", "block_out_channels", "motion_adapter", "block_out_channels"),
        ("unet", "layers_per_block", "motion_adapter", "motion_layers_per_block"),
        ("unet", "norm_num_groups", "motion_adapter", "motion_norm_num_groups"),
        ("unet", "in_channels", "vae", "latent_channels"),
    )
    for part, key, other, other_key in equal:
        if part in configs and other in configs:
            a, b = configs[part][key], configs[other][other_key]
            if (list(a) if isinstance(a, list | tuple) else a) != (
                list(b) if isinstance(b, list | tuple) else b
            ):
                raise UserError(
                    f"{other}: not compatible with the {part}: {other_key} is {b}, but the {part}'s {key} is {a}; "
                    "use parts of one architecture"
                )
    if prompt_width and "unet" in configs and prompt_width != configs["unet"]["cross_attention_dim"]:
        raise UserError(
            f"text_encoder: not compatible with the unet: its width is {prompt_width}, but the unet's "
            f"cross_attention_dim is {configs['unet']['cross_attention_dim']}; use parts of one architecture"
        )


def locate(source: str, part: str, config_name: str = "config.json") -> tuple[str, dict[str, str]]:
    """Return a source as arguments of `from_pretrained`: the folder or Hub id, and `subfolder` and `revision` if given.

    Raises:
        UserError: the source is neither "mini", nor a folder that contains the part, nor a valid Hub id.
    """
    if source.endswith(SUFFIXES):
        raise UserError(f"{part}: no such file: {source}; check the path")
    folder = MINI if source == "mini" else Path(source).expanduser()
    if folder.is_dir():
        for candidate in (folder / part, folder):
            if (candidate / config_name).is_file():
                return str(candidate), {}
        raise UserError(
            f"{part}: no {config_name} in {folder} or {folder / part}; provide a folder in diffusers' layout"
        )
    name, _, revision = source.partition("@")
    owner, _, path = name.partition("/")
    repository, _, subfolder = path.partition("/")
    if source == "mini" or not repository or source.startswith((".", "/", "~")):
        raise UserError(
            f"{part}: no such folder: {folder}; provide mini, a folder in diffusers' layout, a weights file, or a "
            "Hugging Face Hub id owner/name"
        )
    options = {"subfolder": subfolder} if subfolder else {}
    return f"{owner}/{repository}", options | ({"revision": revision} if revision else {})


def portable_source(source: str) -> str:
    """Return a source that does not depend on the working directory: local paths become absolute."""
    path = Path(source).expanduser()
    # Not resolve(): files of the Hub's cache are symlinks to blobs, whose names have no suffix.
    return str(path.absolute()) if source not in ("mini", "sd15") and path.exists() else source


def load_part(part: str, source: str, variant: str | None = None) -> Any:
    """Load one network in float32 on the CPU: "vae", "unet", "controlnet", "motion_adapter" or "text_encoder".

    Args:
        variant: variant of the files in diffusers' layout to prefer, such as "fp16". A folder that contains only one
            variant is loaded from it.

    Raises:
        UserError: as `load_pretrained`, except for compatibility between parts.
    """
    if Path(source).expanduser().is_file():
        return load_original(part, Path(source).expanduser())
    path, options = locate(source, part)
    files = _folder_files(part, path)
    variants = [_existing_variant(files, variant)] if files else list(dict.fromkeys((variant, None, "fp16")))
    for attempt in variants:
        try:
            with quiet():
                module, report = NETWORKS[part].from_pretrained(
                    path, output_loading_info=True, torch_dtype=torch.float32, variant=attempt, **options
                )
            break
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if attempt == variants[-1]:
                raise UserError(
                    f"{part}: cannot load {source} ({first_line(error)}); check the source and the connection"
                ) from None
    # Position tables of motion modules are computed at load time. Old CLIP files store position_ids, new ones do not.
    missing = (key for key in report["missing_keys"] if not key.endswith(".pos_embed.pe"))
    unexpected = (key for key in report["unexpected_keys"] if not key.endswith("embeddings.position_ids"))
    check_keys(f"{part} from {source}", missing, unexpected)
    if part == "motion_adapter":
        check_positions(f"{part} from {source}", module.state_dict())
    if part == "motion_adapter" and module.mid_block is not None:
        module.mid_block = (
            None  # AnimateDiff's mm_sd_v15_v2 has temporal layers in the middle block, TCAN does not
        )
        module.register_to_config(use_motion_mid_block=False)
    return module


def check_source(part: str, source: str) -> None:
    """Check what is known about the source of a part without reading its weights. Sources on the Hub are not contacted.

    Raises:
        UserError: as `load_part`.
    """
    path = Path(source).expanduser()
    if path.is_file():
        original_part(part, path)
    else:
        _folder_files(part, locate(source, part)[0])


def motion_positions(source: str) -> int:
    """Number of positions of motion modules, the maximum number of frames of a window, without reading their weights.

    Raises:
        UserError: as `load_part`.
    """
    part = "motion_adapter"
    path = Path(source).expanduser()
    if path.is_file():
        return num_positions(original_part(part, path))
    folder, options = locate(source, part)
    try:
        with quiet():
            return MotionAdapter.load_config(folder, **options)["motion_max_seq_length"]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{part}: cannot load {source} ({first_line(error)}); check the source and the connection"
        ) from None


def _folder_files(part: str, folder: str) -> list[Path]:
    """The files of a local folder; none on the Hub.

    Raises:
        UserError: a file that was saved in the place of weights.
    """
    files = sorted(Path(folder).glob("*")) if Path(folder).is_dir() else []
    for file in files:
        if found := impostor(file):
            raise UserError(f"{part} from {file}: {found}")
    return files


def _existing_variant(files: list[Path], preferred: str | None) -> str | None:
    """The variant of a folder's weights to load: the preferred one, else the default, else fp16, else the first one."""
    weights = [
        file.name
        for file in files
        if file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
    ]
    names = [re.sub(r"-\d+-of-\d+", "", re.sub(r"\.index\.json$", "", name)).split(".") for name in weights]
    found = {name[1] if len(name) > 2 else None for name in names}
    if preferred in found or None in found or not found:
        return preferred if preferred in found else None
    return "fp16" if "fp16" in found else min(filter(None, found))


def pretrained_fingerprint(part: str, network: Any) -> str:
    """Fingerprint of the stored weights of a network returned by `load_part`.

    Values that are computed from them are not part of it, because their last bits depend on the processor: a model must also load
    on other machines than that of its training.
    """
    weights = {}
    for name, tensor in network.state_dict().items():
        if part == "text_encoder":
            name = name.removeprefix("text_model.")  # only in transformers < 5.6
        is_computed = name.endswith(".pos_embed.pe")
        weights[name] = torch.zeros_like(tensor) if is_computed else tensor
    return fingerprint(weights)


def load_scheduler(source: str) -> DDIMScheduler:
    """Load the noise schedule. "sd15" and single files give SD1.5's schedule.

    Raises:
        UserError: as `load_part`.
    """
    path = Path(source).expanduser()
    if source == "sd15" or path.is_file():
        return DDIMScheduler.from_pretrained(SD15 / "scheduler")
    folder, options = locate(source, "scheduler", "scheduler_config.json")
    try:
        return DDIMScheduler.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"scheduler: cannot load {source} ({first_line(error)}); check the source and the connection"
        ) from None


def load_pose_detector(
    source: str, device: torch.device | str = "cpu", hands: bool = False, face: bool = False
) -> OpenPose | OnnxPose | OpenPoseParts:
    """Load the pose network from "mini", a folder with the subfolder pose or with two ONNX files, or a source of
    `OpenPose.from_pretrained`.

    Args:
        hands, face: whether to detect these parts, too, with OpenPose's networks from the same source or with a whole-body
            ONNX network.

    Raises:
        UserError: as `OpenPose.from_pretrained`, `HandDetector.from_pretrained` and `OnnxPose.from_folder`.
    """
    folder = MINI if source == "mini" else Path(source).expanduser()
    is_subfolder = (folder / "pose").is_dir() or source == "mini"
    folder = folder / "pose" if is_subfolder else folder
    if folder.suffix == ".onnx":
        raise UserError(
            f"pose network {source}: a single ONNX file; give a folder with two: of a person detector and of a pose network"
        )
    if OnnxPose.is_in(folder):
        return OnnxPose.from_folder(folder, device, hands, face)
    hand_detector = HandDetector.from_pretrained(source, device) if hands else None
    face_detector = FaceDetector.from_pretrained(source, device) if face else None
    with quiet():
        body = OpenPose.from_pretrained(folder if is_subfolder else source, device=device)
    return OpenPoseParts(body, hand_detector, face_detector) if hands or face else body


def encode_empty_prompt(text_encoder: CLIPTextModel) -> Tensor:
    """Last hidden state of the text encoder for the empty prompt, `[1, T, D]`.

    The tokens are built here, without a tokenizer: begin, followed by end up to the full length. They are the last two
    ids of CLIP's vocabulary. The ids in the configuration of SD1.5's text encoder refer to other tokens.
    """
    config = text_encoder.config
    begin, end = config.vocab_size - 2, config.vocab_size - 1
    tokens = torch.full((1, config.max_position_embeddings), end)
    tokens[0, 0] = begin
    with torch.no_grad():
        return text_encoder.eval()(tokens).last_hidden_state
