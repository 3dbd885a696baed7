"""APPA: target projections, zero initialization, and the LoRA file."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors.torch import load_file

from tcan.appa import appa_state_dict, load_appa_state_dict, save_appa
from tcan.model import TCAN


def expected_targets(attentions: dict[str, int]) -> set[str]:
    return {
        f"{block}.attentions.{i}.transformer_blocks.0.{attention}.{projection}"
        for block, count in attentions.items()
        for i in range(count)
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v")
    }


def test_lora_is_on_exactly_the_documented_projections(fresh: TCAN) -> None:
    blocks = (
        {f"down_blocks.{i}": 1 for i in range(3)}
        | {"mid_block": 1}
        | {f"up_blocks.{i}": 2 for i in (1, 2, 3)}
    )
    assert {k.removesuffix(".lora_A.weight") for k in appa_state_dict(fresh.denoiser) if "lora_A" in k} == (
        expected_targets(blocks)
    )
    config = fresh.denoiser.peft_config["default"]
    assert (config.r, config.lora_alpha) == (16, 16)
    for name, value in appa_state_dict(fresh.denoiser).items():
        assert value.any() == ("lora_A" in name)


def test_saved_file_loads_as_a_diffusers_lora(pretrained: dict, model: TCAN, tmp_path: Path) -> None:
    save_appa(model.denoiser, tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {name.removeprefix("unet.") for name in saved} == appa_state_dict(model.denoiser).keys()
    # Load with diffusers' LoRA loader into a UNet without APPA.
    unet = UNet2DConditionModel.from_config(pretrained["unet"].config).double()
    unet.load_state_dict(pretrained["unet"].state_dict())
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        tmp_path, return_lora_metadata=True
    )
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    appa_layer = model.denoiser.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    x = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(layer(x), appa_layer(x), rtol=0, atol=1e-12)


def test_loading_is_exact_and_rejects_other_names(pretrained: dict, model: TCAN) -> None:
    other = TCAN(**pretrained).denoiser
    state = appa_state_dict(model.denoiser)
    load_appa_state_dict(other, state)
    assert all(torch.equal(value, state[key]) for key, value in appa_state_dict(other).items())
    name = next(iter(state))
    for invalid in (
        {k: v for k, v in state.items() if k != name},
        {**state, "unexpected.lora_A.weight": state[name]},
    ):
        with pytest.raises(KeyError):
            load_appa_state_dict(other, invalid)


def test_lora_delta_is_scaled_by_alpha_over_rank(pretrained: dict) -> None:
    torch.manual_seed(0)
    unet = TCAN(**pretrained, lora_rank=4, lora_alpha=8).denoiser
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 32, dtype=torch.float64)
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + 8 / 4 * delta).T, rtol=0, atol=1e-12)
