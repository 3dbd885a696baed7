"""A small body pose network of OpenPose's kind.

Cao et al., "Realtime Multi-Person 2D Pose Estimation using Part Affinity Fields" (CVPR 2017): a stem shared by all
stages, then stages of two branches, each stage seeing the stem's features and the stage before. The outputs have
OpenPose's channels, so its decoding (`tcan.pose.openpose`) serves both this network and OpenPose's own.
"""

from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

STRIDE = 8  # image pixels to a cell of the maps, in each direction


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
    """Two branches of the same shape: part affinity fields (38 channels) and heatmaps (18 joints, background)."""

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
    """Part affinity fields and heatmaps of a image at 1/8 of its size.

    `input_height` and `blur_sigma` are not the network's own: they tell the decoder the height to which a image is
    resized before the network, and the sigma, in pixels of the image, by which its heatmaps are blurred before
    peaks are sought. They are kept here so that a folder of weights says all that its use needs.
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
        # Dilated so that the last stage sees a whole body at 128 px: left and right are told apart by context.
        self.stage1 = Stage(features, stage_channels, (1, 2), norm_groups)
        self.stage2 = Stage(features + 57, stage_channels, (1, 2, 4), norm_groups)

    def stages(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(paf [B, 38, H/8, W/8], heatmap [B, 19, H/8, W/8]) of each stage, for intermediate supervision."""
        features = self.stem(x)
        first = self.stage1(features)
        return [first, self.stage2(torch.cat([features, *first], dim=1))]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, H, W]: BGR, value / 256 - 0.5; H and W divisible by 8. Returns the last stage's (paf, heatmap)."""
        return self.stages(x)[-1]
