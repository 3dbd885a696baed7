"""The reference image's features: taken from one UNet's middle and up blocks, joined into another's.

`install_appearance`, `capture_features` and `Appearance` work on any diffusers UNet that is made of spatial
transformer blocks (`UNet2DConditionModel`, `UNetMotionModel`), also on one UNet in both roles:

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


def spatial_blocks(part: nn.Module) -> list[BasicTransformerBlock]:
    """The spatial (not temporal) transformer blocks of a part of a UNet, in the order in which they run."""
    return [b for m in part.modules() if isinstance(m, Transformer2DModel) for b in m.transformer_blocks]


def joined_blocks(unet: UNet2DConditionModel | UNetMotionModel) -> list[BasicTransformerBlock]:
    """The transformer blocks of middle and up, in the order in which they run: 10 at SD1.5 size."""
    return spatial_blocks(unet.mid_block) + spatial_blocks(unet.up_blocks)


def install_appearance(unet: UNet2DConditionModel | UNetMotionModel) -> int:
    """Give every spatial attention its processor; those of `joined_blocks` can then capture and join.

    Without `cross_attention_kwargs` the UNet computes what it did before. Returns the number of features.
    """
    for block in spatial_blocks(unet):
        block.attn1.set_processor(AppearanceAttention())
        block.attn2.set_processor(AppearanceAttention())
    blocks = joined_blocks(unet)
    for index, block in enumerate(blocks):
        block.attn1.set_processor(AppearanceAttention(index))
    return len(blocks)


def share_down_blocks(unet: UNetMotionModel) -> None:
    """Let the UNet predict several rows of each clip that differ in their appearance alone, as guidance's do.

    A reference reaches the middle and up blocks only, so what the down blocks make is one and the same for all
    rows. The UNet is given B clips, and an `Appearance` whose `keep` names G rows for each (all clips in their first
    row, then all in their second, ...); what enters the middle block is repeated, and `[G * B, ...]` comes out.
    Residuals of the down blocks are those of B clips, that of the middle block is of G * B.
    """
    unet.mid_block.register_forward_pre_hook(_repeat_for_middle, with_kwargs=True)
    for block in unet.up_blocks:
        block.register_forward_pre_hook(_repeat_for_up, with_kwargs=True)


def _repeat_for_middle(block: nn.Module, args: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> Any:
    """args: hidden states and time embedding, `[B * F, ...]`."""
    appearance = (kwargs["cross_attention_kwargs"] or {}).get("appearance")
    if appearance is None or appearance.rows is None:
        return None
    rows = appearance.rows * appearance.num_frames
    prompt = _repeated(kwargs["encoder_hidden_states"], rows)
    return tuple(_repeated(x, rows) for x in args), {**kwargs, "encoder_hidden_states": prompt}


def _repeat_for_up(block: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> Any:
    """The hidden states come from the middle block, all else from the down blocks' side."""
    rows = len(kwargs["hidden_states"])
    repeated = {
        "temb": _repeated(kwargs["temb"], rows),
        "res_hidden_states_tuple": tuple(_repeated(x, rows) for x in kwargs["res_hidden_states_tuple"]),
    }
    if "encoder_hidden_states" in kwargs:
        repeated["encoder_hidden_states"] = _repeated(kwargs["encoder_hidden_states"], rows)
    return args, {**kwargs, **repeated}


def _repeated(x: Tensor, rows: int) -> Tensor:
    """`[N, ...]` repeated until it has `rows` of them, a multiple of N; itself where it has."""
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.ndim - 1))


def capture_features(
    unet: UNet2DConditionModel, latent: Tensor, timestep: Tensor, prompt: Tensor
) -> list[Tensor]:
    """h_a of every joined block: what enters its self-attention (its hidden state after `norm1`).

    unet: after `install_appearance`. latent `[B, 4, h, w]`, timestep `[B]`, prompt `[B, T, D]`.
    Returns a list of `[B, h_i * w_i, C_i]`.
    """
    captured: dict[int, Tensor] = {}
    unet(latent, timestep, prompt, cross_attention_kwargs={"captured": captured})
    return [captured[i] for i in range(len(captured))]


def appearance_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of the UNet that ends at the last feature: every parameter it keeps has a part in a feature.

    It serves `capture_features` only; what it returns as a prediction means nothing. Its state dict is the
    UNet's without what was dropped.
    """
    unet = copy.deepcopy(unet)
    install_appearance(unet)
    last = joined_blocks(unet)[-1]
    last.attn1 = _LastFeature(last.attn1.processor.index)
    last.norm2 = last.attn2 = None
    last.norm3 = last.ff = nn.Identity()
    unet.up_blocks[-1].attentions[-1].proj_out = nn.Identity()
    unet.conv_norm_out = unet.conv_act = None
    unet.conv_out = nn.Identity()
    return unet


class _LastFeature(nn.Module):
    """Stands where the last feature enters its self-attention: takes the feature, computes nothing."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, hidden_states: Tensor, captured: dict[int, Tensor], **unused: None) -> Tensor:
        captured.setdefault(self.index, hidden_states)
        return hidden_states
