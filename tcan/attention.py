"""The attention processors: appearance tokens joined into keys and values; temporal attention with a
temperature.

Both are ordinary diffusers processors. What they need arrives through `cross_attention_kwargs`, never through
an attribute: a checkpointed block then recomputes with what it was first given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor


@dataclass
class Appearance:
    """What the joined attentions look at besides their own tokens.

    features: per joined attention, in their order: h_a of B clips or of one, then shared: `[B, N, C]` or
    `[1, N, C]`.
    keep: `[B]` bool, the clips that look; the others attend to themselves alone; None: all look. It may
        also name G rows for each clip, `[G * B]` (`tcan.appearance.share_down_blocks`).
    num_frames: F; the attention's batch is `[B * F, ...]`, and the frames of a clip share its feature row.
    """

    features: Sequence[Tensor]
    keep: Tensor | None = None
    num_frames: int = 1

    def __post_init__(self) -> None:
        self.rows = None if self.keep is None else len(self.keep)
        if self.rows and 1 < len(self.features[0]) < self.rows:
            self.features = [f.repeat(self.rows // len(f), 1, 1) for f in self.features]
        if self.keep is not None and self.keep.all():
            self.keep = None
        if self.keep is not None:  # split once for all attentions: each index below is of clips
            device = self.features[0].device
            self.looking = self.keep.nonzero().flatten().to(device)
            self.alone = (~self.keep).nonzero().flatten().to(device)
            self.order = torch.cat([self.looking, self.alone]).argsort()


class AppearanceAttention:
    """Attention of a spatial transformer block: Q from z, K and V from the tokens of z followed by those of
    h_a.

    method "Appearance into denoising": `softmax(Q K^T / sqrt(d)) V` with `Q = W_Q z, K = W_K [z; h_a],
    V = W_V [z; h_a]`; with APPA the projections are LoRA layers and nothing changes here.

    index: this attention's place among the joined ones; None: an attention that never joins (it takes the
    same `cross_attention_kwargs` as the others).
    """

    def __init__(self, index: int | None = None):
        self.index = index

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        appearance: Appearance | None = None,
        captured: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """`[B * F, N, C] -> [B * F, N, C]`. `captured` receives this attention's input under its index."""
        assert attention_mask is None
        if captured is not None and self.index is not None:
            captured.setdefault(
                self.index, hidden_states
            )  # a checkpoint's second run must not replace the first's

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = _heads(attn, attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        if appearance is None or self.index is None:
            return _out(attn, F.scaled_dot_product_attention(q, k, v))

        feature = appearance.features[self.index]
        if appearance.keep is None:
            return _out(attn, _joined(attn, q, k, v, feature))

        # Clips that look and clips that don't are attended apart: no mask, so any fused kernel will do, and
        # the clips that don't look pay nothing.
        def rows(x: Tensor, index: Tensor) -> Tensor:
            return x.unflatten(0, (-1, appearance.num_frames))[index].flatten(0, 1)

        if len(feature) > 1:
            feature = feature[appearance.looking]
        parts = [F.scaled_dot_product_attention(*(rows(x, appearance.alone) for x in (q, k, v)))]
        if len(appearance.looking):
            q, k, v = (rows(x, appearance.looking) for x in (q, k, v))
            parts.insert(0, _joined(attn, q, k, v, feature))
        return _out(attn, rows(torch.cat(parts), appearance.order))


class TemperatureAttention:
    """Temporal self-attention whose logits are divided by one temperature per place.

    method "Pose-driven temperature map": `A = softmax((Q K^T / sqrt(d)) / tau)`. The batch runs over places, so
    the division is one of Q, and any fused attention computes it.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """`[P, F, C] -> [P, F, C]`; temperature `[P]`, None for 1 everywhere."""
        assert attention_mask is None and encoder_hidden_states is None
        q = attn.to_q(hidden_states)
        if temperature is not None:
            q.div_(temperature[:, None, None])  # in place, and exact in whatever dtype tau has
        q, k, v = _heads(attn, q, attn.to_k(hidden_states), attn.to_v(hidden_states))
        return _out(attn, F.scaled_dot_product_attention(q, k, v))


def _heads(attn: Attention, *projections: Tensor) -> list[Tensor]:
    """`[B, N, heads * d] -> [B, heads, N, d]` each."""
    return [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projections]


def _out(attn: Attention, x: Tensor) -> Tensor:
    """`[B, heads, N, d] -> [B, N, C]`: heads joined, output projection, dropout."""
    return attn.to_out[1](attn.to_out[0](x.transpose(1, 2).flatten(2)))


def _joined(attn: Attention, q: Tensor, k: Tensor, v: Tensor, feature: Tensor) -> Tensor:
    """Attention of `[R * F, heads, N, d]` to its own tokens and to h_a `[R or 1, M, C]`."""
    # h_a is projected once per clip, then repeated over its frames.
    k_a, v_a = (
        x.repeat_interleave(len(q) // len(x), dim=0, output_size=len(q))
        for x in _heads(attn, attn.to_k(feature), attn.to_v(feature))
    )
    return F.scaled_dot_product_attention(q, torch.cat([k, k_a], dim=2), torch.cat([v, v_a], dim=2))
