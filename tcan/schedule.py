"""Noise schedule: training options, loss weights per timestep, and other diffusers schedulers for sampling."""

import inspect

from diffusers import DDIMScheduler, LCMScheduler, SchedulerMixin
from torch import Tensor

from tcan.errors import UserError


def noise_schedule(
    scheduler: DDIMScheduler, prediction_type: str = "epsilon", zero_terminal_snr: bool = False
) -> DDIMScheduler:
    """Return the schedule for training and sampling a model. The defaults are the paper's schedule.

    Args:
        scheduler: scheduler of the pretrained models.
        prediction_type: "epsilon" (the noise) or "v_prediction", `v = sqrt(a) noise - sqrt(1 - a) latents` (Salimans and
            Ho, arXiv 2202.00512).
        zero_terminal_snr: rescale the betas so that the last timestep contains no signal, and start sampling there (Lin
            et al., arXiv 2305.08891). Predicting noise from pure noise is trivial, so this requires "v_prediction".

    Raises:
        UserError: `zero_terminal_snr` without "v_prediction".
    """
    changes: dict[str, str | bool] = {"prediction_type": prediction_type}
    if zero_terminal_snr:
        if prediction_type != "v_prediction":
            raise UserError(
                f"zero_terminal_snr: requires v_prediction, not {prediction_type}; set prediction_type to v_prediction"
            )
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return DDIMScheduler.from_config(scheduler.config, **changes)


def min_snr_weight(scheduler: DDIMScheduler, timestep: Tensor, gamma: float) -> Tensor:
    """Return the min-SNR-gamma loss weights `[B]` of timesteps `[B]` (Hang et al., arXiv 2303.09556).

    With SNR = a / (1 - a), the weight is min(SNR, gamma) / SNR for "epsilon" and min(SNR + 1, gamma) / (SNR + 1) for
    "v_prediction", as in diffusers' training scripts. The paper's min(SNR, gamma) / (SNR + 1) for v approaches 0 where
    the SNR does, which would ignore these timesteps.
    """
    # diffusers.training_utils.compute_snr rounds differently (relative difference up to 3.4e-7), which would change
    # the results of existing runs.
    alpha = scheduler.alphas_cumprod.to(timestep.device)[timestep]
    snr = alpha / (1 - alpha)
    if scheduler.config.prediction_type == "v_prediction":
        snr = snr + 1
    return snr.clamp(max=gamma) / snr


def sampler(scheduler: DDIMScheduler, name: str) -> SchedulerMixin:
    """Return another diffusers scheduler, given its class name, with the same noise schedule.

    Raises:
        UserError: the scheduler is unknown or incompatible with this schedule.
    """
    supported = {
        cls.__name__: cls
        for cls in scheduler.compatibles
        if "beta_schedule" in inspect.signature(cls.__init__).parameters  # excludes the EDM schedulers
    } | {"LCMScheduler": LCMScheduler}
    if name not in supported:
        raise UserError(f"scheduler {name}: not supported; use one of {', '.join(sorted(supported))}")
    parameters = inspect.signature(supported[name].__init__).parameters
    if scheduler.config.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in parameters:
        raise UserError(
            f"scheduler {name}: does not support the zero terminal SNR that the model was trained with; "
            "use another scheduler, such as DDIMScheduler"
        )
    # PNDM without Runge-Kutta steps at the start, as in SD1.5's configuration.
    options = {"skip_prk_steps": True} if "skip_prk_steps" in parameters else {}
    return supported[name].from_config(scheduler.config, **options)
