"""LoRA files merged into the denoising UNet: the right weights, exact restoration, files of the layouts in use."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.config.parser import load_config
from pipelines.inference import load_pipeline
from tcan.errors import UserError
from tcan.pipeline import TCANPipeline
from tests.tcan.test_pipeline import dance, random_image

RANK = 4


@pytest.fixture
def pipe(model_folder: Path) -> TCANPipeline:
    pipe = TCANPipeline.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def base(pipe: TCANPipeline, name: str) -> nn.Module:
    module = pipe.tcan.denoiser.get_submodule(name)
    return module.base_layer if isinstance(module, BaseTunerLayer) else module


def layers(pipe: TCANPipeline) -> list[str]:
    """Layers of the LoRA of AnimateLCM and of other LCM files: attention, feed-forward, projections and convolutions."""
    names = [
        name
        for name, module in pipe.tcan.denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name and "motion_modules" not in name
    ]
    return [
        name.removesuffix(".base_layer") for name in names if ".attentions." in name or ".resnets." in name
    ]


def write_lora(pipe: TCANPipeline, path: Path, layout: str) -> dict[str, Tensor]:
    """Write a random LoRA with alpha = 2; returns dW of each layer."""
    generator = torch.Generator().manual_seed(0)
    file, expected = {}, {}
    for name in layers(pipe):
        shape = base(pipe, name).weight.shape
        down = torch.randn(RANK, *shape[1:], generator=generator) * 0.05
        up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator) * 0.05
        if layout == "kohya":
            key = f"lora_unet_{name.replace('.', '_')}"
            file |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(2.0),
            }
        else:
            file |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        alpha = 2.0 if layout == "kohya" else RANK
        expected[name] = torch.einsum("or,r...->o...", up.flatten(1), down) * alpha / RANK
    save_file(file, path)
    return expected


def frames(pipe: TCANPipeline, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    options = dict(retarget="none", steps=2, window=2, overlap=0, output_type="latent") | options
    return pipe(random_image(), dance(2), generator=generator, **options).frames


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_lora_is_merged_and_restored_exactly(pipe: TCANPipeline, tmp_path: Path, layout: str) -> None:
    before = {name: tensor.clone() for name, tensor in pipe.tcan.state_dict().items()}
    plain = frames(pipe)
    expected = write_lora(pipe, tmp_path / "lora.safetensors", layout)
    original = {name: base(pipe, name).weight.clone() for name in expected}
    pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="lcm")
    for scale in (1.0, 0.5):
        pipe.fuse_lora(lora_scale=scale)
        for name, delta in expected.items():
            torch.testing.assert_close(
                base(pipe, name).weight, original[name] + scale * delta, atol=1e-6, rtol=1e-5
            )
    assert not torch.allclose(frames(pipe), plain, atol=1e-3)
    pipe.set_adapters("lcm", 0.0)
    assert torch.equal(frames(pipe), plain)
    with pytest.raises(UserError, match="a LoRA is merged"):
        pipe.save_pretrained(tmp_path / "model")
    pipe.set_adapters(["lcm"], [3.0])
    pipe.unload_lora_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.tcan.state_dict().items())
    assert torch.equal(frames(pipe), plain)


def test_two_loras_add_up(pipe: TCANPipeline, tmp_path: Path) -> None:
    expected = write_lora(pipe, tmp_path / "lora.safetensors", "peft")
    name = next(iter(expected))
    original = base(pipe, name).weight.clone()
    for adapter in ("a", "b"):
        pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name=adapter)
    pipe.set_adapters(["a", "b"], [0.5, 2.0])
    torch.testing.assert_close(base(pipe, name).weight, original + 2.5 * expected[name], atol=1e-6, rtol=1e-5)


def test_unusable_files_are_user_errors(pipe: TCANPipeline, tmp_path: Path) -> None:
    name, path = layers(pipe)[0], tmp_path / "lora.safetensors"
    shape = base(pipe, name).weight.shape
    down, up = torch.zeros(RANK, shape[1:].numel()), torch.zeros(shape[0], RANK)
    for content, reason in (
        (
            {"unet.no_block.to_q.lora_A.weight": down, "unet.no_block.to_q.lora_B.weight": up},
            "no_block.to_q is not in",
        ),
        ({f"unet.{name}.lora_A.weight": down[:, 1:], f"unet.{name}.lora_B.weight": up}, "has the shape"),
        ({"text_encoder.x.lora_A.weight": down, "text_encoder.x.lora_B.weight": up}, "no layer of the UNet"),
    ):
        save_file({key: tensor.contiguous() for key, tensor in content.items()}, path)
        with pytest.raises(UserError, match=reason):
            pipe.load_lora_weights(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="a Git LFS pointer"):
        pipe.load_lora_weights(path)
    with pytest.raises(UserError, match="not loaded; loaded are: none"):
        pipe.set_adapters("lcm")


def test_animatelcm_recipe_runs_from_the_configuration(
    model_folder: Path, pipe: TCANPipeline, tmp_path: Path
) -> None:
    """Few steps of `LCMScheduler` with a LoRA of AnimateLCM's layout."""
    write_lora(pipe, tmp_path / "AnimateLCM_sd15_t2v_lora.safetensors", "kohya")
    config = load_config(
        "--animate.lora", str(tmp_path / "AnimateLCM_sd15_t2v_lora.safetensors"), "--animate.lora_scale", "0.8",
        "--animate.scheduler", "LCMScheduler",
    )  # fmt: skip
    lcm = load_pipeline(model_folder, config)
    lcm.set_progress_bar_config(disable=True)
    assert type(lcm.scheduler).__name__ == "LCMScheduler"
    first = frames(lcm, steps=4, guidance_scale=1.5)
    assert first.isfinite().all() and torch.equal(first, frames(lcm, steps=4, guidance_scale=1.5))
    with pytest.raises(UserError, match="steps = 51: not supported by LCMScheduler"):
        frames(lcm, steps=51)
