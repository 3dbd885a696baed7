"""Checks of one denoising step: UNet, scaling factor of the VAE, text encoder, ControlNet.

All predict the noise of noised latents of the sample. The error is the mean squared error of the noise, whose variance is 1.
It is compared with that of the best linear predictor for latents of the same variance v, which knows only the noise level:
for a signal fraction a of the noised latent, its error is a v / (a v + 1 - a). The ratio of both does not depend much on
the image or the noise level: about 1 for a network that recognizes nothing, and far below 1 for a trained one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.doctor.finding import Finding, grade
from pipelines.doctor.subject import Subject, seeded_noise

TIMESTEPS = (50, 200, 400, 600, 800)
NOISES = 4
OK, SUSPICIOUS = 0.6, 0.9
"""Upper limits of the ratio to the linear predictor. The mini UNet has 0.34, without training more than 10."""
BLIND = 0.5
"""Error at the last timestep from which a UNet does not see the noise, which is more than 95 % of its input there."""
SCALE_TIMESTEPS = (200, 400)
"""With more noise, the scale of the latent is hardly visible; with less, the error depends mostly on details."""
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
SD15_SCALING, SD15_CHANNELS = 0.18215, 4
GAIN, WINS = 0.01, 0.75
"""ControlNet: lower limits of the mean relative gain, and of the fraction of noises and timesteps with a gain."""
PARTS = ("vae", "unet", "text_encoder", "scheduler")


class NoisedSample:
    """The sample's latent, noised at some timesteps, and the errors of noise predictions for it."""

    def __init__(self, subject: Subject, noises: int = NOISES, timesteps: Sequence[int] = TIMESTEPS) -> None:
        self.latent, self.prompt = subject.latent(), subject.prompt()
        self.scheduler, self.noises = subject.networks["scheduler"], noises
        self.noise = seeded_noise(noises, *self.latent.shape[1:]).to(subject.device)
        self.timesteps = timesteps
        self.alphas = [self.scheduler.alphas_cumprod[t].item() for t in timesteps]

    @torch.no_grad()
    def errors(
        self,
        unet: Any,
        scale: float = 1.0,
        prompt: Tensor | None = None,
        controlnet: Any = None,
        pose: Tensor | None = None,
    ) -> Tensor:
        """Errors of the predicted noise, `[T, N]`, with the latent multiplied by `scale`."""
        prompt = (self.prompt if prompt is None else prompt).expand(self.noises, -1, -1)
        rows = []
        for t in self.timesteps:
            timestep = torch.full((self.noises,), t, device=self.noise.device)
            noisy = self.scheduler.add_noise(
                (self.latent * scale).expand_as(self.noise), self.noise, timestep
            )
            options = {}
            if controlnet is not None and pose is not None:
                condition = pose.expand(self.noises, -1, -1, -1)
                down, middle = controlnet(
                    noisy, timestep, prompt, controlnet_cond=condition, return_dict=False
                )
                options = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            prediction = unet(noisy, timestep, prompt, **options).sample
            rows.append((prediction - self.noise).square().flatten(1).mean(1))
        return torch.stack(rows).cpu()

    def ratio(self, errors: Tensor, scale: float = 1.0) -> float:
        """Mean over the timesteps of the error divided by that of the linear predictor."""
        variance = self.latent.var().item() * scale**2
        linear = [a * variance / (a * variance + 1 - a) for a in self.alphas]
        return sum(e / max(b, 1e-12) for e, b in zip(errors.mean(1).tolist(), linear, strict=True)) / len(
            linear
        )


def noise_prediction(subject: Subject) -> Finding:
    """The UNet predicts the noise far better than the same network with random weights and than a linear predictor."""
    with subject.on_device("unet") as (unet,):
        test = NoisedSample(subject)
        errors = test.errors(unet)
    torch.manual_seed(0)
    random = type(unet).from_config(unet.config).to(subject.device).eval()
    random_errors = NoisedSample(subject, 1).errors(random)
    del random
    ratio, gain = test.ratio(errors), (errors.mean() / random_errors.mean()).item()
    values = ", ".join(f"{e:.3f}" for e in errors.mean(1).tolist())
    return Finding(
        "unet",
        grade(ratio <= OK and gain <= 0.5, ratio <= SUSPICIOUS and gain <= 0.5),
        f"noise error {values} at timesteps {', '.join(map(str, TIMESTEPS))}; with random weights "
        f"{random_errors.mean():.2f}; {ratio:.2f} times that of a linear predictor",
        f"at most {OK} times the error of a linear predictor, which knows only the noise level, and 50 % of that of random "
        "weights",
        "if vae, scaling factor or text_encoder are not OK, fix them first; else use a UNet of SD1.5 that predicts the noise "
        "(no v-prediction), and compare its file with the original",
    )


