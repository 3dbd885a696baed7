"""The complete TCAN: effect of each input, trainable parameters of each stage, and parameter counts at SD1.5 size."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel

from tcan.model import TCAN, diffusion_loss
from tcan.temporal import temporal_layers, zero_output

CLOSE = dict(rtol=0, atol=1e-11)


def pretrained_prediction(pretrained: dict, inputs: dict) -> torch.Tensor:
    """Prediction of the pretrained models: the UNet with the ControlNet's residuals, for each image."""
    batch, frames = inputs["noisy"].shape[:2]
    noisy, t = inputs["noisy"].flatten(0, 1), inputs["timestep"].repeat_interleave(frames)
    prompt = pretrained["empty_prompt"].expand(batch * frames, -1, -1)
    down, middle = pretrained["controlnet"](noisy, t, prompt, inputs["pose"].flatten(0, 1), return_dict=False)
    eps = pretrained["unet"](
        noisy, t, prompt, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    return eps.unflatten(0, (batch, frames))


@torch.no_grad()
def test_untrained_model_without_reference_equals_the_pretrained_models(
    pretrained: dict, fresh: TCAN, batch
) -> None:
    inputs = batch(2, 1)
    out = fresh(**inputs, reference_mask=torch.tensor([False, True]))
    expected = pretrained_prediction(pretrained, inputs)
    torch.testing.assert_close(out[0], expected[0], **CLOSE)
    assert (out[1] - expected[1]).abs().max() > 1e-4
    torch.testing.assert_close(
        fresh(**inputs, reference_mask=torch.zeros(2, dtype=torch.bool)), expected, **CLOSE
    )


@torch.no_grad()
def test_zero_output_temporal_layers_predict_each_frame_independently(fresh: TCAN, batch) -> None:
    for layer in temporal_layers(fresh.denoiser).values():
        zero_output(layer)
    inputs = batch(2, 3)
    clip = fresh(**inputs)
    for frame in range(3):
        single = {k: v[:, frame : frame + 1] if k in ("noisy", "pose") else v for k, v in inputs.items()}
        torch.testing.assert_close(clip[:, frame : frame + 1], fresh(**single), **CLOSE)


@torch.no_grad()
def test_every_input_changes_the_prediction(model: TCAN, batch) -> None:
    inputs = batch(1, 3)
    out = model(**inputs)
    torch.testing.assert_close(model(**inputs), out, rtol=0, atol=0)
    changes = {
        "noisy": inputs["noisy"] + 0.1,
        "timestep": (inputs["timestep"] + 300) % 1000,
        "pose": torch.zeros_like(inputs["pose"]),
        "reference_latent": -inputs["reference_latent"],
    }
    for name, value in changes.items():
        assert (model(**{**inputs, name: value}) - out).abs().max() > 1e-4, name


@torch.no_grad()
def test_only_temporal_layers_connect_frames(model: TCAN, batch) -> None:
    inputs = batch(1, 3)
    changed = {**inputs, "noisy": inputs["noisy"].clone()}
    changed["noisy"][:, 0] += 1
    assert (model(**changed) - model(**inputs))[:, 2].abs().max() > 1e-5
    for network in (model.denoiser, model.controlnet):
        for layer in temporal_layers(network).values():
            zero_output(layer)
    torch.testing.assert_close(model(**changed)[:, 2], model(**inputs)[:, 2], **CLOSE)


@torch.no_grad()
def test_temperature_affects_only_its_own_denoise_call(model: TCAN, batch) -> None:
    inputs = batch(2, 3)
    residuals = model.pose_residuals(inputs["noisy"], inputs["timestep"], inputs["pose"])
    features = model.appearance(inputs["reference_latent"], inputs["timestep"])

    def denoise(temperature: torch.Tensor | None) -> torch.Tensor:
        return model.denoise(inputs["noisy"], inputs["timestep"], residuals, features, None, temperature)

    without_temperature = denoise(None)
    tau = 1 + 3 * torch.rand(64, 128)
    assert (denoise(tau) - without_temperature).abs().max() > 1e-6
    torch.testing.assert_close(denoise(torch.ones(64, 128)), without_temperature, **CLOSE)
    torch.testing.assert_close(denoise(torch.stack([tau, tau])), denoise(tau), **CLOSE)
    assert torch.equal(denoise(None), without_temperature)


@torch.no_grad()
@pytest.mark.parametrize("clips", [1, 2])
def test_guidance_in_one_call_equals_two_full_passes(model: TCAN, batch, clips: int) -> None:
    """Rows of one clip share residuals, features and down blocks; non-square frames, with and without PTM."""
    inputs = batch(clips, 3)
    noisy, timestep = inputs["noisy"], inputs["timestep"]
    residuals = model.pose_residuals(noisy, timestep, inputs["pose"])
    features = model.appearance(inputs["reference_latent"], timestep)
    tau = 1 + 3 * torch.rand(clips, 64, 128)
    for temperature in (None, tau):
        with_reference = model.denoise(noisy, timestep, residuals, features, None, temperature)
        without = model.denoise(noisy, timestep, residuals, None, None, temperature)
        assert (with_reference - without).abs().max() > 1e-4
        for reference_mask in (
            [False] * clips + [True] * clips,
            [True] * clips + [False] * clips,
            [True] * 2 * clips,
        ):
            rows = model.denoise(noisy, timestep, residuals, features, reference_mask, temperature)
            expected = [(with_reference if reference_mask[row * clips] else without) for row in range(2)]
            torch.testing.assert_close(rows, torch.cat(expected), **CLOSE)


@torch.no_grad()
def test_down_blocks_run_once_for_both_guidance_rows(model: TCAN, batch) -> None:
    inputs, batch_sizes = batch(1, 3), []
    for block in (model.denoiser.down_blocks[0], model.denoiser.up_blocks[-1]):
        block.register_forward_hook(
            lambda _, __, out: batch_sizes.append(len(out[0] if isinstance(out, tuple) else out))
        )
    features = model.appearance(inputs["reference_latent"], inputs["timestep"])
    model.denoise(inputs["noisy"], inputs["timestep"], None, features, [False, True])
    assert batch_sizes == [3, 6]


@torch.no_grad()
def test_precomputed_pose_embeddings_produce_identical_residuals(model: TCAN, batch) -> None:
    inputs = batch(2, 3)
    embedded = model.embed_pose(inputs["pose"])
    assert embedded.shape == (2, 3, 16, 8, 16)
    for timestep in (inputs["timestep"], (inputs["timestep"] + 100) % 1000):
        cached = model.pose_residuals(inputs["noisy"], timestep, embedded)
        encoded = model.pose_residuals(inputs["noisy"], timestep, inputs["pose"])
        assert all(
            torch.equal(a, b) for a, b in zip([*cached[0], cached[1]], [*encoded[0], encoded[1]], strict=True)
        )


def expected_trainable(model: TCAN, stage: int) -> set[str]:
    names = {name for name, _ in model.named_parameters()}
    if stage == 1:
        return {n for n in names if n.startswith("appearance_unet.") or ".lora_" in n}
    return {n for n in names if ".motion_modules." in n}


@pytest.mark.parametrize("stage,frames", [(1, 1), (2, 3)])
def test_each_stage_trains_exactly_its_parameters(model: TCAN, batch, stage: int, frames: int) -> None:
    model.set_stage(stage)
    model.train()
    before = copy.deepcopy({**dict(model.named_parameters()), **dict(model.named_buffers())})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    inputs = batch(2, frames)
    loss = diffusion_loss(
        model,
        DDIMScheduler(),
        inputs.pop("noisy"),
        torch.randn(2, frames, 4, 8, 16, dtype=torch.float64),
        **inputs,
    )
    loss.backward()
    trainable = expected_trainable(model, stage)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trainable), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trainable), name
    optimizer.step()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(value, before[name]) == (name not in trainable), name


