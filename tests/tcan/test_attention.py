"""Attention processors compared with explicit formulas."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from tcan.attention import Appearance, AppearanceAttention, TemperatureAttention

HEADS, WIDTH = 3, 24
CLOSE = dict(rtol=0, atol=1e-12)


def attention_layer(lora: bool) -> Attention:
    torch.manual_seed(0)
    attn = Attention(query_dim=WIDTH, heads=HEADS, dim_head=WIDTH // HEADS)
    if lora:
        config = LoraConfig(
            r=4, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]
        )
        inject_adapter_in_model(config, attn)
    return attn.double()


def projection(layer: torch.nn.Module) -> Tensor:
    """Return W, or W + (alpha / r) B A with LoRA."""
    if not hasattr(layer, "base_layer"):
        return layer.weight
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return layer.base_layer.weight + 6 / 4 * delta


def softmax_attention(attn: Attention, z: Tensor, context: Tensor, tau: float | Tensor = 1.0) -> Tensor:
    """softmax(Q K^T / sqrt(d) / tau) V per head, for z `[N, C]` and context `[M, C]`."""
    q, k, v = (x @ projection(w).T for x, w in ((z, attn.to_q), (context, attn.to_k), (context, attn.to_v)))
    heads = []
    for q_h, k_h, v_h in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True):
        logits = q_h @ k_h.T / (WIDTH / HEADS) ** 0.5 / tau
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        heads.append(weights @ v_h)
    return torch.cat(heads, -1) @ attn.to_out[0].weight.T + attn.to_out[0].bias


def expected_reference_attention(
    attn: Attention, z: Tensor, features: Tensor, reference_mask: list[bool], frames: int
) -> Tensor:
    rows = []
    for i, z_i in enumerate(z):
        clip = i // frames
        h_a = features[min(clip, len(features) - 1)]
        rows.append(softmax_attention(attn, z_i, torch.cat([z_i, h_a]) if reference_mask[clip] else z_i))
    return torch.stack(rows)


def test_reference_attention_follows_the_formula() -> None:
    for lora in (False, True):
        attn = attention_layer(lora)
        z = torch.randn(3 * 2, 5, WIDTH, dtype=torch.float64)
        for shared in (False, True):
            features = torch.randn(1 if shared else 3, 7, WIDTH, dtype=torch.float64)
            for reference_mask in (None, [True] * 3, [True, False, True], [False, True, True], [False] * 3):
                appearance = Appearance([torch.empty(0), features], reference_mask, num_frames=2)
                out = AppearanceAttention(1)(attn, z, appearance=appearance)
                expected = expected_reference_attention(
                    attn, z, features, reference_mask or [True] * 3, frames=2
                )
                torch.testing.assert_close(out, expected, **CLOSE)


def test_reference_mask_on_the_device_follows_the_formula() -> None:
    attn = attention_layer(lora=True)
    z, features = (torch.randn(n, 5, WIDTH, dtype=torch.float64) for n in (3 * 2, 3))
    for reference_mask in ([True] * 3, [True, False, True], [False] * 3):
        appearance = Appearance([features], torch.tensor(reference_mask), num_frames=2)
        out = AppearanceAttention(0)(attn, z, appearance=appearance)
        expected = expected_reference_attention(attn, z, features, reference_mask, frames=2)
        torch.testing.assert_close(out, expected, **CLOSE)


def test_without_index_or_appearance_it_is_standard_attention() -> None:
    attn = attention_layer(lora=True)
    z, prompt = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    appearance = Appearance([torch.randn(2, 7, WIDTH, dtype=torch.float64)])
    self_attention = torch.stack([softmax_attention(attn, z_i, z_i) for z_i in z])
    cross_attention = torch.stack(
        [softmax_attention(attn, z_i, p_i) for z_i, p_i in zip(z, prompt, strict=True)]
    )
    torch.testing.assert_close(AppearanceAttention(0)(attn, z), self_attention, **CLOSE)
    torch.testing.assert_close(
        AppearanceAttention(None)(attn, z, appearance=appearance), self_attention, **CLOSE
    )
    torch.testing.assert_close(
        AppearanceAttention(None)(attn, z, prompt, appearance=appearance), cross_attention, **CLOSE
    )


def test_temperature_divides_the_logits() -> None:
    attn = attention_layer(lora=False)
    positions = torch.randn(4, 6, WIDTH, dtype=torch.float64)
    tau = torch.tensor([1.0, 1.5, 2.0, 4.0], dtype=torch.float64)
    out = TemperatureAttention()(attn, positions, temperature=tau)
    expected = torch.stack([softmax_attention(attn, x, x, t) for x, t in zip(positions, tau, strict=True)])
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(
        TemperatureAttention()(attn, positions, temperature=torch.ones(4)),
        TemperatureAttention()(attn, positions),
        **CLOSE,
    )


def test_temporal_attention_is_split_at_the_kernel_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    attn = attention_layer(lora=False)
    x = torch.randn(7, 3, WIDTH, dtype=torch.float64)
    tau = torch.linspace(1, 3, 7, dtype=torch.float64)
    processor = TemperatureAttention()
    expected = processor(attn, x, temperature=tau)
    calls = []
    original = F.scaled_dot_product_attention

    def count(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(len(q))
        return original(q, k, v)

    monkeypatch.setattr("tcan.attention.MAX_SEQUENCES", 3)
    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    torch.testing.assert_close(processor(attn, x, temperature=tau), expected)
    assert calls == [3, 3, 1]