def scaling_factor(subject: Subject) -> Finding:
    """The UNet predicts best for latents with the VAE's scaling factor, not for smaller or larger ones."""
    with subject.on_device("unet") as (unet,):
        test = NoisedSample(subject, timesteps=SCALE_TIMESTEPS)
        ratios = {scale: test.ratio(test.errors(unet, scale), scale) for scale in SCALES}
    factor = subject.networks["vae"].config.scaling_factor
    best = min(ratios, key=lambda scale: ratios[scale] if math.isfinite(ratios[scale]) else math.inf)
    undecided = not ratios[best] <= SUSPICIOUS
    is_sd15 = subject.networks["vae"].config.latent_channels == SD15_CHANNELS
    is_known = not is_sd15 or math.isclose(factor, SD15_SCALING, rel_tol=1e-3)
    found = f"scaling_factor {factor:g}; the UNet fits best at {best:g} times this factor"
    if undecided:
        found = f"scaling_factor {factor:g}; undecided, because the UNet fits at no factor"
    return Finding(
        "scaling factor",
        grade(best == 1 and not undecided and is_known, undecided or best == 1),
        f"{found} (standard deviation of the scaled latent {test.latent.std():.2f})",
        "best at 1 times" + (f"; {SD15_SCALING} for VAEs with 4 latent channels of SD1.5" if is_sd15 else ""),
        f"correct scaling_factor in the VAE's config.json (SD1.5: {SD15_SCALING}; 0.13025 is that of SDXL's VAE, which "
        "does not fit)",
    )


def empty_prompt(subject: Subject) -> Finding:
    """The UNet predicts better with the text encoder's output than with the same values in another order."""
    with subject.on_device("unet") as (unet,):
        test = NoisedSample(subject)
        errors = test.errors(unet)
        order = torch.randperm(test.prompt.shape[-1], generator=torch.Generator().manual_seed(0))
        shuffled = test.ratio(test.errors(unet, prompt=test.prompt[..., order.to(test.prompt.device)]))
    ratio = test.ratio(errors)
    undecided = not errors[-1].mean().item() <= BLIND
    gain = 1 - ratio / shuffled
    found = f"noise error {gain:+.0%} lower than with shuffled values of its output"
    return Finding(
        "text_encoder",
        grade(gain >= 0.2 and ratio <= SUSPICIOUS, undecided or gain >= 0.2),
        "undecided, because the UNet does not recognize noise" if undecided else found,
        "at least 20 % lower: the UNet was trained with this text encoder's empty prompt",
        "use the text encoder of SD1.5 (CLIP ViT-L/14), and compare its file with the original",
    )


def pose_control(subject: Subject) -> Finding:
    """The sample's pose makes the prediction better than no pose and than the pose upside down."""
    with subject.on_device("unet", "controlnet") as (unet, controlnet):
        # At the first timestep, the pose is visible in the latent.
        test, pose = NoisedSample(subject, timesteps=TIMESTEPS[1:]), subject.pose_image()
        right, wrong = (
            test.errors(unet, controlnet=controlnet, pose=drawn) for drawn in (pose, pose.flip(-2))
        )
        none = test.errors(unet)
    gains = [(1 - right / other).flatten() for other in (none, wrong)]
    means = [gain.mean().item() for gain in gains]
    wins = [(gain > 0).float().mean().item() for gain in gains]
    return Finding(
        "controlnet",
        grade(
            min(means) >= GAIN and min(wins) >= WINS and none[-1].mean().item() <= BLIND,
            means[1] >= GAIN and wins[1] >= WINS,
        ),
        f"noise error with the pose {means[0]:+.1%} lower than without ({wins[0]:.0%} of the cases), {means[1]:+.1%} lower "
        f"than with the pose upside down ({wins[1]:.0%})",
        f"both at least {GAIN:.0%} lower, in at least {WINS:.0%} of the cases: a ControlNet for poses knows where the body is",
        "if unet is not OK, fix it first; else use the OpenPose ControlNet of SD1.5 (not one for edges or depth)",
    )
