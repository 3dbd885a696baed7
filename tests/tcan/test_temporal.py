"""Temporal layers compared with AnimateDiff's explicit formula, and their conversion to a MotionAdapter."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import MotionAdapter
from torch import Tensor

from tcan.model import TCAN
from tcan.temperature import resize_temperature
from tcan.temporal import TemporalTransformer, motion_unet, temporal_layers, temporal_state_dict, zero_output


def layer(groups: int = 4) -> TemporalTransformer:
    torch.manual_seed(0)
    layer = TemporalTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        norm_num_groups=groups,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=32,
    ).double()
    TemporalTransformer.replace(layer)
    for parameter in layer.parameters():  # includes the norms, which are initialized with 1 and 0
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def animatediff(weights: dict[str, Tensor], clip: Tensor, tau: Tensor, heads: int, groups: int) -> Tensor:
    """AnimateDiff's motion module on a clip `[F, C, h, w]`: statistics per frame, attention per spatial position."""
    frames, channels, height, width = clip.shape
    out = clip.clone()
    normed = []
    for frame in clip:
        grouped = frame.reshape(groups, -1)
        mean, var = grouped.mean(1, keepdim=True), grouped.var(1, unbiased=False, keepdim=True)
        frame = ((grouped - mean) / (var + 1e-6).sqrt()).view(channels, height, width)
        normed.append(frame * weights["norm.weight"][:, None, None] + weights["norm.bias"][:, None, None])
    position = torch.zeros(frames, channels, dtype=torch.float64)
    for t in range(frames):
        for c in range(0, channels, 2):
            angle = t * math.exp(-c / channels * math.log(10000.0))
            position[t, c], position[t, c + 1] = math.sin(angle), math.cos(angle)

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def layer_norm(name: str, x: Tensor) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    block = "transformer_blocks.0."
    for y in range(height):
        for x in range(width):
            h = linear("proj_in", torch.stack([frame[:, y, x] for frame in normed]))
            for number in (1, 2):
                n = layer_norm(f"{block}norm{number}", h) + position
                name = f"{block}attn{number}"
                q, k, v = (linear(f"{name}.to_{p}", n).chunk(heads, -1) for p in "qkv")
                d = channels / heads
                mixed = [
                    torch.softmax(q_h @ k_h.T / math.sqrt(d) / tau[y, x], -1) @ v_h
                    for q_h, k_h, v_h in zip(q, k, v, strict=True)
                ]
                h = h + linear(f"{name}.to_out.0", torch.cat(mixed, -1))
            value, gate = linear(f"{block}ff.net.0.proj", layer_norm(f"{block}norm3", h)).chunk(2, -1)
            h = h + linear(f"{block}ff.net.2", value * F.gelu(gate))
            out[:, :, y, x] += linear("proj_out", h)
    return out


@pytest.mark.parametrize("with_temperature", [False, True])
def test_layer_follows_the_animatediff_formula(with_temperature: bool) -> None:
    module = layer()
    clips = torch.randn(2, 5, 16, 2, 3, dtype=torch.float64)
    tau = torch.ones(2, 2, 3, dtype=torch.float64)
    if with_temperature:
        tau = 1 + 3 * torch.rand(2, 2, 3, dtype=torch.float64)
        module.temperature = tau
    out = module(clips.flatten(0, 1), num_frames=5).unflatten(0, (2, 5))
    expected = torch.stack(
        [animatediff(module.state_dict(), c, t, 2, 4) for c, t in zip(clips, tau, strict=True)]
    )
    # diffusers stores its table of positional embeddings in float32
    torch.testing.assert_close(out, expected, rtol=0, atol=3e-6)


def test_single_frames_and_zero_output_layers_pass_unchanged() -> None:
    module, x = layer(), torch.randn(6, 16, 2, 3, dtype=torch.float64)
    assert torch.equal(module(x, num_frames=1), x)
    assert not torch.equal(module(x, num_frames=3), x)
    zero_output(module)
    assert torch.equal(module(x, num_frames=3), x)


def test_temperature_one_equals_no_temperature() -> None:
    module, x = layer(), torch.randn(6, 16, 2, 3, dtype=torch.float64)
    without_temperature = module(x, num_frames=3)
    module.temperature = torch.ones(16, 24)
    torch.testing.assert_close(module(x, num_frames=3), without_temperature, rtol=0, atol=1e-13)
    assert torch.equal(resize_temperature(torch.ones(16, 24), 2, 2, 3), torch.ones(12))


def test_temperature_limit_excludes_larger_grids() -> None:
    module, x = layer(), torch.randn(6, 16, 2, 3, dtype=torch.float64)
    without_temperature = module(x, num_frames=3)
    module.temperature = torch.rand(16, 24) + 1
    with_temperature = module(x, num_frames=3)
    assert not torch.equal(with_temperature, without_temperature)
    for limit, expected in ((3, with_temperature), (2, without_temperature)):  # the grid is 2 x 3
        module.temperature_limit = limit
        assert torch.equal(module(x, num_frames=3), expected)


def test_gradient_checkpointing_does_not_change_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        module, x = layer(), torch.linspace(-1, 1, 6 * 16 * 6, dtype=torch.float64).sin().view(6, 16, 2, 3)
        module.gradient_checkpointing = checkpointing
        module._gradient_checkpointing_func = lambda block, *inputs: torch.utils.checkpoint.checkpoint(
            block, *inputs, use_reentrant=False
        )
        module(x, num_frames=3).square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_weights_round_trip_through_a_motion_adapter(pretrained: dict, model: TCAN, tmp_path: Path) -> None:
    adapter = pretrained["motion_adapter"]
    assert temporal_state_dict(model.denoiser).keys() == adapter.state_dict().keys()
    model.float()  # diffusers builds and loads in float32
    saved = temporal_state_dict(model.denoiser)
    model.motion_adapter().save_pretrained(tmp_path)
    loaded = motion_unet(pretrained["unet"], MotionAdapter.from_pretrained(tmp_path))
    assert all(torch.equal(value.float(), saved[key]) for key, value in temporal_state_dict(loaded).items())
    assert len(temporal_layers(loaded)) == len(temporal_layers(model.denoiser)) == 4 + 8


def test_incompatible_motion_adapters_are_rejected(pretrained: dict) -> None:
    config = dict(pretrained["motion_adapter"].config)
    for change in ({"use_motion_mid_block": True}, {"motion_norm_num_groups": 4}):
        with pytest.raises(ValueError):
            motion_unet(pretrained["unet"], MotionAdapter.from_config({**config, **change}))
