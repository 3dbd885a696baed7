"""3D ResNet-50 (Hara et al., CVPR 2018) trained on Kinetics-400: the features of FID-VID.

FID-VID is the Fréchet distance of these features. Preprocessing is that of DisCo's evaluation (Wang et al., CVPR 2024): each
frame is resized to 112 x 112 with PIL's bicubic filter in floating point, then the mean colour of Kinetics is subtracted.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor, nn

from tcan.metrics.networks.files import load_weights

FILE = "the 3D ResNet-50 resnet-50-kinetics.pth"
SIZE = 112  # pixels
MEAN = (114.7748, 107.7354, 99.4750)
"""Mean RGB of Kinetics, 0 to 255."""


class Bottleneck(nn.Module):
    """Residual block of 1x1x1, 3x3x3 and 1x1x1 convolutions; a projection shortcut if the shape changes (type B)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv3d(channels, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm3d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn1(self.conv1(x)).relu()
        residual = self.bn2(self.conv2(residual)).relu()
        return (self.bn3(self.conv3(residual)) + self.downsample(x)).relu()


class FIDVIDResNet(nn.Module):
    """Features of windows of 16 frames for FID-VID: the 2048 averages of the last layer over time and space."""

    def __init__(self, path: Path) -> None:
        """Load the weights.

        Raises:
            UserError: see `load_weights`.
        """
        super().__init__()
        with init_empty_weights(include_buffers=False):
            self.conv1 = nn.Conv3d(3, 64, 7, stride=(1, 2, 2), padding=3, bias=False)
            self.bn1 = nn.BatchNorm3d(64)
            self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
            self.layer1 = _layer(64, 64, blocks=3, stride=1)
            self.layer2 = _layer(256, 128, blocks=4, stride=2)
            self.layer3 = _layer(512, 256, blocks=6, stride=2)
            self.layer4 = _layer(1024, 512, blocks=3, stride=2)
            self.fc = nn.Linear(2048, 400)  # unused, but part of the file
        load_weights(self, path, FILE)
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, windows: Tensor) -> Tensor:
        """Return the features `[N, 2048]` of `preprocess`ed windows `[N, 16, 3, 112, 112]`."""
        x = self.maxpool(self.bn1(self.conv1(windows.transpose(1, 2))).relu())
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3, 4))

    @staticmethod
    def preprocess(frames: np.ndarray) -> Tensor:
        """Resize uint8 RGB frames `[F, H, W, 3]` and subtract the mean: float32 `[F, 3, 112, 112]`."""
        channels = np.moveaxis(frames, -1, 1).astype(np.float32)  # PIL resizes single float channels
        resized = [
            [np.asarray(Image.fromarray(c).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for c in frame]
            for frame in channels
        ]
        return torch.from_numpy(np.array(resized)) - torch.tensor(MEAN)[:, None, None]


def _layer(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))
