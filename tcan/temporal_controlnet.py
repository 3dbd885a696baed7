"""The frozen ControlNet with additional temporal layers at down factors 4 and 8."""

import copy
from typing import Any

from diffusers import ControlNetModel, MotionAdapter
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.unets.unet_motion_model import CrossAttnDownBlockMotion, DownBlockMotion
from torch import Tensor, nn

from tcan.temporal import TemporalTransformer, zero_output

DOWN_FACTORS = (4, 8)


class _NumFrames:
    """Mixin for motion down blocks: stores `num_frames`, which a ControlNet does not pass to its blocks."""

    num_frames = 1

    def forward(self, **inputs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return super().forward(**inputs, num_frames=self.num_frames)  # type: ignore[misc]


class TemporalCrossAttnDownBlock(_NumFrames, CrossAttnDownBlockMotion):
    """Per layer: resnet, spatial transformer, temporal transformer."""


class TemporalDownBlock(_NumFrames, DownBlockMotion):
    """Per layer: resnet, temporal transformer."""


class PoseEncoder(ControlNetConditioningEmbedding):
    """The ControlNet's encoder of pose images; it passes inputs that are already encoded."""

    def forward(self, pose: Tensor) -> Tensor:
        """Map `[N, 3, H, W]` (images) or `[N, C_0, h, w]` (encoded) to `[N, C_0, h, w]`."""
        return pose if pose.shape[1] == self.conv_out.out_channels else super().forward(pose)


def temporal_controlnet(
    controlnet: ControlNetModel, adapter: MotionAdapter, temporal: bool = True
) -> ControlNetModel:
    """Return a copy of the ControlNet with a temporal layer after each layer of its down blocks at factors 4 and 8.

    The number of heads and of positions are those of the motion adapter. The output projections are zero, so the copy
    initially computes the same as the ControlNet. For single frames this remains true after training. If `temporal` is
    False, the copy has no temporal layers.

    Raises:
        ValueError: the ControlNet expects images in BGR.
    """
    if controlnet.config.controlnet_conditioning_channel_order != "rgb":
        raise ValueError("the ControlNet expects images in BGR; TCAN draws poses in RGB")
    controlnet = copy.deepcopy(controlnet)
    controlnet.controlnet_cond_embedding.__class__ = PoseEncoder
    weight = controlnet.conv_in.weight
    heads = adapter.config.motion_num_attention_heads
    for i, block in enumerate(controlnet.down_blocks):
        if not temporal or 2**i not in DOWN_FACTORS:
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
        # The motion block has the attributes of its 2D counterpart and `motion_modules`; only `forward` differs.
        has_attention = getattr(block, "has_cross_attention", False)
        block.__class__ = TemporalCrossAttnDownBlock if has_attention else TemporalDownBlock
    return controlnet


def spatial_state_dict(controlnet: ControlNetModel) -> dict[str, Tensor]:
    """Return the weights of the ControlNet without its temporal layers, under the names of a `ControlNetModel`."""
    return {name: w for name, w in controlnet.state_dict().items() if ".motion_modules." not in name}


def load_spatial_state_dict(controlnet: ControlNetModel, state: dict[str, Tensor]) -> None:
    """Load the output of `spatial_state_dict`.

    Raises:
        KeyError: the names are not exactly those of this ControlNet.
    """
    if difference := state.keys() ^ spatial_state_dict(controlnet).keys():
        raise KeyError(
            f"{len(difference)} names of ControlNet weights do not match, first: {min(difference)}"
        )
    controlnet.load_state_dict(state, strict=False)


def control_residuals(
    controlnet: ControlNetModel,
    noisy: Tensor,
    timestep: Tensor,
    prompt: Tensor,
    pose: Tensor,
    num_frames: int,
    scale: float = 1.0,
) -> tuple[list[Tensor], Tensor]:
    """Return the down residuals (12 at SD1.5 size) and the middle residual.

    Args:
        noisy: `[B * F, 4, h, w]`.
        timestep: `[B * F]`.
        prompt: `[B * F, T, D]`.
        pose: pose images `[B * F, 3, H, W]` in [0, 1], or the output of the ControlNet's `PoseEncoder`.
        num_frames: F.
        scale: factor of the residuals.
    """
    for block in controlnet.down_blocks:
        if isinstance(block, _NumFrames):
            block.num_frames = num_frames
    return controlnet(
        noisy, timestep, prompt, controlnet_cond=pose, conditioning_scale=scale, return_dict=False
    )
