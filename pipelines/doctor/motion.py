"""Check of the motion adapter: it makes the frames of a static clip agree."""

import torch

from pipelines.doctor.finding import Finding, grade
from pipelines.doctor.subject import Subject, seeded_noise
from tcan.temporal import motion_unet

FRAMES = 8
TIMESTEPS = (400, 600, 800)
OK, SUSPICIOUS = 0.75, 0.95
PARTS = ("vae", "unet", "text_encoder", "scheduler", "motion_adapter")


@torch.no_grad()
def agreement(subject: Subject) -> Finding:
    """Variance between the predicted frames of a static clip with independent noise, and their error.

    With independent noise, frames differ unless they exchange information. The error must not rise, because frames that are
    equal but wrong would agree as well.
    """
    latent, prompt, scheduler = subject.latent(), subject.prompt(), subject.networks["scheduler"]
    network = motion_unet(subject.networks["unet"], subject.networks["motion_adapter"])
    network = network.to(subject.device).eval()
    noise = seeded_noise(FRAMES, *latent.shape[1:]).to(subject.device)
    variances, errors = [], []
    for t in TIMESTEPS:
        timestep = torch.full((FRAMES,), t, device=subject.device)
        noisy = scheduler.add_noise(latent.expand_as(noise), noise, timestep).movedim(0, 1)  # [C, F, h, w]
        together = network(noisy[None], timestep[:1], prompt.expand(FRAMES, -1, -1)).sample[0].movedim(1, 0)
        alone = network(noisy.movedim(1, 0)[:, :, None], timestep, prompt.expand(FRAMES, -1, -1)).sample[
            :, :, 0
        ]
        # The error of the noise is that of the predicted image, times a constant factor.
        differences = [prediction - noise for prediction in (together, alone)]
        with_layers, without = ((d.var(0).mean().item(), d.square().mean().item()) for d in differences)
        variances.append(with_layers[0] / without[0])
        errors.append(with_layers[1] / without[1])
    variance, error = sum(variances) / len(variances), sum(errors) / len(errors)
    return Finding(
        "motion_adapter",
        grade(variance <= OK and error <= 1, variance <= SUSPICIOUS and error <= 1.05),
        f"variance between the frames of a static clip {variance:.2f} times that without temporal layers; noise error "
        f"{error:.2f} times",
        f"variance at most {OK} times, error at most 1: temporal layers exchange information between frames",
        "if unet is not OK, fix it first; else use AnimateDiff's motion modules of SD1.5 (v1.5.2), and compare their file "
        "with the original",
    )