def test_frozen_modules_stay_in_eval_mode(model: TCAN) -> None:
    model.set_stage(1)
    model.train()
    assert model.training and model.appearance_unet.training
    assert not model.denoiser.training and not model.controlnet.training
    model.set_stage(2)
    assert not any(m.training for m in model.appearance_unet.modules())
    for network in (model.denoiser, model.controlnet):
        assert all(layer.training for layer in temporal_layers(network).values())
        assert not network.training and not network.conv_in.training
    model.eval()
    assert not any(m.training for m in model.modules())
    with pytest.raises(ValueError):
        model.set_stage(3)


def test_batch_without_references_has_zero_gradients_instead_of_none(model: TCAN, batch) -> None:
    model.set_stage(1)
    model(**batch(2, 1), reference_mask=torch.tensor([False, False])).square().sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.appearance_unet.parameters())
    assert all(p.grad is not None for n, p in model.denoiser.named_parameters() if "lora" in n)


@pytest.mark.parametrize("stage,frames", [(1, 1), (2, 3)])
def test_gradient_checkpointing_does_not_change_gradients(
    model: TCAN, batch, stage: int, frames: int
) -> None:
    model.set_stage(stage)
    reference_mask = torch.tensor([True, False])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        first = model(**batch(2, frames), reference_mask=reference_mask)
        model.eval()(**batch(1, frames))  # a forward of another batch before backward has no effect
        first.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_loss_is_the_mse_on_the_noise(model: TCAN, batch) -> None:
    inputs, scheduler = (
        batch(2, 3),
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    latents, noise = inputs.pop("noisy"), torch.randn(2, 3, 4, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        loss = diffusion_loss(model, scheduler, latents, noise, **inputs)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alpha = (1 - betas).cumprod(0)[inputs["timestep"]].view(2, 1, 1, 1, 1)
        eps = model(noisy=alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, **inputs)
    assert abs(loss.item() - (eps - noise).square().mean().item()) < 1e-5


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_v_prediction_and_min_snr_loss_follow_their_formulas(model: TCAN, batch, gamma: float | None) -> None:
    inputs = batch(2, 3)
    inputs["timestep"] = torch.tensor([40, 700])  # SNR above and below gamma
    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, noise = inputs.pop("noisy"), torch.randn(2, 3, 4, 8, 16, dtype=torch.float64)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[inputs["timestep"]].view(2, 1, 1, 1, 1)
    with torch.no_grad():
        out = model(noisy=alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, **inputs)
        for kind in ("epsilon", "v_prediction"):
            scheduler = DDIMScheduler(**schedule, prediction_type=kind)
            loss = diffusion_loss(model, scheduler, latents, noise, **inputs, snr_gamma=gamma)
            v = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
            error = (out - (v if kind == "v_prediction" else noise)).square().mean((1, 2, 3, 4))
            snr = (alpha / (1 - alpha)).flatten() + (kind == "v_prediction")
            weight = 1.0 if gamma is None else snr.clamp(max=gamma) / snr
            assert loss.item() == pytest.approx((weight * error).mean().item(), rel=1e-4)


@torch.no_grad()
def test_parts_round_trip_and_reject_missing_names(pretrained: dict, model: TCAN, batch) -> None:
    other = TCAN(**pretrained)
    inputs = batch(1, 2)
    assert not torch.equal(other(**inputs), model(**inputs))
    other.load_parts(model.parts())
    assert torch.equal(other(**inputs), model(**inputs))
    for name, part in model.parts().items():
        with pytest.raises((KeyError, RuntimeError)):
            other.load_parts({name: dict(list(part.items())[1:])})


def test_pretrained_models_are_not_modified_or_shared(pretrained: dict) -> None:
    keys = {name: list(pretrained[name].state_dict()) for name in ("unet", "controlnet", "motion_adapter")}
    model = TCAN(**pretrained)
    model.set_stage(1)
    for name, expected in keys.items():
        assert list(pretrained[name].state_dict()) == expected
        assert not {p.data_ptr() for p in pretrained[name].parameters()} & {
            p.data_ptr() for p in model.parameters()
        }


@torch.no_grad()
def test_bfloat16_prediction_is_close_to_float64(model: TCAN, batch) -> None:
    expected = model(**batch(1, 2))
    out = model.to(torch.bfloat16)(
        **{k: v.float() if v.is_floating_point() else v for k, v in batch(1, 2).items()}
    )
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_module_and_parameter_counts_at_sd15_size() -> None:
    """Numbers of modules and trainable parameters on the meta device, compared with explicit sums."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        assert sum(p.numel() for p in unet.parameters()) == 859_520_964  # SD1.5's
        model = TCAN(
            unet,
            ControlNetModel(cross_attention_dim=768),
            MotionAdapter(use_motion_mid_block=False),
            torch.zeros(1, 77, 768),
        )

    def count(stage: int, part: str) -> int:
        model.set_stage(stage)
        return sum(p.numel() for p in getattr(model, part).parameters() if p.requires_grad)

    # Number of spatial transformer blocks by width; one of width 1280 is the middle block.
    spatial = {320: 5, 640: 5, 1280: 6}
    with_reference = [
        m for m in model.denoiser.attn_processors.values() if getattr(m, "index", None) is not None
    ]
    assert sorted(m.index for m in with_reference) == list(range(10))
    lora = [n for n, m in model.denoiser.named_modules() if hasattr(m, "lora_A")]
    assert len(lora) == 16 * 2 * 3
    assert not [n for n in lora if "motion_modules" in n or "to_out" in n]
    # Rank 16: attn1 has three c -> c projections; attn2 has one c -> c and two 768 -> c.
    assert (
        count(1, "denoiser")
        == sum(n * 16 * (4 * 2 * c + 2 * (768 + c)) for c, n in spatial.items())
        == 2_390_016
    )
    # Layers after the last feature: attn1 4c^2 + c, attn2 2c^2 + 2 * 768c + c, two norms 4c, ff 12c^2 + 9c,
    # proj_out c^2 + c, norm 2c and convolution 36c + 4, with c = 320.
    c = 320
    removed = 19 * c * c + 2 * 768 * c + 18 * c + 36 * c + 4
    assert count(1, "appearance_unet") == 859_520_964 - removed == 857_066_560
    assert count(1, "controlnet") == 0

    assert len(temporal_layers(model.denoiser)) == 20
    assert len(temporal_layers(model.controlnet)) == 4
    # Temporal layer of width c: projections 2c^2, two attentions of 4c^2, feed-forward 12c^2, biases and norms 21c.
    width = {320: 5, 640: 5, 1280: 10}
    assert count(2, "denoiser") == sum(n * (22 * c * c + 21 * c) for c, n in width.items()) == 417_137_600
    assert count(2, "controlnet") == 4 * (22 * 1280**2 + 21 * 1280) == 144_286_720
    assert count(2, "appearance_unet") == 0
    for layer in [*temporal_layers(model.denoiser).values(), *temporal_layers(model.controlnet).values()]:
        assert layer.num_attention_heads == 8 and len(layer.transformer_blocks) == 1
    assert model.denoiser.config.use_motion_mid_block is False


def test_import_does_not_load_heavy_dependencies() -> None:
    code = (
        "import sys, tcan, tcan.model; print([m for m in ('ray', 'deepspeed', 'mlflow') if m in sys.modules])"
    )
    package_only = "import sys, tcan; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    for line in (code, package_only):
        assert (
            subprocess.run([sys.executable, "-c", line], capture_output=True, text=True).stdout.strip()
            == "[]"
        )
