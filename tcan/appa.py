"""APPA, the appearance-pose adaptation layer: PEFT LoRA on the denoiser's spatial attentions.

dW = B A on `to_q, to_k, to_v` of attn1 and attn2 in every down, middle and up block (method "Networks"). `to_out` and
the temporal layers have no LoRA.
"""

from pathlib import Path

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

# `.attentions.` contains a UNet's spatial transformers, `.motion_modules.` its temporal transformers.
TARGETS = r".*\.attentions\.\d+\.transformer_blocks\.\d+\.attn[12]\.to_[qkv]"


def add_appa(unet: nn.Module, rank: int = 16, alpha: int = 16) -> None:
    """Add APPA to a diffusers UNet, in place.

    A is initialized from a Gaussian and B with zeros, so the UNet's output does not change.
    """
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=TARGETS)
    )


def appa_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Return APPA's parameters by their names in the UNet."""
    return {name: p for name, p in unet.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def appa_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    """Return APPA's weights under PEFT's names (`down_blocks.0...to_q.lora_A.weight`)."""
    return get_peft_model_state_dict(unet)


def load_appa_state_dict(unet: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the output of `appa_state_dict`.

    Raises:
        KeyError: the names are not exactly those of this UNet.
    """
    if difference := state.keys() ^ appa_state_dict(unet).keys():
        raise KeyError(f"{len(difference)} names of LoRA weights do not match, first: {min(difference)}")
    set_peft_model_state_dict(unet, state)


def save_appa(unet: nn.Module, folder: Path | str) -> None:
    """Write `folder/pytorch_lora_weights.safetensors`, loadable by diffusers pipelines of the same base model."""
    config = unet.peft_config["default"].to_dict()
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder,
        unet_lora_layers=appa_state_dict(unet),
        # Without this metadata, loaders assume alpha = rank.
        unet_lora_adapter_metadata={key: config[key] for key in ("r", "lora_alpha", "target_modules")},
    )
