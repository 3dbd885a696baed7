"""A small body pose network with the architecture of OpenPose.

Cao et al., "Realtime Multi-Person 2D Pose Estimation using Part Affinity Fields" (CVPR 2017): a shared stem, then
stages of two branches; each stage receives the stem's features and the previous stage's output. The output channels
are OpenPose's, so `tcan.pose.openpose` decodes both this network and OpenPose's.
"""

from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tcan.pose.skeleton import STRIDE


class ConvNorm(nn.Sequential):
    """3x3 convolution, GroupNorm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_groups: int,
        stride: int = 1,
        dilation: int = 1,
    ):
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                3,
                stride,
                padding=dilation,
                dilation=dilation,
                bias=False,
            ),
            nn.GroupNorm(norm_groups, out_channels),
            nn.ReLU(inplace=True),
        )


class Stage(nn.Module):
    """Two branches of equal shape: part affinity fields (38 channels) and heatmaps (18 joints, background)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        dilations: tuple[int, ...],
        norm_groups: int,
    ):
        super().__init__()

        def branch(out_channels: int) -> nn.Sequential:
            layers = [
                ConvNorm(
                    channels if i else in_channels,
                    channels,
                    norm_groups,
                    dilation=dilation,
                )
                for i, dilation in enumerate(dilations)
            ]
            return nn.Sequential(*layers, nn.Conv2d(channels, out_channels, 1))

        self.paf = branch(38)
        self.heatmap = branch(19)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.paf(x), self.heatmap(x)


class BodyPoseNetwork(ModelMixin, ConfigMixin):
    """Predicts part affinity fields and heatmaps at 1/8 of the image size.

    `input_height` and `blur_sigma` configure the decoder, not the network: the height in pixels to which images are
    resized, and the standard deviation, in image pixels, of the heatmaps' blur. They are stored in the network's
    configuration so that a folder of weights contains all settings for inference.
    """

    @register_to_config
    def __init__(
        self,
        stem_channels: tuple[int, ...] = (32, 64, 96),
        stage_channels: int = 64,
        norm_groups: int = 8,
        input_height: int = 128,
        blur_sigma: float = 3.0,
    ):
        super().__init__()
        if 2 ** len(stem_channels) != STRIDE:
            raise ValueError(f"stem_channels must have 3 entries (stride {STRIDE}), not {len(stem_channels)}")
        sizes = (3, *stem_channels)
        features = stem_channels[-1]
        self.stem = nn.Sequential(
            *(ConvNorm(i, o, norm_groups, stride=2) for i, o in pairwise(sizes)),
            ConvNorm(features, features, norm_groups),
            ConvNorm(features, features, norm_groups, dilation=2),
        )
        # Dilation: at 128 px the last stage sees the full body, and left and right differ only by context.
        self.stage1 = Stage(features, stage_channels, (1, 2), norm_groups)
        self.stage2 = Stage(features + 57, stage_channels, (1, 2, 4), norm_groups)

    def stages(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (paf `[B, 38, H/8, W/8]`, heatmap `[B, 19, H/8, W/8]`) of each stage, for intermediate supervision."""
        features = self.stem(x)
        first = self.stage1(features)
        return [first, self.stage2(torch.cat([features, *first], dim=1))]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last stage's (paf, heatmap) of x `[B, 3, H, W]`: BGR, value / 256 - 0.5; H, W divisible by 8."""
        return self.stages(x)[-1]
