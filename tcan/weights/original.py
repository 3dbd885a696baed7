"""Load single-file checkpoints, mostly in the original layouts of their projects, at SD1.5's sizes.

| file, for example | parts | ignored keys |
|---|---|---|
| `v1-5-pruned-emaonly.safetensors`, any SD1.5 fine-tune | one or more of `unet`, `vae`, `text_encoder` | tables of the noise schedule, `model_ema.`, `embedding_manager.`, `logit_scale`, `text_projection`, CLIP's `position_ids`, other text encoders |
| a UNet alone | `unet` | none |
| `vae-ft-mse-840000-ema-pruned.ckpt` | `vae` | `loss.`, `model_ema.` |
| `control_v11p_sd15_openpose.pth` | `controlnet` | none |
| `mm_sd_v14.ckpt`, `mm_sd_v15_v2.ckpt`, `AnimateLCM_sd15_t2v.ckpt` | `motion_adapter` | motion modules of the middle block, which TCAN does not have |
| `body_pose_model.pth`, `hand_pose_model.pth`, `facenet.pth` | `pose`, `hands`, `face` | none |
| a single file of a folder in diffusers' layout | `unet`, `vae`, `controlnet`, `motion_adapter`, `text_encoder` | CLIP's `position_ids` |

Any other key is an error. The prefix `module.` of all keys (`DataParallel`) is removed. diffusers' converters rename the
keys. `tcan/sd15` contains the architectures; nothing is downloaded.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ControlNetModel, MotionAdapter, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_animatediff_checkpoint_to_diffusers,
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from tcan.errors import UserError
from tcan.weights.common import check_keys, check_shapes, quiet
from tcan.weights_file import open_weights

SD15 = Path(__file__).parents[1] / "sd15"  # configurations without weights
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Layout:
    """Layout of one part.

    Args:
        part: name of the part.
        title: name for messages.
        mark: a key, without prefix, that identifies this layout.
        prefix: prefix of the keys; "" if the file contains only this part.
        unused: regular expression of keys, without prefix, that are allowed and ignored.
        convert: diffusers' converter, (weights, config) -> weights with diffusers' keys. None: not a diffusers part.
    """

    part: str
    title: str
    mark: str
    prefix: str = ""
    unused: str = ""
    convert: Callable[..., dict[str, Tensor]] | None = None


def _same_keys(checkpoint: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Converter of files that already have diffusers' keys."""
    return dict(checkpoint)


