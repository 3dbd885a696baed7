"""Check of the VAE: it reconstructs the image of a person."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.doctor.finding import Finding, grade
from pipelines.doctor.subject import Subject
from tcan.pixels import from_vae_output, to_vae_input

FACTOR = 8
MARGIN = 3.0  # dB


@torch.no_grad()
def reconstruction(subject: Subject) -> Finding:
    """PSNR of the decoded latent, compared with the image reduced to the resolution of the latent.

    A latent has one position per 8 x 8 pixels. A VAE whose result is no better than an image of that resolution has lost all
    that its channels should contain. Networks with random weights are near 10 dB.
    """
    image = torch.from_numpy(subject.sample.image)[None].to(subject.device)
    truth = image.float() / 255
    with subject.on_device("vae") as (vae,):
        latent = vae.encode(to_vae_input(image, torch.float32)).latent_dist.mean
        value = psnr(from_vae_output(vae.decode(latent).sample), truth)
    small = F.interpolate(truth.movedim(-1, 1), scale_factor=1 / FACTOR, mode="area")
    blurred = F.interpolate(small, size=truth.shape[1:3], mode="bicubic").clamp(0, 1).movedim(1, -1)
    floor = psnr(blurred, truth)
    return Finding(
        "vae",
        grade(value >= floor + MARGIN, value >= floor),
        f"PSNR of the reconstruction: {value:.1f} dB",
        f"at least {floor + MARGIN:.1f} dB, {MARGIN:g} dB more than the image at 1/{FACTOR} of its resolution",
        "use the VAE of SD1.5, and compare its file with the original",
    )


def psnr(image: Tensor, truth: Tensor) -> float:
    """PSNR in dB of values in [0, 1]; NaN if a value is NaN."""
    return -10 * math.log10(max(F.mse_loss(image, truth).item(), 1e-10))
