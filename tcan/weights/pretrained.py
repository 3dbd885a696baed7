"""The frozen pretrained: where each comes from, and that it is what it should be."""

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
from tcan.pose import OpenPose
from tcan.weights.common import check_keys, quiet
from tcan.weights.original import SD15, SUFFIXES, load_original

MINI = Path(__file__).parents[1] / "mini"
NETWORKS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "controlnet": ControlNetModel,
    "motion_adapter": MotionAdapter,
    "text_encoder": CLIPTextModel,
}


@dataclass
class PretrainedModels:
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


def load_pretrained(
    *,
    vae: str,
    unet: str,
    controlnet: str,
    motion_adapter: str,
    text_encoder: str,
    scheduler: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PretrainedModels:
    """Loads every base, strictly: a key that a file lacks, or has too many, is an error.

    Args: for each part one of
        "mini": the weights that this package holds;
        a single file that holds the part in its original layout (`tcan.weights.original`), such as an SD1.5 checkpoint;
        a local folder in diffusers' layout, of the part itself or with the part as a subfolder of its name;
        a hub id `owner/name[/subfolder][@revision]`.
    The scheduler may also be "sd15", SD1.5's noise schedule, which is what a single file stands for as well.

    Fingerprints are those of the stored weights, before they are cast to `dtype`: the same for the same weights in
    whatever layout.

    Raises:
        UserError: a source that isn't there, isn't readable, isn't this part, or whose keys don't fit; parts that
            don't fit each other.
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
        info[part] = {
            "source": portable_source(sources[part]),
            "fingerprint": pretrained_fingerprint(part, module),
        }
        with quiet():
            loaded[part] = module.to(device, dtype).requires_grad_(False).eval()
    encoder = load_part("text_encoder", text_encoder)
    prompt = encode_empty_prompt(encoder)
    info["text_encoder"] = {
        "source": portable_source(text_encoder),
        "fingerprint": pretrained_fingerprint("text_encoder", encoder),
    }
    check_together({part: dict(module.config) for part, module in loaded.items()}, prompt.shape[-1])
    info["scheduler"] = {"source": portable_source(scheduler)}
    schedule = load_scheduler(scheduler)
    return PretrainedModels(**loaded, empty_prompt=prompt.to(device, dtype), scheduler=schedule, info=info)


def check_together(configs: Mapping[str, Mapping[str, Any]], prompt_width: int | None = None) -> None:
    """Parts, by their diffusers configurations, that are of one architecture; those not given are not looked at.

    Raises:
        UserError: two parts that don't fit, and in what.
    """
    same = (
        ("unet", "block_out_channels", "controlnet", "block_out_channels"),
        ("unet", "cross_attention_dim", "controlnet", "cross_attention_dim"),
        ("unet", "layers_per_block", "controlnet", "layers_per_block"),
        ("unet", "in_channels", "controlnet", "in_channels"),
        ("unet", "block_out_channels", "motion_adapter", "block_out_channels"),
        ("unet", "layers_per_block", "motion_adapter", "motion_layers_per_block"),
        ("unet", "norm_num_groups", "motion_adapter", "motion_norm_num_groups"),
        ("unet", "in_channels", "vae", "latent_channels"),
    )
    for one, key, other, other_key in same:
        if one in configs and other in configs:
            a, b = configs[one][key], configs[other][other_key]
            if (list(a) if isinstance(a, list | tuple) else a) != (
                list(b) if isinstance(b, list | tuple) else b
            ):
                raise UserError(f"{other} does not fit {one}: its {other_key} is {b}, the {one}'s {key} {a}")
    if prompt_width and "unet" in configs and prompt_width != configs["unet"]["cross_attention_dim"]:
        raise UserError(
            f"text_encoder does not fit unet: it gives {prompt_width} numbers a token, the unet's cross_attention_dim is "
            f"{configs['unet']['cross_attention_dim']}"
        )


def locate(source: str, part: str, config_name: str = "config.json") -> tuple[str, dict[str, str]]:
    """A base's source as `from_pretrained` takes it: the folder or hub id, and `subfolder` and `revision` if any.

    Raises:
        UserError: neither "mini", nor a folder that holds the part, nor a possible hub id.
    """
    if source.endswith(SUFFIXES):
        raise UserError(f"{part}: no such file: {source}")
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
            f"{part}: no folder {folder}; give mini, a folder in diffusers' layout, a file of weights, or a hub id owner/name"
        )
    options = {"subfolder": subfolder} if subfolder else {}
    return f"{owner}/{repository}", options | ({"revision": revision} if revision else {})


def portable_source(source: str) -> str:
    """A source that means the same from another working folder: local paths become absolute."""
    path = Path(source).expanduser()
    return str(path.resolve()) if source not in ("mini", "sd15") and path.exists() else source


def load_part(part: str, source: str) -> Any:
    """One network of the pretrained, in float32 on the CPU: "vae", "unet", "controlnet", "motion_adapter", "text_encoder".

    Raises:
        UserError: as `load_pretrained`.
    """
    if Path(source).expanduser().is_file():
        return load_original(part, Path(source).expanduser())
    where, options = locate(source, part)
    try:
        with quiet():
            module, report = NETWORKS[part].from_pretrained(
                where, output_loading_info=True, torch_dtype=torch.float32, **options
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{part}: cannot be loaded from {source}: {first_line(error)}") from None
    # The positions of motion modules are computed, CLIP's were once stored: either way nothing is missed.
    missing = (key for key in report["missing_keys"] if not key.endswith(".pos_embed.pe"))
    unexpected = (key for key in report["unexpected_keys"] if not key.endswith("embeddings.position_ids"))
    check_keys(f"{part} from {source}", missing, unexpected)
    if part == "motion_adapter" and module.mid_block is not None:
        module.mid_block = None  # AnimateDiff's mm_sd_v15_v2 has temporal layers there, TCAN has none
        module.register_to_config(use_motion_mid_block=False)
    return module


def pretrained_fingerprint(part: str, network: Any) -> str:
    """Of a base as `load_part` gives it; of the text encoder its answer to the empty prompt is all that counts."""
    if part == "text_encoder":
        return fingerprint({"empty_prompt": encode_empty_prompt(network)})
    return fingerprint(network)


def load_scheduler(source: str) -> DDIMScheduler:
    """The noise schedule.

    Raises:
        UserError: as `load_pretrained`.
    """
    path = Path(source).expanduser()
    if source == "sd15" or path.is_file():
        return DDIMScheduler.from_pretrained(SD15 / "scheduler")
    where, options = locate(source, "scheduler", "scheduler_config.json")
    try:
        return DDIMScheduler.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"scheduler: cannot be loaded from {source}: {first_line(error)}") from None


def load_pose_detector(source: str, device: torch.device | str = "cpu") -> OpenPose:
    """The pose network: "mini", a folder of pretrained with the subfolder pose, or what `OpenPose.from_pretrained` takes.

    Raises:
        UserError: as `OpenPose.from_pretrained`.
    """
    folder = MINI if source == "mini" else Path(source).expanduser()
    inside = (folder / "pose").is_dir() or source == "mini"
    with quiet():
        return OpenPose.from_pretrained(folder / "pose" if inside else source, device=device)


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
