"""What the checks of `tcan doctor` examine: a configuration, a device, the loaded networks, and a sample."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.config import Config
from pipelines.doctor.sample import Sample
from tcan.pixels import to_controlnet_input, to_vae_input
from tcan.pose import draw_poses
from tcan.weights import encode_empty_prompt


@dataclass
class Subject:
    """Networks are in float32 on the CPU; each check moves those that it needs to the device and back."""

    config: Config
    device: torch.device
    sample: Sample
    model: str | None = None
    """Trained model for the animation, in the forms of `--model`; None: the untrained networks."""
    networks: dict[str, Any] = field(default_factory=dict)
    """Loaded parts: names of `tcan.weights.pretrained.NETWORKS`, "scheduler" and "pose"."""
    info: dict[str, dict[str, str]] = field(default_factory=dict)
    """Source and fingerprint of each loaded part."""

    @contextmanager
    def on_device(self, *parts: str) -> Iterator[tuple[Any, ...]]:
        """Context in which these networks are on the device."""
        networks = tuple(self.networks[part] for part in parts)
        try:
            yield tuple(network.to(self.device) for network in networks)
        finally:
            for network in networks:
                network.to("cpu")

    @torch.no_grad()
    def latent(self) -> Tensor:
        """The scaled latent of the sample, float32 `[1, C, h, w]` on the device (the mean of the VAE's distribution)."""
        image = torch.from_numpy(self.sample.image)[None].to(self.device)
        with self.on_device("vae") as (vae,):
            mean = vae.encode(to_vae_input(image, torch.float32)).latent_dist.mean
            return mean * vae.config.scaling_factor

    def prompt(self) -> Tensor:
        """The text encoder's output for the empty prompt, `[1, T, D]` on the device."""
        return encode_empty_prompt(self.networks["text_encoder"]).to(self.device)

    def pose_image(self) -> Tensor:
        """The drawn pose of the sample, `[1, 3, H, W]` in [0, 1] on the device."""
        height, width = self.sample.image.shape[:2]
        train = self.config.train
        drawn = draw_poses(self.sample.keypoints[None], height, width, train.stick_width, train.pose_style)
        return to_controlnet_input(torch.from_numpy(drawn).to(self.device))


def seeded_noise(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian noise that is the same on every device, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
