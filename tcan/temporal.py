"""The temporal layers: AnimateDiff's motion modules, with the normalisation their weights were made for."""

import torch
from diffusers import MotionAdapter, UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from diffusers.utils import logging
from torch import Tensor, nn

from tcan.attention import TemperatureAttention
from tcan.temperature import temperature_of_places


class TemporalTransformer(AnimateDiffTransformer3D):
    """A motion module that normalises each frame by itself, with the parameters and names of diffusers' own.

    diffusers' GroupNorm takes its statistics over all frames of a clip; AnimateDiff's and TCAN's takes them
    over one frame, which also keeps a frame from leaking into another where the attention doesn't look. A
    clip of one frame is a image and passes unchanged.

    temperature: `[H, W]` or `[B, H, W]`, set around a call of the UNet by `temperature_map`'s user; None: 1. It acts on
    grids whose longer side has at most `temperature_limit` cells.
    """

    temperature: Tensor | None = None
    temperature_limit: int | None = None
    gradient_checkpointing = False

    @classmethod
    def replace(cls, module: AnimateDiffTransformer3D) -> None:
        """Make a motion module one of these, in place: only `forward` differs, parameters stay."""
        module.__class__ = cls
        for block in module.transformer_blocks:
            block.attn1.set_processor(TemperatureAttention())
            block.attn2.set_processor(TemperatureAttention())

    def forward(self, hidden_states: Tensor, *unused: None, num_frames: int = 1) -> Tensor:
        """`[B * F, C, h, w] -> [B * F, C, h, w]`, F = num_frames."""
        if num_frames == 1:
            return hidden_states
        height, width = hidden_states.shape[-2:]
        clips = (-1, num_frames)

        # [B * F, C, h, w] -> [B * h * w, F, C]
        x = self.norm(hidden_states).unflatten(0, clips).permute(0, 3, 4, 1, 2)
        batch = len(x)
        x = self.proj_in(x.flatten(0, 2))
        kwargs = None
        limit = self.temperature_limit
        if self.temperature is not None and (limit is None or max(height, width) <= limit):
            kwargs = {"temperature": temperature_of_places(self.temperature, batch, height, width)}
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, None, None, None, None, kwargs)
            else:
                x = block(x, cross_attention_kwargs=kwargs)
        x = self.proj_out(x).unflatten(0, (batch, height, width)).permute(0, 3, 4, 1, 2)
        return hidden_states + x.flatten(0, 1)


def temporal_layers(model: nn.Module) -> dict[str, TemporalTransformer]:
    """The temporal layers of a UNet or a ControlNet by their names in it."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TemporalTransformer)}


def temporal_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all temporal layers; for a UNet, names and shapes are those of its `MotionAdapter`."""
    return {
        f"{name}.{key}": value
        for name, layer in temporal_layers(model).items()
        for key, value in layer.state_dict().items()
    }


def load_temporal_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `temporal_state_dict`. Raises KeyError unless the names are exactly this model's."""
    if difference := state.keys() ^ temporal_state_dict(model).keys():
        raise KeyError(
            f"{len(difference)} names of temporal weights don't match, the first: {min(difference)}"
        )
    model.load_state_dict(state, strict=False)


def zero_output(layer: AnimateDiffTransformer3D) -> None:
    """Zero the output projection, in place: the layer then changes nothing, and can learn to."""
    nn.init.zeros_(layer.proj_out.weight)
    nn.init.zeros_(layer.proj_out.bias)


def motion_unet(unet: nn.Module, adapter: MotionAdapter) -> UNetMotionModel:
    """The UNet with the adapter's temporal layers at every resolution, down and up; both given are left as
    they are.

    Raises ValueError for an adapter with middle-block modules or of other normalisation groups than the UNet.
    """
    if adapter.config.use_motion_mid_block:
        raise ValueError("the motion adapter has temporal layers in the middle block; TCAN has none there")
    if adapter.config.motion_norm_num_groups != unet.config.norm_num_groups:
        # diffusers would silently take the UNet's number.
        raise ValueError(
            f"motion_norm_num_groups {adapter.config.motion_norm_num_groups} of the motion adapter differs "
            f"from norm_num_groups {unet.config.norm_num_groups} of the UNet"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # diffusers warns of its own cast to the UNet's dtype
    try:
        model = UNetMotionModel.from_unet2d(unet, adapter)
    finally:
        logging.set_verbosity(verbosity)
    for module in list(model.modules()):
        if isinstance(module, AnimateDiffTransformer3D):
            TemporalTransformer.replace(module)
    return model
