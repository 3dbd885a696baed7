"""The noise schedule: what a training may change of the base's, how it weighs timesteps, and who samples on it."""

import inspect

from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from tcan.errors import UserError


def noise_schedule(
    scheduler: DDIMScheduler, prediction_type: str = "epsilon", zero_terminal_snr: bool = False
) -> DDIMScheduler:
    """The schedule that a model is trained and sampled with; as it's called here without options: the paper's.

    Args:
        scheduler: the base's.
        prediction_type: "epsilon", the noise; or "v_prediction", `v = sqrt(a) noise - sqrt(1 - a) latents` (Salimans and
            Ho, arXiv 2202.00512).
        zero_terminal_snr: the betas rescaled so that at the last timestep nothing is left of the image, and sampling
            starts there (Lin et al., arXiv 2305.08891). The noise can't be predicted from noise alone to any use, so it
            needs "v_prediction".

    Raises:
        UserError: `zero_terminal_snr` without "v_prediction".
    """
    changes: dict[str, str | bool] = {"prediction_type": prediction_type}
    if zero_terminal_snr:
        if prediction_type != "v_prediction":
            raise UserError(f"a zero terminal SNR needs v_prediction, not {prediction_type}")
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return DDIMScheduler.from_config(scheduler.config, **changes)


def min_snr_weight(scheduler: DDIMScheduler, timestep: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma's weight of the loss at timesteps `[B]` -> `[B]` (Hang et al., arXiv 2303.09556).

    With SNR = a / (1 - a): min(SNR, gamma) / SNR where noise is predicted; min(SNR + 1, gamma) / (SNR + 1) where v is, as
    diffusers' trainers have it (the paper's min(SNR, gamma) / (SNR + 1) would drop the timesteps of next to no signal).
    """
    alpha = scheduler.alphas_cumprod.to(timestep.device)[timestep]
    snr = alpha / (1 - alpha)
    if scheduler.config.prediction_type == "v_prediction":
        snr = snr + 1
    return snr.clamp(max=gamma) / snr


def sampler(scheduler: DDIMScheduler, name: str) -> SchedulerMixin:
    """Another of diffusers' schedulers, by its class name, on the same noise schedule.

    Raises:
        UserError: no such scheduler, or one that can't run on this schedule.
    """
    known = {
        kind.__name__: kind
        for kind in scheduler.compatibles
        if "beta_schedule" in inspect.signature(kind.__init__).parameters  # EDM's has none
    }
    if name not in known:
        raise UserError(f"scheduler {name}: is none of {', '.join(sorted(known))}")
    takes = inspect.signature(known[name].__init__).parameters
    if scheduler.config.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in takes:
        raise UserError(f"scheduler {name}: knows no zero terminal SNR, which this model was trained with")
    # Without Runge-Kutta steps at the start, as SD1.5's own configuration of PNDM has it.
    options = {"skip_prk_steps": True} if "skip_prk_steps" in takes else {}
    return known[name].from_config(scheduler.config, **options)
