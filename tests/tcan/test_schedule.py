"""The options of the noise schedule against their papers' formulas."""

import pytest
import torch
from diffusers import DDIMScheduler

from tcan.errors import UserError
from tcan.schedule import min_snr_weight, noise_schedule, sampler
from tcan.weights.pretrained import load_scheduler


def base() -> DDIMScheduler:
    return load_scheduler("sd15")


def alphas() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def test_without_options_it_is_the_pretrained() -> None:
    same = noise_schedule(base())
    for key, value in base().config.items():
        assert key.startswith("_") or same.config[key] == value
    torch.testing.assert_close(same.alphas_cumprod.double(), alphas(), rtol=1e-5, atol=0)


def test_zero_terminal_snr() -> None:
    """Lin et al., algorithm 1: sqrt(a) shifted so that its last is 0, scaled so that its first stays."""
    scheduler = noise_schedule(base(), "v_prediction", zero_terminal_snr=True)
    root = alphas().sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, rtol=1e-3, atol=1e-6)
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999  # sampling starts where there is nothing but noise
    with pytest.raises(UserError, match="needs v_prediction"):
        noise_schedule(base(), "epsilon", zero_terminal_snr=True)


def test_min_snr_gamma() -> None:
    timestep = torch.tensor([0, 100, 400, 999])
    for kind in ("epsilon", "v_prediction"):
        weights = min_snr_weight(noise_schedule(base(), kind), timestep, 5.0)
        for t, weight in zip(timestep.tolist(), weights.tolist(), strict=True):
            snr = (alphas()[t] / (1 - alphas()[t])).item() + (kind == "v_prediction")
            assert weight == pytest.approx(min(snr, 5.0) / snr, rel=1e-4)
    zero = noise_schedule(base(), "v_prediction", zero_terminal_snr=True)
    assert min_snr_weight(zero, torch.tensor([999]), 5.0) == 1


def test_samplers_keep_the_schedule() -> None:
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "DDIMScheduler"):
        other = sampler(noise_schedule(base(), "v_prediction"), name)
        assert type(other).__name__ == name and other.config.prediction_type == "v_prediction"
        torch.testing.assert_close(other.alphas_cumprod.double(), alphas(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["Euler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_samplers_that_there_are_not(name: str) -> None:
    with pytest.raises(UserError, match=f"scheduler {name}: is none of DDIMScheduler, "):
        sampler(base(), name)


def test_samplers_that_know_no_zero_terminal_snr() -> None:
    scheduler = noise_schedule(base(), "v_prediction", zero_terminal_snr=True)
    assert sampler(scheduler, "EulerDiscreteScheduler").config.rescale_betas_zero_snr
    with pytest.raises(UserError, match="PNDMScheduler: knows no zero terminal SNR"):
        sampler(scheduler, "PNDMScheduler")