def _convert_text_encoder(checkpoint: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Original or diffusers' keys to those of `CLIPTextModel`; merges omit `text_model.`."""
    names = {name: name.removeprefix("cond_stage_model.transformer.") for name in checkpoint}
    return {f"text_model.{new.removeprefix('text_model.')}": checkpoint[name] for name, new in names.items()}


def _convert_unet(checkpoint: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """diffusers' converter ignores keys without the prefix of complete checkpoints."""
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in checkpoint.items()}
    return convert_ldm_unet_checkpoint(prefixed, config)


def _layouts() -> tuple[Layout, ...]:
    unet, vae, controlnet = "SD1.5 UNet", "SD1.5 VAE", "SD1.5 ControlNet"
    text, motion = "SD1.5 text encoder", "AnimateDiff motion modules"
    vae_mark, control_mark = "encoder.down.0.block.0.norm1.weight", "input_hint_block.0.weight"
    text_mark = "embeddings.token_embedding.weight"
    text_unused = (
        r"(text_model\.)?embeddings\.position_ids|(text_model\.)?text_projection(\.weight)?|logit_scale"
    )
    return (
        Layout(
            "unet", unet, "input_blocks.0.0.weight", "model.diffusion_model.", "", convert_ldm_unet_checkpoint
        ),
        Layout(
            "vae", vae, vae_mark, "first_stage_model.", r"loss\..*|model_ema\..*", convert_ldm_vae_checkpoint
        ),
        *(
            Layout("text_encoder", text, prefix + text_mark, start, text_unused, _convert_text_encoder)
            for prefix in ("text_model.", "")
            for start in ("cond_stage_model.transformer.", "")
        ),
        Layout("controlnet", controlnet, control_mark, "control_model.", "", convert_controlnet_checkpoint),
        # Files of one part. A ControlNet contains the marks of a UNet, so it comes first.
        Layout("controlnet", controlnet, control_mark, convert=convert_controlnet_checkpoint),
        Layout("controlnet", controlnet, "controlnet_cond_embedding.conv_in.weight", convert=_same_keys),
        Layout("vae", vae, vae_mark, "", r"loss\..*|model_ema\..*", convert_ldm_vae_checkpoint),
        Layout("vae", vae, "encoder.down_blocks.0.resnets.0.norm1.weight", convert=_same_keys),
        Layout("unet", unet, "input_blocks.0.0.weight", convert=_convert_unet),
        Layout("unet", unet, "time_embedding.linear_1.weight", convert=_same_keys),
        Layout(
            "motion_adapter",
            motion,
            "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",
            "",
            r"mid_block\..*",
            convert_animatediff_checkpoint_to_diffusers,
        ),
        Layout(
            "motion_adapter",
            motion,
            "down_blocks.0.motion_modules.0.norm.weight",
            "",
            r"mid_block\..*",
            _same_keys,
        ),
        Layout("pose", "OpenPose body network", "Mconv1_stage2_L1.weight"),
        Layout("hands", "OpenPose hand network", "Mconv7_stage2.weight"),
        Layout("face", "OpenPose face network", "Mconv7_stage2.weight"),
    )


LAYOUTS = _layouts()
HEATMAPS = {"hands": 22, "face": 71}
"""Output channels of the hand and face networks, which have the same keys."""
TITLES = {layout.part: layout.title for layout in LAYOUTS}
# Allowed and ignored in Stable Diffusion checkpoints: tables of the noise schedule, EMA copies of the UNet, textual
# inversions, text encoders of other layouts, and LoRAs of the text encoder.
UNUSED = (
    r"model_ema\..*|betas|logvar|scale_factor|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])"
    r"|denoiser\.(log_)?sigmas|lora_te_.*"
    r"|(cond_stage_model|embedding_manager)\..*|logit_scale|text_projection(\.weight)?"
)
POSITIONS = (".pos_encoder.pe", ".pos_embed.pe")
ANIMATELCM_POSITIONS = 64
"""Positions of motion modules whose file has no position tables: those of AnimateLCM, which were trained with 64."""


def split_parts(path: Path, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split the weights of a file into parts, with the file's keys, without the keys declared as unused.

    Raises:
        UserError: the layout is unknown, or the file contains unexpected keys; the message lists the first three.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    foreign = dict(weights)
    for layout in LAYOUTS:
        if layout.part in parts or layout.prefix + layout.mark not in foreign:
            continue
        if layout.part in HEATMAPS and len(foreign[layout.mark]) != HEATMAPS[layout.part]:
            continue
        found = {name: foreign.pop(name) for name in list(foreign) if name.startswith(layout.prefix)}
        parts[layout.part] = {
            name: tensor
            for name, tensor in found.items()
            if not re.fullmatch(layout.unused, name.removeprefix(layout.prefix))
        }
    if not parts:
        raise UserError(
            f"{path}: unknown layout; provide one of {', '.join(TITLES.values())} in the original layout, or a folder in "
            "diffusers' layout"
        )
    check_keys(str(path), (), (name for name in foreign if not re.fullmatch(UNUSED, name)))
    return parts


def build(part: str, weights: Mapping[str, Tensor] = MappingProxyType({})) -> Any:
    """Build the network of a part at SD1.5's size, with parameters on the meta device.

    weights: of motion modules, whose position tables set the number of positions.
    """
    folder = SD15 / part
    with init_empty_weights(), quiet():
        if part == "text_encoder":
            return CLIPTextModel(CLIPTextConfig.from_pretrained(folder))
        network = {
            "vae": AutoencoderKL,
            "unet": UNet2DConditionModel,
            "controlnet": ControlNetModel,
            "motion_adapter": MotionAdapter,
        }[part]
        config = network.load_config(folder)
        if part == "motion_adapter" and weights:
            config |= {"motion_max_seq_length": num_positions(weights)}
        return network.from_config(config)


def num_positions(weights: Mapping[str, Tensor]) -> int:
    """Number of positions of motion modules: the maximum number of frames of a window."""
    lengths = {tensor.shape[1] for name, tensor in weights.items() if name.endswith(POSITIONS)}
    return max(lengths, default=ANIMATELCM_POSITIONS)


def convert(part: str, where: str, weights: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Convert the weights of one part (of `split_parts`) to the keys and shapes of its network, without reading values.

    Args:
        where: start of error messages.

    Raises:
        UserError: a key or shape does not match the network.
    """
    layout = next(x for x in LAYOUTS if x.part == part and x.prefix + x.mark in weights)
    assert layout.convert is not None
    # Convert placeholders, to learn which key becomes which, and which keys the converter ignores.
    placeholders = {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.items()}
    names = {id(tensor): name for name, tensor in placeholders.items()}
    try:
        converted = layout.convert(placeholders, config=network.config)
    except KeyError as error:  # the converter expects a key that the file lacks
        raise UserError(
            f"{where}: missing keys: {error.args[0]}; provide weights of this architecture"
        ) from None
    if part == "text_encoder" and not hasattr(network, "text_model"):  # transformers >= 5.6
        converted = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    # Converters return None for absent keys, and a view where diffusers uses a matrix instead of a 1x1 convolution.
    found = {
        name: (names[id(tensor if tensor._base is None else tensor._base)], tensor.shape)
        for name, tensor in converted.items()
        if tensor is not None
    }
    expected = network.state_dict()
    computed = {name for name in expected if name.endswith(".pos_embed.pe")}
    tables = {name for name in weights if name.endswith(POSITIONS)}
    check_keys(
        where,
        expected.keys() - found.keys() - computed,
        weights.keys() - tables - {original for original, _ in found.values()}
        | (found.keys() - expected.keys()),
    )
    result = {name: weights[original].reshape(shape) for name, (original, shape) in found.items()}
    check_shapes(where, {name: expected[name] for name in result}, result)
    return result


def original_part(part: str, path: Path) -> dict[str, Tensor]:
    """The weights of one part of a single file, memory-mapped, with the file's keys.

    Raises:
        UserError: as `open_weights` and `split_parts`; the file does not contain this part.
    """
    parts = split_parts(path, open_weights(path))
    if part not in parts:
        titles = ", ".join(TITLES[found] for found in parts)
        raise UserError(f"{part}: {path} contains {titles}; provide a file that contains the {TITLES[part]}")
    return parts[part]


def load_original(part: str, path: Path) -> Any:
    """Load one part of a single file as a network in float32 on the CPU.

    Raises:
        UserError: as `original_part` and `convert`; the position tables of motion modules differ from those of AnimateDiff v2.
    """
    weights = original_part(part, path)
    where = f"{part} from {path}"
    network = build(part, weights)
    converted = convert(part, where, weights, network)
    check_positions(where, weights)
    network.load_state_dict(converted, strict=False, assign=True)
    with quiet():  # diffusers warns about normalization layers that stay in float32
        return network.to(torch.float32).eval()


def check_positions(where: str, weights: Mapping[str, Tensor]) -> None:
    """Require that position tables equal those that diffusers computes and uses instead of the file's.

    Raises:
        UserError: tables of different lengths, or other values.
    """
    frames = num_positions(weights)
    for name, table in weights.items():
        if not name.endswith(POSITIONS):
            continue
        expected = SinusoidalPositionalEmbedding(table.shape[-1], frames).pe
        if table.shape != expected.shape:
            raise UserError(
                f"{where}: {name} has {table.shape[1]} positions, but another table has {frames}; provide AnimateDiff's "
                "motion modules or a fine-tune of them"
            )
        if not torch.allclose(table.float(), expected, rtol=0, atol=5e-3):  # bf16 has 3 digits
            raise UserError(
                f"{where}: {name} differs from AnimateDiff's sinusoidal positions; provide AnimateDiff's motion modules or "
                "a fine-tune of them"
            )
