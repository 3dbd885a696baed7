"""The single files that people have, in the layouts of the projects they come from, at SD1.5's sizes.

| file, such as | holds | may hold besides, unused |
|---|---|---|
| `v1-5-pruned-emaonly.safetensors`, any SD1.5 fine-tune | `unet`, `vae`, `text_encoder`, each or some | the schedule's tables, `model_ema.`, CLIP's `position_ids` |
| `vae-ft-mse-840000-ema-pruned.ckpt` | `vae` | `loss.`, `model_ema.` |
| `control_v11p_sd15_openpose.pth` | `controlnet` | - |
| `mm_sd_v15_v2.ckpt` | `motion_adapter` | the middle block's modules, which TCAN doesn't have |
| `body_pose_model.pth` | `pose` | - |

Any other name is an error. Names become diffusers' by diffusers' own converters, the architectures are those of
`tcan/sd15`; nothing is downloaded.
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

SD15 = Path(__file__).parents[1] / "sd15"  # the architectures: configurations without weights
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Layout:
    """One part in its project's own layout.

    Args:
        title: what a person calls it.
        mark: a name that only this layout has, without prefix.
        prefixes: of its names, any of them; "" where the part is a file of its own.
        unused: of its names without prefix, those that it may have and TCAN has no use for.
        convert: diffusers' converter, (weights, config) -> weights by diffusers' names; None: not a diffusers part.
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
# Of a Stable Diffusion checkpoint as a whole: tables of the noise schedule, averaged copies of the UNet.
UNUSED = (
    r"model_ema\..*|betas|logvar|scale_factor|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])"
)


def open_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or of a pickle by their names, on the CPU, read when they are first used.

    Raises:
        UserError: no such file, or no file of weights; a pickle that holds code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in _INERT]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: cannot be opened as weights alone: it holds {foreign[1]}, which may be any code; give a "
                ".safetensors of it"
            ) from None
        raise UserError(
            f"{path}: is not a file of weights (neither safetensors nor torch's pickle)"
        ) from None
    except Exception as error:  # of bytes that are no pickle, the reader may raise anything
        raise UserError(
            f"{path}: is not a file of weights, or not a whole one ({first_line(error)})"
        ) from None
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # beside it a trainer's own state
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: is not a file of weights: it holds other things than tensors")
    return content


class _Inert:
    """Takes the place of what old Lightning checkpoints hold beside the weights: keeps its arguments from doing anything."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
)


def parts_of(path: Path, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A file's weights by part, under the names they have in it, without what is declared as unused.

    Raises:
        UserError: none of the known layouts; a name that none of them has, naming the first few.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    foreign = dict(weights)
    for part, layout in LAYOUTS.items():
        for prefix in layout.prefixes:
            if prefix + layout.mark in foreign:
                own = {name: foreign.pop(name) for name in list(foreign) if name.startswith(prefix)}
                parts[part] = {
                    name: tensor
                    for name, tensor in own.items()
                    if not re.fullmatch(layout.unused, name.removeprefix(prefix))
                }
    if not parts:
        titles = ", ".join(layout.title for layout in LAYOUTS.values())
        raise UserError(
            f"{path}: is none of the files known here ({titles}, in their original layouts); of diffusers' layout give "
            "the folder"
        )
    check_keys(str(path), (), (name for name in foreign if not re.fullmatch(UNUSED, name)))
    return parts


def build(part: str) -> Any:
    """The network of a part at SD1.5's size, without memory for its parameters."""
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


def convert(part: str, what: str, weights: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """One part's weights (`parts_of`) under the names, and with the shapes, of its network.

    Only names and shapes are looked at.

    Raises:
        UserError: a name or shape that doesn't fit, `what` in front.
    """
    layout = LAYOUTS[part]
    assert layout.convert is not None
    # Converted are stand-ins, one for each name: so that what became of a name can be told, and what was passed over.
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.items()}
    names = {id(tensor): name for name, tensor in stand_ins.items()}
    try:
        converted = layout.convert(stand_ins, config=network.config)
    except KeyError as error:  # half of a pair
        raise UserError(f"{what}: does not fit: lacks {error.args[0]}") from None
    if part == "text_encoder" and not hasattr(network, "text_model"):  # transformers 5.6 dropped this level
        converted = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    # A converter gives None for what isn't there, and a view for a 1x1 convolution that is a matrix in diffusers.
    found = {
        name: (names[id(tensor if tensor._base is None else tensor._base)], tensor.shape)
        for name, tensor in converted.items()
        if tensor is not None
    }
    expected = network.state_dict()
    computed = {name for name in expected if name.endswith(".pos_embed.pe")}
    tables = {name for name in weights if name.endswith(".pos_encoder.pe")}
    check_keys(
        what,
        expected.keys() - found.keys() - computed,
        weights.keys() - tables - {own for own, _ in found.values()} | (found.keys() - expected.keys()),
    )
    result = {name: weights[own].reshape(shape) for name, (own, shape) in found.items()}
    check_shapes(what, {name: expected[name] for name in result}, result)
    return result


def load_original(part: str, path: Path) -> Any:
    """One part out of a single file, as a network in float32 on the CPU.

    Raises:
        UserError: as `open_weights`, `parts_of` and `convert`; a file that doesn't hold this part; motion modules with
            other positions than AnimateDiff v2's.
    """
    parts = parts_of(path, open_weights(path))
    if part not in parts:
        titles = ", ".join(LAYOUTS[found].title for found in parts)
        raise UserError(f"{part}: {path} holds no {LAYOUTS[part].title}, but: {titles}")
    what = f"{part} from {path}"
    network = build(part)
    weights = convert(part, what, parts[part], network)
    for name, tensor in parts[part].items():
        if name.endswith(".pos_encoder.pe"):
            _check_positions(f"{what}: {name}", tensor, network.config.motion_max_seq_length)
    network.load_state_dict(weights, strict=False, assign=True)
    return network.to(torch.float32).eval()


def _check_positions(what: str, table: Tensor, frames: int) -> None:
    """diffusers computes the table of positions, and so leaves out the file's: it must be the same."""
    expected = SinusoidalPositionalEmbedding(table.shape[-1], frames).pe
    if table.shape != expected.shape:
        raise UserError(
            f"{what}: is for {table.shape[1]} frames, not {frames}; give mm_sd_v15_v2 or one made from it"
        )
    if not torch.allclose(table.float(), expected, rtol=0, atol=5e-3):  # bf16 has 3 digits
        raise UserError(f"{what}: is not AnimateDiff's sinusoidal positions")
