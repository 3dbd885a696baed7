"""LoRA files of SD1.5, merged into the weights of the denoising UNet for inference."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from tcan.errors import UserError, first_line
from tcan.impostor import impostor

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass
class Lora:
    """A LoRA: dW = scale alpha / r B A for some layers.

    Args:
        factors: for each layer, A (already multiplied by alpha / r) and B.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    scale: float = 1.0


@dataclass
class LoraMerger:
    """Merges LoRAs into a UNet and restores the UNet's weights exactly: they are copied to host memory."""

    unet: nn.Module
    loras: dict[str, Lora] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, lora: Lora) -> None:
        """Merge another LoRA.

        Raises:
            UserError: the name is in use, or the weights are offloaded.
        """
        if name in self.loras:
            raise UserError(f"LoRA {name}: already loaded; choose another adapter_name, or unload it")
        for layer in lora.factors:
            if _weight(self.unet, layer).is_meta:
                raise UserError(
                    f"LoRA {name}: the weights are offloaded; load it before enable_sequential_cpu_offload"
                )
        self.loras[name] = lora
        self.merge()

    def merge(self) -> None:
        """Set the weights to the original ones plus all LoRAs at their scales."""
        layers = {layer for lora in self.loras.values() for layer in lora.factors}
        for layer in sorted(layers | self.originals.keys()):
            weight = _weight(self.unet, layer)
            original = self.originals.setdefault(layer, weight.detach().to("cpu", copy=True))
            merged = original.float()
            for lora in self.loras.values():
                if layer in lora.factors and lora.scale:
                    down, up = lora.factors[layer]
                    merged = merged + lora.scale * (up @ down).reshape(merged.shape)
            with torch.no_grad():
                weight.copy_(merged)
        self.originals = {layer: self.originals[layer] for layer in layers}

    def remove_all(self) -> None:
        """Restore the original weights."""
        self.loras.clear()
        self.merge()


def read_lora(source: str | Path, unet: nn.Module, weight_name: str | None = None) -> Lora:
    """Read the UNet's layers of a LoRA file in diffusers', PEFT's or kohya's layout.

    Layers of the text encoder are ignored: TCAN uses the empty prompt only.

    Args:
        source: a file, a folder or a Hub id, as in diffusers.
        weight_name: name of the file in the folder or repository.

    Raises:
        UserError: the file cannot be read, or has layers that the UNet lacks or that have other shapes.
    """
    path = Path(source).expanduser()
    where = f"LoRA {source}"
    if (path := path / weight_name if weight_name and path.is_dir() else path).is_file() and (
        found := impostor(path)
    ):
        raise UserError(f"{where}: {found}")
    try:
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(path) if path.exists() else str(source), weight_name=None if path.is_file() else weight_name
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{where}: cannot be read ({first_line(error)}); check the file and the name"
        ) from None
    weights = convert_unet_state_dict_to_peft(
        {name.removeprefix("unet."): tensor for name, tensor in state.items() if name.startswith("unet.")}
    )
    weights = {name.replace(".processor.", "."): tensor.float() for name, tensor in weights.items()}
    scales = {
        _layer(name.removeprefix("unet.").removesuffix(".alpha")): value
        for name, value in (alphas or {}).items()
    }
    factors = {}
    for name in [name for name in weights if name.endswith(DOWN)]:
        layer = name.removesuffix(DOWN)
        down, up = weights.pop(name).flatten(1), weights.pop(layer + UP, torch.zeros(0, 0)).flatten(1)
        try:
            shape = _weight(unet, layer).shape
        except AttributeError:
            raise UserError(f"{where}: layer {layer} is not in the UNet; use a LoRA of SD1.5") from None
        if up.shape[1] != len(down) or (len(up), down.shape[1]) != (shape[0], shape[1:].numel()):
            raise UserError(
                f"{where}: {layer} has the shape {[len(up), down.shape[1]]}, expected {[shape[0], shape[1:].numel()]}; use "
                "a LoRA of SD1.5"
            )
        factors[layer] = down * (scales.get(layer, len(down)) / len(down)), up
    if weights or not factors:
        names = ", ".join(sorted(weights)[:3]) or "no layer of the UNet"
        raise UserError(f"{where}: unsupported content: {names}; use a plain LoRA of SD1.5")
    return Lora(factors)


def _layer(name: str) -> str:
    """Name of the layer from the name of an alpha, which may contain that of the down weight."""
    converted = next(iter(convert_unet_state_dict_to_peft({name: None})))
    return converted.removesuffix(DOWN).replace(".processor.", ".")


def _weight(unet: nn.Module, layer: str) -> nn.Parameter:
    module = unet.get_submodule(layer)
    return (module.get_base_layer() if isinstance(module, BaseTunerLayer) else module).weight
