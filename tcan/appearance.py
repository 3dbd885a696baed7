"""Reference features: captured in the middle and up blocks of one UNet, used by the reference attention of another.

`install_appearance`, `capture_features` and `Appearance` work on any diffusers UNet with spatial transformer blocks
(`UNet2DConditionModel`, `UNetMotionModel`). One UNet can have both roles:

    install_appearance(unet)
    features = capture_features(unet, clean_latent, timestep, prompt)
    eps = unet(noisy, timestep, prompt, cross_attention_kwargs={"appearance": Appearance(features)}).sample
"""

import copy
from typing import Any

from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from tcan.attention import AppearanceAttention


def spatial_blocks(module: nn.Module) -> list[BasicTransformerBlock]:
    """Return the spatial (not temporal) transformer blocks in a module, in execution order."""
    return [b for m in module.modules() if isinstance(m, Transformer2DModel) for b in m.transformer_blocks]


def reference_blocks(unet: UNet2DConditionModel | UNetMotionModel) -> list[BasicTransformerBlock]:
    """Return the blocks with reference attention: all of middle and up, in execution order (10 at SD1.5 size)."""
    return spatial_blocks(unet.mid_block) + spatial_blocks(unet.up_blocks)


def install_appearance(unet: UNet2DConditionModel | UNetMotionModel) -> int:
    """Set an `AppearanceAttention` processor on every spatial attention.

    The blocks of `reference_blocks` can then capture features and use reference attention. Without
    `cross_attention_kwargs` the UNet's output does not change.

    Returns:
        Number of features.
    """
    for block in spatial_blocks(unet):
        block.attn1.set_processor(AppearanceAttention())
        block.attn2.set_processor(AppearanceAttention())
    blocks = reference_blocks(unet)
    for index, block in enumerate(blocks):
        block.attn1.set_processor(AppearanceAttention(index))
    return len(blocks)


def share_down_blocks(unet: UNetMotionModel) -> None:
    """Run the down blocks once for several rows of each clip that differ only in the reference, as in guidance.

    Reference attention is in the middle and up blocks only, so the down blocks' outputs are the same for all rows. The
    UNet's inputs are B clips and an `Appearance` with a `reference_mask` of G rows per clip: the first row of all clips,
    then the second row of all clips, and so on. The inputs of the middle block are repeated; the output is
    `[G * B, ...]`. Residuals for the down blocks have batch size B, the residual for the middle block has G * B.
    """
    unet.mid_block.register_forward_pre_hook(_repeat_for_middle, with_kwargs=True)
    for block in unet.up_blocks:
        block.register_forward_pre_hook(_repeat_for_up, with_kwargs=True)


def _repeat_for_middle(block: nn.Module, args: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the middle block. args: hidden states and time embedding, `[B * F, ...]`."""
    appearance = (kwargs["cross_attention_kwargs"] or {}).get("appearance")
    if appearance is None or appearance.rows is None:
        return None
    rows = appearance.rows * appearance.num_frames
    prompt = _repeat(kwargs["encoder_hidden_states"], rows)
    return tuple(_repeat(x, rows) for x in args), {**kwargs, "encoder_hidden_states": prompt}


def _repeat_for_up(block: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an up block. The hidden states are already repeated; the other inputs are not."""
    rows = len(kwargs["hidden_states"])
    repeated = {
        "temb": _repeat(kwargs["temb"], rows),
        "res_hidden_states_tuple": tuple(_repeat(x, rows) for x in kwargs["res_hidden_states_tuple"]),
    }
    if "encoder_hidden_states" in kwargs:
        repeated["encoder_hidden_states"] = _repeat(kwargs["encoder_hidden_states"], rows)
    return args, {**kwargs, **repeated}


def _repeat(x: Tensor, rows: int) -> Tensor:
    """Repeat x `[N, ...]` to `[rows, ...]`, rows a multiple of N. Returns x itself if N = rows."""
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.ndim - 1))


def capture_features(
    unet: UNet2DConditionModel, latent: Tensor, timestep: Tensor, prompt: Tensor
) -> list[Tensor]:
    """Return h_a of every block in `reference_blocks`: the input of its self-attention (hidden state after `norm1`).

    Args:
        unet: a UNet after `install_appearance`.
        latent: `[B, 4, h, w]`.
        timestep: `[B]`.
        prompt: `[B, T, D]`.

    Returns:
        List of `[B, h_i * w_i, C_i]`.
    """
    captured: dict[int, Tensor] = {}
    unet(latent, timestep, prompt, cross_attention_kwargs={"captured": captured})
    return [captured[i] for i in range(len(captured))]


def appearance_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a copy of the UNet truncated after the last feature, so that every parameter contributes to a feature.

    Use it with `capture_features` only; its output is not a prediction. Its state dict is the UNet's without the removed
    layers.
    """
    unet = copy.deepcopy(unet)
    install_appearance(unet)
    last = reference_blocks(unet)[-1]
    last.attn1 = _LastFeature(last.attn1.processor.index)
    last.norm2 = last.attn2 = None
    last.norm3 = last.ff = nn.Identity()
    unet.up_blocks[-1].attentions[-1].proj_out = nn.Identity()
    unet.conv_norm_out = unet.conv_act = None
    unet.conv_out = nn.Identity()
    return unet


class _LastFeature(nn.Module):
    """Replacement for the last self-attention: captures its input and computes nothing."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, hidden_states: Tensor, captured: dict[int, Tensor], **unused: None) -> Tensor:
        captured.setdefault(self.index, hidden_states)
        return hidden_states
