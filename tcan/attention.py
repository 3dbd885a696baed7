"""Attention processors: reference attention in spatial blocks, and temporal attention with a temperature.

Both are diffusers attention processors. Their inputs arrive through `cross_attention_kwargs`, not through attributes, so
that a checkpointed block recomputes with the inputs of its first run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

MAX_SEQUENCES = 65_535
"""Largest batch of one attention call: the limit of CUDA's grid dimensions in the fused kernels."""


@dataclass
class Appearance:
    """Reference features for reference attention.

    Args:
        features: one feature h_a per reference attention, in execution order: `[B, N, C]`, or `[1, N, C]` to share one
            reference between all clips.
        reference_mask: B bools. Clips with True use reference attention, clips with False use plain self-attention. None:
            all clips use reference attention. A sequence on the host splits the clips into two groups, so that no
            attention waits for the device. With `tcan.appearance.share_down_blocks` it may also be `[G * B]`, G rows
            per clip. A bool tensor on the device keeps all clips in one group, so that a compiled network does not
            depend on its values; the features then have the size of the clips' tokens.
        num_frames: F. The attention's batch is `[B * F, ...]`; all frames of a clip share its feature.
    """

    features: Sequence[Tensor]
    reference_mask: Sequence[bool] | Tensor | None = None
    num_frames: int = 1

    def __post_init__(self) -> None:
        self.rows = None if self.reference_mask is None else len(self.reference_mask)
        if self.rows and 1 < len(self.features[0]) < self.rows:
            self.features = [f.repeat(self.rows // len(f), 1, 1) for f in self.features]
        if isinstance(self.reference_mask, Tensor):
            return
        if self.reference_mask is not None and all(self.reference_mask):
            self.reference_mask = None
        if self.reference_mask is not None:  # indices of the two groups, computed once for all attentions
            indices = range(len(self.reference_mask))
            with_reference = [i for i in indices if self.reference_mask[i]]
            without_reference = [i for i in indices if not self.reference_mask[i]]
            split = [*without_reference, *with_reference]
            self.num_with_reference = len(with_reference)
            self.with_reference, self.without_reference, self.order = (
                self._index(group)
                for group in (with_reference, without_reference, [split.index(i) for i in indices])
            )

    def _index(self, clips: list[int]) -> slice | Tensor:
        """A slice where possible, as in guidance: it needs neither a copy of the clips nor an upload."""
        if clips == list(range(clips[0] if clips else 0, clips[-1] + 1 if clips else 0)):
            return slice(clips[0], clips[-1] + 1) if clips else slice(0, 0)
        # `torch.tensor` on a GPU would wait for all of its work.
        return torch.tensor(clips).to(self.features[0].device, non_blocking=True)


class AppearanceAttention:
    """Attention of a spatial transformer block, with reference attention where an index is set.

    Reference attention concatenates the tokens of z and h_a for keys and values (method "Appearance into denoising"):
    `softmax(Q K^T / sqrt(d)) V` with `Q = W_Q z, K = W_K [z; h_a], V = W_V [z; h_a]`. With APPA the projections are
    LoRA layers; the processor is the same.

    Args:
        index: index of this attention's feature in `Appearance.features`. None: the attention never uses reference
            attention, but accepts the same `cross_attention_kwargs`.
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
        """Map `[B * F, N, C]` to `[B * F, N, C]`.

        captured: if given, stores this attention's input under its index.
        """
        assert attention_mask is None
        if captured is not None and self.index is not None:
            # setdefault: recomputation by gradient checkpointing must not replace the tensor of the first run.
            captured.setdefault(self.index, hidden_states)

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = _split_heads(attn, attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        if appearance is None or self.index is None:
            return _project_output(attn, F.scaled_dot_product_attention(q, k, v))

        feature, mask = appearance.features[self.index], appearance.reference_mask
        if mask is None or isinstance(mask, Tensor):
            mask = mask if mask is None else mask.repeat_interleave(appearance.num_frames, output_size=len(q))
            return _project_output(attn, _reference_attention(attn, q, k, v, feature, mask))

        # Clips with and without a reference run separately. This needs no attention mask, so every fused kernel is
        # usable, and clips without a reference have no extra cost.
        def rows(x: Tensor, index: slice | Tensor) -> Tensor:
            return x.unflatten(0, (-1, appearance.num_frames))[index].flatten(0, 1)

        if len(feature) > 1:
            feature = feature[appearance.with_reference]
        parts = [F.scaled_dot_product_attention(*(rows(x, appearance.without_reference) for x in (q, k, v)))]
        if appearance.num_with_reference:
            q, k, v = (rows(x, appearance.with_reference) for x in (q, k, v))
            parts.append(_reference_attention(attn, q, k, v, feature))
        return _project_output(attn, rows(torch.cat(parts), appearance.order))


class TemperatureAttention:
    """Temporal self-attention with one temperature per spatial position.

    Method "Pose-driven temperature map": `A = softmax((Q K^T / sqrt(d)) / tau)`. The batch dimension is the spatial
    positions, so Q is divided by tau and any fused attention kernel is usable.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Map `[P, F, C]` to `[P, F, C]`, P spatial positions.

        temperature: `[P]`; None: 1 everywhere.
        """
        assert attention_mask is None and encoder_hidden_states is None
        q = attn.to_q(hidden_states)
        if temperature is not None:
            q.div_(temperature[:, None, None])  # in place: keeps the dtype of q, whatever the dtype of tau
        q, k, v = _split_heads(attn, q, attn.to_k(hidden_states), attn.to_v(hidden_states))
        # One sequence per spatial position: about 1450 x 1450 pixels with guidance exceed the limit.
        chunks = zip(*(x.split(MAX_SEQUENCES) for x in (q, k, v)), strict=True)
        parts = [F.scaled_dot_product_attention(*chunk) for chunk in chunks]
        return _project_output(attn, parts[0] if len(parts) == 1 else torch.cat(parts))


def _split_heads(attn: Attention, *projections: Tensor) -> list[Tensor]:
    """Reshape each `[B, N, heads * d]` to `[B, heads, N, d]`."""
    return [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projections]


def _project_output(attn: Attention, x: Tensor) -> Tensor:
    """`[B, heads, N, d] -> [B, N, C]`: concatenate the heads, apply output projection and dropout."""
    return attn.to_out[1](attn.to_out[0](x.transpose(1, 2).flatten(2)))


def _reference_attention(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, feature: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention of q `[R * F, heads, N, d]` to its own tokens k, v and to h_a `[R or 1, M, C]`.

    mask: bool `[R * F]`. Rows with False attend to their own tokens twice, which equals plain self-attention: it doubles
    both the numerator and the denominator of the softmax, and needs no attention mask, so every fused kernel is usable.
    """
    # h_a is projected once per clip, then repeated over the frames.
    k_a, v_a = (
        x.repeat_interleave(len(q) // len(x), dim=0, output_size=len(q))
        for x in _split_heads(attn, attn.to_k(feature), attn.to_v(feature))
    )
    if mask is not None:
        k_a, v_a = (torch.where(mask[:, None, None, None], a, b) for a, b in ((k_a, k), (v_a, v)))
    return F.scaled_dot_product_attention(q, torch.cat([k, k_a], dim=2), torch.cat([v, v_a], dim=2))
