"""Load single-file checkpoints in the original layouts of their projects, at SD1.5's sizes.

| file, for example | parts | ignored keys |
|---|---|---|
| `v1-5-pruned-emaonly.safetensors`, any SD1.5 fine-tune | one or more of `unet`, `vae`, `text_encoder` | tables of the noise schedule, `model_ema.`, CLIP's `position_ids` |
| `vae-ft-mse-840000-ema-pruned.ckpt` | `vae` | `loss.`, `model_ema.` |
| `control_v11p_sd15_openpose.pth` | `controlnet` | none |
| `mm_sd_v15_v2.ckpt` | `motion_adapter` | motion modules of the middle block, which TCAN does not have |
| `body_pose_model.pth` | `pose` | none |

Any other key is an error. diffusers' converters rename the keys. `tcan/sd15` contains the architectures; nothing is
downloaded.
"""

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ControlNetModel, MotionAdapter, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_animatediff_checkpoint_to_diffusers,
    convert_controlnet_checkpoint,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from tcan.errors import UserError, first_line
from tcan.weights.common import check_keys, check_shapes, quiet

SD15 = Path(__file__).parents[1] / "sd15"  # configurations without weights
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Layout:
    """Original layout of one part.

    Args:
        title: name for messages.
        mark: a key, without prefix, that identifies this layout.
        prefixes: possible prefixes of the keys; "" if the file contains only this part.
        unused: regular expression of keys, without prefix, that are allowed and ignored.
        convert: diffusers' converter, (weights, config) -> weights with diffusers' keys. None: not a diffusers part.
    """

    title: str
    mark: str
    prefixes: tuple[str, ...]
    unused: str = ""
    convert: Callable[..., dict[str, Tensor]] | None = None


LAYOUTS = {
    "unet": Layout(
        "SD1.5 UNet",
        "input_blocks.0.0.weight",
        ("model.diffusion_model.",),
        convert=convert_ldm_unet_checkpoint,
    ),
    "vae": Layout(
        "SD1.5 VAE",
        "encoder.down.0.block.0.norm1.weight",
        ("first_stage_model.", ""),
        r"loss\..*|model_ema\..*",
        convert_ldm_vae_checkpoint,
    ),
    "text_encoder": Layout(
        "SD1.5 text encoder",
        "text_model.embeddings.token_embedding.weight",
        ("cond_stage_model.transformer.",),
        r"text_model\.embeddings\.position_ids",
        lambda checkpoint, config: convert_ldm_clip_checkpoint(checkpoint),
    ),
    "controlnet": Layout(
        "SD1.5 ControlNet",
        "input_hint_block.0.weight",
        ("control_model.", ""),
        convert=convert_controlnet_checkpoint,
    ),
    "motion_adapter": Layout(
        "AnimateDiff motion modules",
        "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",
        ("",),
        r"mid_block\..*",
        convert_animatediff_checkpoint_to_diffusers,
    ),
    "pose": Layout("OpenPose body network", "Mconv1_stage2_L1.weight", ("",)),
}
# Allowed and ignored in Stable Diffusion checkpoints: tables of the noise schedule, EMA copies of the UNet.
UNUSED = (
    r"model_ema\..*|betas|logvar|scale_factor|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])"
)


def open_weights(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a `.safetensors` file or a PyTorch pickle on the CPU, by name.

    Pickles in PyTorch's format before 1.6, which is not a zip file, are read into memory.

    Raises:
        UserError: the file does not exist, is not a weights file, or is a pickle that contains code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in _INERT]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except pickle.UnpicklingError as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: contains {foreign[1]}, which could execute code; provide the weights as .safetensors"
            ) from None
        raise UserError(
            f"{path}: not a weights file (neither safetensors nor a PyTorch pickle); provide another file"
        ) from None
    except Exception as error:  # torch.load can raise any exception on a file that is not a pickle
        raise UserError(
            f"{path}: not a weights file, or incomplete ({first_line(error)}); copy or download it again"
        ) from None
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # trainers save their state next to it
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{path}: not a weights file: contains values other than tensors; provide another file"
        )
    return content


class _Inert:
    """Replaces the other objects in old Lightning checkpoints when they are unpickled; ignores all arguments and state."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
)


def split_parts(path: Path, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split the weights of a file into parts, with the file's keys, without the keys declared as unused.

    Raises:
        UserError: the layout is unknown, or the file contains unexpected keys; the message lists the first three.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    foreign = dict(weights)
    for part, layout in LAYOUTS.items():
        for prefix in layout.prefixes:
            if prefix + layout.mark in foreign:
                found = {name: foreign.pop(name) for name in list(foreign) if name.startswith(prefix)}
                parts[part] = {
                    name: tensor
                    for name, tensor in found.items()
                    if not re.fullmatch(layout.unused, name.removeprefix(prefix))
                }
    if not parts:
        titles = ", ".join(layout.title for layout in LAYOUTS.values())
        raise UserError(
            f"{path}: unknown layout; provide one of {titles} in the original layout, or a folder in diffusers' layout"
        )
    check_keys(str(path), (), (name for name in foreign if not re.fullmatch(UNUSED, name)))
    return parts


def build(part: str) -> Any:
    """Build the network of a part at SD1.5's size, with parameters on the meta device."""
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
        return network.from_config(network.load_config(folder))


def convert(part: str, where: str, weights: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Convert the weights of one part (of `split_parts`) to the keys and shapes of its network, without reading values.

    Args:
        where: start of error messages.

    Raises:
        UserError: a key or shape does not match the network.
    """
    layout = LAYOUTS[part]
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
    tables = {name for name in weights if name.endswith(".pos_encoder.pe")}
    check_keys(
        where,
        expected.keys() - found.keys() - computed,
        weights.keys() - tables - {original for original, _ in found.values()}
        | (found.keys() - expected.keys()),
    )
    result = {name: weights[original].reshape(shape) for name, (original, shape) in found.items()}
    check_shapes(where, {name: expected[name] for name in result}, result)
    return result


def load_original(part: str, path: Path) -> Any:
    """Load one part of a single file as a network in float32 on the CPU.

    Raises:
        UserError: as `open_weights`, `split_parts` and `convert`; the file does not contain this part; the position
            tables of motion modules differ from those of AnimateDiff v2.
    """
    parts = split_parts(path, open_weights(path))
    if part not in parts:
        titles = ", ".join(LAYOUTS[found].title for found in parts)
        raise UserError(
            f"{part}: {path} contains {titles}; provide a file that contains the {LAYOUTS[part].title}"
        )
    where = f"{part} from {path}"
    network = build(part)
    weights = convert(part, where, parts[part], network)
    for name, tensor in parts[part].items():
        if name.endswith(".pos_encoder.pe"):
            _check_positions(f"{where}: {name}", tensor, network.config.motion_max_seq_length)
    network.load_state_dict(weights, strict=False, assign=True)
    return network.to(torch.float32).eval()


def _check_positions(where: str, table: Tensor, frames: int) -> None:
    """Require that a position table equals the one that diffusers computes and uses instead of the file's.

    Raises:
        UserError: another length or other values.
    """
    expected = SinusoidalPositionalEmbedding(table.shape[-1], frames).pe
    if table.shape != expected.shape:
        raise UserError(
            f"{where}: supports {table.shape[1]} frames, expected {frames}; provide mm_sd_v15_v2 or a fine-tune of it"
        )
    if not torch.allclose(table.float(), expected, rtol=0, atol=5e-3):  # bf16 has 3 digits
        raise UserError(
            f"{where}: differs from AnimateDiff's sinusoidal positions; provide mm_sd_v15_v2 or a fine-tune of it"
        )
