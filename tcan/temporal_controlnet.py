"""The ControlNet with temporal layers at down factors 4 and 8; all else of it is the frozen ControlNet."""

import copy
from typing import Any

from diffusers import ControlNetModel, MotionAdapter
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.unets.unet_motion_model import CrossAttnDownBlockMotion, DownBlockMotion
from torch import Tensor, nn

from tcan.temporal import TemporalTransformer, zero_output

DOWN_FACTORS = (4, 8)


class _NumFrames:
    """A down block of diffusers' motion UNet in a ControlNet, which doesn't pass `num_frames` on."""

    num_frames = 1

    def forward(self, **inputs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return super().forward(**inputs, num_frames=self.num_frames)  # type: ignore[misc]


class TemporalCrossAttnDownBlock(_NumFrames, CrossAttnDownBlockMotion):
    """resnet, spatial transformer, temporal transformer, as often as the block has layers."""


class TemporalDownBlock(_NumFrames, DownBlockMotion):
    """resnet, temporal transformer, as often as the block has layers."""


class PoseEncoder(ControlNetConditioningEmbedding):
    """The ControlNet's encoder of pose images, that lets pass what it has encoded before."""

    def forward(self, pose: Tensor) -> Tensor:
        """`[N, 3, H, W]` or `[N, C_0, h, w] -> [N, C_0, h, w]`."""
        return pose if pose.shape[1] == self.conv_out.out_channels else super().forward(pose)


def temporal_controlnet(controlnet: ControlNetModel, adapter: MotionAdapter) -> ControlNetModel:
    """A copy of the ControlNet with temporal layers (as many heads and positions as the motion adapter's)
    after each resnet (and attention) of its down blocks at factors 4 and 8. Their output projections are
    zero: it computes what the given ControlNet does, and for single frames always will.

    Raises ValueError for a ControlNet whose images aren't RGB.
    """
    if controlnet.config.controlnet_conditioning_channel_order != "rgb":
        raise ValueError("the ControlNet takes images in BGR; TCAN's poses are drawn in RGB")
    controlnet = copy.deepcopy(controlnet)
    controlnet.controlnet_cond_embedding.__class__ = PoseEncoder
    weight = controlnet.conv_in.weight
    heads = adapter.config.motion_num_attention_heads
    for i, block in enumerate(controlnet.down_blocks):
        if 2**i not in DOWN_FACTORS:
            continue
        channels = controlnet.config.block_out_channels[i]
        num_heads = heads if isinstance(heads, int) else heads[i]
        block.motion_modules = nn.ModuleList()
        for _ in block.resnets:
            layer = TemporalTransformer(
                num_attention_heads=num_heads,
                attention_head_dim=channels // num_heads,
                in_channels=channels,
                norm_num_groups=controlnet.config.norm_num_groups,
                positional_embeddings="sinusoidal",
                num_positional_embeddings=adapter.config.motion_max_seq_length,
            )
            zero_output(layer)
            block.motion_modules.append(layer.to(weight.device, weight.dtype))
        # The same attributes as its 2D counterpart and `motion_modules`: only `forward` differs.
        has_attention = getattr(block, "has_cross_attention", False)
        block.__class__ = TemporalCrossAttnDownBlock if has_attention else TemporalDownBlock
    return controlnet


def control_residuals(
    controlnet: ControlNetModel,
    noisy: Tensor,
    timestep: Tensor,
    prompt: Tensor,
    pose: Tensor,
    num_frames: int,
    scale: float = 1.0,
) -> tuple[list[Tensor], Tensor]:
    """The down residuals (12 at SD1.5 size) and the middle one, times scale.

    noisy `[B * F, 4, h, w]`, timestep `[B * F]`, prompt `[B * F, T, D]`, pose `[B * F, 3, H, W]` in [0, 1] or what
    the ControlNet's PoseEncoder made of it.
    """
    for block in controlnet.down_blocks:
        if isinstance(block, _NumFrames):
            block.num_frames = num_frames
    return controlnet(
        noisy, timestep, prompt, controlnet_cond=pose, conditioning_scale=scale, return_dict=False
    )
