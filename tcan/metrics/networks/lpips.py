"""LPIPS (Zhang et al., CVPR 2018), version 0.1, with a trunk from a local torchvision file."""

import re
from pathlib import Path
from typing import Literal

import torch
import torchmetrics
from accelerate import init_empty_weights
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS

from tcan.metrics.networks.files import load_weights

FILES = {"alex": "torchvision's alexnet-owt-7be5be79.pth", "vgg": "torchvision's vgg16-397923af.pth"}


class LPIPS(nn.Module):
    """Perceptual distance of images. torchmetrics contains the architecture and the calibrated linear weights."""

    def __init__(self, net: Literal["alex", "vgg"], path: Path) -> None:
        """Load the trunk.

        Args:
            path: weights of torchvision's AlexNet or VGG16, with or without the unused `classifier.`.

        Raises:
            UserError: see `load_weights`.
        """
        super().__init__()
        with init_empty_weights(include_buffers=False):  # pnet_rand: no download of the trunk
            self.lpips = _LPIPS(net=net, pnet_rand=True, pretrained=False)
        linear = Path(torchmetrics.functional.image.__file__).parent / "lpips_models" / f"{net}.pth"
        self.lpips.load_state_dict(
            torch.load(linear, map_location="cpu", weights_only=True), strict=False, assign=True
        )
        features = nn.Module()
        # torchvision numbers the layers of the trunk consecutively; torchmetrics splits them into slices.
        for name, module in self.lpips.net.named_modules():
            if match := re.fullmatch(r"slice\d+\.(\d+)", name):
                features.add_module(match[1], module)
        trunk = nn.Module()
        trunk.add_module("features", features)
        load_weights(trunk, path, FILES[net], unused=r"classifier\..*")
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, result: Tensor, truth: Tensor, *, unscaled: bool = False) -> Tensor:
        """Return the distance of each pair of images, `[N]`.

        Args:
            result, truth: `[N, 3, H, W]` in [0, 1]; H and W at least 32.
            unscaled: pass [0, 1] instead of [-1, 1] to the network, as some published evaluation scripts do.
        """
        return self.lpips(result, truth, normalize=not unscaled).flatten()
