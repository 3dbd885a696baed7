"""Temporal layers: AnimateDiff's motion modules with per-frame normalization, as their weights were trained."""

import torch
from diffusers import MotionAdapter, UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from diffusers.utils import logging
from torch import Tensor, nn

from tcan.attention import TemperatureAttention
from tcan.temperature import resize_temperature


class TemporalTransformer(AnimateDiffTransformer3D):
    """diffusers' motion module with per-frame group normalization; parameters and their names are the same.

    diffusers computes GroupNorm statistics over all frames of a clip. AnimateDiff and TCAN compute them per frame, so
    the attention is the only path between frames. A clip of one frame is an image and passes unchanged.
    """

    temperature: Tensor | None = None
    """`[H, W]` or `[B, H, W]`, set by the caller for one call of the UNet; None: 1."""

    temperature_limit: int | None = None
    """Maximum size, in cells of the longer side, of the grids that use the temperature; None: no limit."""

    gradient_checkpointing = False

    @classmethod
    def replace(cls, module: AnimateDiffTransformer3D) -> None:
        """Convert a motion module to this class, in place: only `forward` changes, not the parameters."""
        module.__class__ = cls
        for block in module.transformer_blocks:
            block.attn1.set_processor(TemperatureAttention())
            block.attn2.set_processor(TemperatureAttention())

    def forward(self, hidden_states: Tensor, *unused: None, num_frames: int = 1) -> Tensor:
        """Map `[B * F, C, h, w]` to `[B * F, C, h, w]`, F = num_frames."""
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
            kwargs = {"temperature": resize_temperature(self.temperature, batch, height, width)}
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, None, None, None, None, kwargs)
            else:
                x = block(x, cross_attention_kwargs=kwargs)
        x = self.proj_out(x).unflatten(0, (batch, height, width)).permute(0, 3, 4, 1, 2)
        return hidden_states + x.flatten(0, 1)


def temporal_layers(model: nn.Module) -> dict[str, TemporalTransformer]:
    """Return the temporal layers of a UNet or a ControlNet by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TemporalTransformer)}


def temporal_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all temporal layers. For a UNet, names and shapes are those of its `MotionAdapter`."""
    return {
        f"{name}.{key}": value
        for name, layer in temporal_layers(model).items()
        for key, value in layer.state_dict().items()
    }


def load_temporal_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the output of `temporal_state_dict`.

    Raises:
        KeyError: the names are not exactly those of this model.
    """
    if difference := state.keys() ^ temporal_state_dict(model).keys():
        raise KeyError(f"{len(difference)} names of temporal weights do not match, first: {min(difference)}")
    model.load_state_dict(state, strict=False)


def zero_output(layer: AnimateDiffTransformer3D) -> None:
    """Set the output projection to zero, in place: the layer becomes an identity that can still be trained."""
    nn.init.zeros_(layer.proj_out.weight)
    nn.init.zeros_(layer.proj_out.bias)


def motion_unet(unet: nn.Module, adapter: MotionAdapter) -> UNetMotionModel:
    """Return a UNet with the adapter's temporal layers at every resolution of the down and up blocks.

    The arguments are not modified.

    Raises:
        ValueError: the adapter has modules for the middle block, or its number of normalization groups differs from the
            UNet's.
    """
    if adapter.config.use_motion_mid_block:
        raise ValueError(
            "the motion adapter has temporal layers in the middle block; TCAN does not support them"
        )
    if adapter.config.motion_norm_num_groups != unet.config.norm_num_groups:
        # diffusers would silently use the UNet's value.
        raise ValueError(
            f"motion_norm_num_groups {adapter.config.motion_norm_num_groups} of the motion adapter differs "
            f"from norm_num_groups {unet.config.norm_num_groups} of the UNet"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # diffusers warns about its cast to the UNet's dtype
    try:
        model = UNetMotionModel.from_unet2d(unet, adapter)
    finally:
        logging.set_verbosity(verbosity)
    for module in list(model.modules()):
        if isinstance(module, AnimateDiffTransformer3D):
            TemporalTransformer.replace(module)
    return model
