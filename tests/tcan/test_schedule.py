"""Options of the noise schedule compared with the formulas of their papers."""

import pytest
import torch
from diffusers import DDIMScheduler

from tcan.errors import UserError
from tcan.schedule import min_snr_weight, noise_schedule, sampler
from tcan.weights.pretrained import load_scheduler


def pretrained_scheduler() -> DDIMScheduler:
    return load_scheduler("sd15")


def expected_alphas() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def test_default_schedule_equals_the_pretrained_schedule() -> None:
    default = noise_schedule(pretrained_scheduler())
    for key, value in pretrained_scheduler().config.items():
        assert key.startswith("_") or default.config[key] == value
    torch.testing.assert_close(default.alphas_cumprod.double(), expected_alphas(), rtol=1e-5, atol=0)


def test_zero_terminal_snr_follows_the_paper() -> None:
    """Lin et al., algorithm 1: shift sqrt(a) so that the last value is 0, then scale to preserve the first value."""
    scheduler = noise_schedule(pretrained_scheduler(), "v_prediction", zero_terminal_snr=True)
    root = expected_alphas().sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, rtol=1e-3, atol=1e-6)
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999  # sampling starts from pure noise
    with pytest.raises(UserError, match="requires v_prediction"):
        noise_schedule(pretrained_scheduler(), "epsilon", zero_terminal_snr=True)


def test_min_snr_weight_follows_the_formula() -> None:
    timestep = torch.tensor([0, 100, 400, 999])
    for kind in ("epsilon", "v_prediction"):
        weights = min_snr_weight(noise_schedule(pretrained_scheduler(), kind), timestep, 5.0)
        for t, weight in zip(timestep.tolist(), weights.tolist(), strict=True):
            snr = (expected_alphas()[t] / (1 - expected_alphas()[t])).item() + (kind == "v_prediction")
            assert weight == pytest.approx(min(snr, 5.0) / snr, rel=1e-4)
    zero_terminal = noise_schedule(pretrained_scheduler(), "v_prediction", zero_terminal_snr=True)
    assert min_snr_weight(zero_terminal, torch.tensor([999]), 5.0) == 1


def test_other_schedulers_use_the_same_noise_schedule() -> None:
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "DDIMScheduler"):
        other = sampler(noise_schedule(pretrained_scheduler(), "v_prediction"), name)
        assert type(other).__name__ == name and other.config.prediction_type == "v_prediction"
        torch.testing.assert_close(other.alphas_cumprod.double(), expected_alphas(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["Euler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_unknown_schedulers_are_rejected(name: str) -> None:
    with pytest.raises(UserError, match=f"scheduler {name}: not supported; use one of DDIMScheduler, "):
        sampler(pretrained_scheduler(), name)


def test_schedulers_without_zero_terminal_snr_are_rejected() -> None:
    scheduler = noise_schedule(pretrained_scheduler(), "v_prediction", zero_terminal_snr=True)
    assert sampler(scheduler, "EulerDiscreteScheduler").config.rescale_betas_zero_snr
    with pytest.raises(UserError, match="PNDMScheduler: does not support the zero terminal SNR"):
        sampler(scheduler, "PNDMScheduler")
