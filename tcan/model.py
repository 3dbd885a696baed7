"""TCAN as one module: frozen pretrained models, the trainable parameters of each stage, and the loss."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDIMScheduler, DDPMScheduler, MotionAdapter, UNet2DConditionModel
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from tcan.appa import add_appa, appa_parameters, appa_state_dict, load_appa_state_dict
from tcan.appearance import appearance_unet, capture_features, install_appearance, share_down_blocks
from tcan.attention import Appearance
from tcan.memory_efficient import make_memory_efficient
from tcan.schedule import min_snr_weight
from tcan.temporal import load_temporal_state_dict, motion_unet, temporal_layers, temporal_state_dict
from tcan.temporal_controlnet import (
    control_residuals,
    load_spatial_state_dict,
    spatial_state_dict,
    temporal_controlnet,
)
from tcan.variant import PAPER, Variant

Residuals = tuple[Sequence[Tensor], Tensor]


class TCAN(nn.Module):
    """Denoiser with APPA and temporal layers, appearance UNet, and ControlNet with temporal layers.

    Shapes in this class: B clips of F frames; latents `[B, F, 4, h, w]`, already multiplied by the VAE's scaling factor;
    H = 8 h and W = 8 w. A clip of one frame is an image: the temporal layers do not change it.

    Args:
        unet, controlnet, motion_adapter: pretrained models. They are copied; the arguments are not modified.
        empty_prompt: `[1, T, D]`, the text encoder's output for the empty prompt. It follows the module's device and
            dtype; floating-point inputs are cast to its dtype.
        lora_rank, lora_alpha: rank and alpha of APPA.
        variant: which parts the model has and trains.

    The methods that a pipeline calls trigger accelerate's offloading hooks, as `forward` does.

    Raises:
        ValueError: the motion adapter or the ControlNet is incompatible (`tcan.temporal.motion_unet`,
            `tcan.temporal_controlnet.temporal_controlnet`).
    """

    empty_prompt: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel,
        motion_adapter: MotionAdapter,
        empty_prompt: Tensor,
        lora_rank: int = 16,
        lora_alpha: int = 16,
        variant: Variant = PAPER,
    ):
        super().__init__()
        self.variant, self.lora_rank, self.lora_alpha = variant, lora_rank, lora_alpha
        self.appearance_unet = appearance_unet(unet)
        self.denoiser = motion_unet(unet, motion_adapter)
        install_appearance(self.denoiser)
        share_down_blocks(self.denoiser)
        if variant.appa:
            add_appa(self.denoiser, lora_rank, lora_alpha)
        self.controlnet = temporal_controlnet(controlnet, motion_adapter, variant.temporal_controlnet)
        for network in (self.appearance_unet, self.denoiser, self.controlnet):
            make_memory_efficient(network)
        self.register_buffer("empty_prompt", empty_prompt.detach().clone(), persistent=False)
        self._motion_adapter_config = motion_adapter.config
        self.stage: int | None = None
        self.compiled = False
        """Whether the networks are compiled (`tcan.acceleration.compile_tcan`)."""
        self.info: dict[str, Any] = {}  # of the model folder; set by `tcan.weights.load_model`
        self.requires_grad_(False)
        self.eval()

    def set_stage(self, stage: int) -> None:
        """Set `requires_grad` for exactly the parameters of a training stage.

        Stage 1: appearance UNet and APPA; with `variant.controlnet` "finetune" also the ControlNet without its temporal
        layers. Stage 2: temporal layers of the denoiser and of the ControlNet.

        Raises:
            ValueError: `stage` is not 1 or 2.
        """
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, not {stage}")
        self.stage = stage
        self.requires_grad_(False)
        if stage == 1:
            self.appearance_unet.requires_grad_(True)
            for parameter in appa_parameters(self.denoiser).values():
                parameter.requires_grad_(True)
            if self.variant.controlnet == "finetune":
                self.controlnet.requires_grad_(True)
                for layer in temporal_layers(self.controlnet).values():
                    layer.requires_grad_(False)
        else:
            for layer in self._temporal_layers():
                layer.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TCAN":
        """Same as `nn.Module.train`, but modules that the stage does not train stay in eval mode."""
        super().train(False)
        self.training = mode
        if self.stage == 1:
            self.appearance_unet.train(mode)
            self.controlnet.train(mode and self.variant.controlnet == "finetune")
        elif self.stage == 2:
            for layer in self._temporal_layers():
                layer.train(mode)
        return self

    def _temporal_layers(self) -> list[nn.Module]:
        return [*temporal_layers(self.denoiser).values(), *temporal_layers(self.controlnet).values()]

    @property
    def device(self) -> torch.device:
        return self.empty_prompt.device

    @property
    def dtype(self) -> torch.dtype:
        return self.empty_prompt.dtype

    @property
    def max_frames(self) -> int:
        """Number of positions of the temporal layers: the maximum number of frames of a clip or a window."""
        return self._motion_adapter_config.motion_max_seq_length

    def enable_gradient_checkpointing(self) -> None:
        """Store only the inputs of each block and recompute its activations in the backward pass."""
        for network in (self.appearance_unet, self.denoiser, self.controlnet):
            network.enable_gradient_checkpointing()

    @apply_forward_hook
    def appearance(self, reference_latent: Tensor, timestep: Tensor) -> list[Tensor]:
        """Return the reference features, one per block with reference attention (10 at SD1.5 size).

        Args:
            reference_latent: `[B, 4, h, w]`, without noise (the mean of the VAE's distribution).
            timestep: `[B]`, the timestep of the target.

        Returns:
            List of `[B, h_i * w_i, C_i]`.
        """
        prompt = self.empty_prompt.expand(len(reference_latent), -1, -1)
        return capture_features(self.appearance_unet, reference_latent.to(prompt.dtype), timestep, prompt)

    @apply_forward_hook
    def embed_pose(self, pose: Tensor) -> Tensor:
        """Encode pose images `[B, F, 3, H, W]` in [0, 1] with the ControlNet's pose encoder: `[B, F, C_0, h, w]`.

        The embedding does not depend on the timestep, so a sampler computes it once per clip.
        """
        embed = self.controlnet.controlnet_cond_embedding
        return embed(pose.flatten(0, 1).to(self.dtype)).unflatten(0, pose.shape[:2])

    @apply_forward_hook
    def pose_residuals(self, noisy: Tensor, timestep: Tensor, pose: Tensor, scale: float = 1.0) -> Residuals:
        """Return the ControlNet's residuals: 12 for the down blocks and one for the middle block at SD1.5 size.

        Args:
            noisy: `[B, F, 4, h, w]`.
            timestep: `[B]`.
            pose: pose images `[B, F, 3, H, W]` in [0, 1], or the output of `embed_pose`.
            scale: factor of the residuals.

        Returns:
            Down residuals and middle residual, each `[B * F, C_i, h_i, w_i]`.
        """
        batch, frames = noisy.shape[:2]
        return control_residuals(
            self.controlnet,
            noisy.flatten(0, 1).to(self.empty_prompt.dtype),
            timestep.repeat_interleave(frames, output_size=batch * frames),
            self.empty_prompt.expand(batch * frames, -1, -1),
            pose.flatten(0, 1).to(self.empty_prompt.dtype),
            frames,
            scale,
        )

    @apply_forward_hook
    def denoise(
        self,
        noisy: Tensor,
        timestep: Tensor,
        residuals: Residuals | None,
        features: Sequence[Tensor] | None,
        reference_mask: Sequence[bool] | Tensor | None = None,
        temperature: Tensor | None = None,
        temperature_limit: int | None = None,
    ) -> Tensor:
        """Return the denoiser's prediction `[B, F, 4, h, w]`.

        Classifier-free guidance is one call with one clip and `reference_mask=[False, True]`. The prediction is then
        `[2, F, 4, h, w]`, and the down blocks, which do not depend on the reference, run once
        (`tcan.appearance.share_down_blocks`).

        Args:
            noisy: `[B, F, 4, h, w]`.
            timestep: `[B]`.
            residuals: output of `pose_residuals` for these clips; None: no pose.
            features: output of `appearance` for these clips, or for one reference shared by all; None: no reference.
            reference_mask: B bools. Rows with False use plain self-attention; None: all rows use the reference. On the
                host or, for compiled networks, on the device: see `tcan.attention.Appearance`.
            temperature: `[H, W]` or `[B, H, W]` (`tcan.temperature`); None: 1.
            temperature_limit: maximum size, in cells of the longer side, of the layer grids that use the temperature.
                Layers with larger grids use 1. None: no limit.
        """
        batch, frames = noisy.shape[:2]
        rows, kwargs = batch, None
        if features is not None:
            kwargs = {"appearance": Appearance(features, reference_mask, frames)}
            rows = batch if reference_mask is None else len(reference_mask)
        down, middle = residuals or (None, None)
        if middle is not None and rows > batch:
            middle = middle.repeat(rows // batch, 1, 1, 1)
        layers = temporal_layers(self.denoiser).values()
        for layer in layers:
            layer.temperature, layer.temperature_limit = temperature, temperature_limit
        try:
            sample = self.denoiser(
                noisy.transpose(1, 2).to(self.empty_prompt.dtype),
                timestep,
                self.empty_prompt.expand(batch * frames, -1, -1),
                cross_attention_kwargs=kwargs,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
        finally:
            for layer in layers:
                layer.temperature = layer.temperature_limit = None
        return sample.transpose(1, 2)

    def forward(
        self,
        noisy: Tensor,
        timestep: Tensor,
        pose: Tensor,
        reference_latent: Tensor,
        reference_mask: Sequence[bool] | None = None,
    ) -> Tensor:
        """Return the prediction `[B, F, 4, h, w]`: `pose_residuals`, `appearance` and `denoise` in one training call.

        Argument shapes are those of these three methods.
        """
        mask: Sequence[bool] | Tensor | None = reference_mask
        if self.compiled and self.stage == 1 and reference_mask is not None:
            mask = torch.tensor(reference_mask).to(noisy.device, non_blocking=True)
        residuals = self.pose_residuals(noisy, timestep, pose)
        features = self.appearance(reference_latent, timestep)
        eps = self.denoise(noisy, timestep, residuals, features, mask)
        if self.stage == 1 and isinstance(mask, Sequence) and not any(mask):
            # No row uses the reference. The appearance UNet needs zero gradients instead of None: data-parallel workers
            # must agree on which parameters have gradients.
            eps = eps + 0 * sum(f[0, 0, 0] for f in features)
        return eps

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Return the trained weights by part, as stored in a model folder, without the parts that `variant` does not have.

        Stage 1 changes only `appearance_unet`: names of the source UNet; `appa`: PEFT's names (`tcan.appa`);
        `controlnet` (if fine-tuned): names of the ControlNet. Stage 2 changes only `motion_adapter`: names of a
        `MotionAdapter`; `temporal_controlnet`: names in the ControlNet.
        """
        parts = {
            "appearance_unet": self.appearance_unet.state_dict(),
            "motion_adapter": temporal_state_dict(self.denoiser),
        }
        if self.variant.appa:
            parts["appa"] = appa_state_dict(self.denoiser)
        if self.variant.controlnet == "finetune":
            parts["controlnet"] = spatial_state_dict(self.controlnet)
        if self.variant.temporal_controlnet:
            parts["temporal_controlnet"] = temporal_state_dict(self.controlnet)
        return parts

    def load_parts(self, parts: dict[str, dict[str, Tensor]]) -> None:
        """Load some or all of the parts returned by `parts`.

        Raises:
            KeyError, RuntimeError: the names of a part are not exactly those of this model.
        """
        load = {
            "appearance_unet": self.appearance_unet.load_state_dict,
            "appa": lambda state: load_appa_state_dict(self.denoiser, state),
            "motion_adapter": lambda state: load_temporal_state_dict(self.denoiser, state),
            "controlnet": lambda state: load_spatial_state_dict(self.controlnet, state),
            "temporal_controlnet": lambda state: load_temporal_state_dict(self.controlnet, state),
        }
        for name, state in parts.items():
            load[name](state)

    def motion_adapter(self) -> MotionAdapter:
        """Return a copy of the denoiser's temporal layers as a diffusers `MotionAdapter`, for `save_pretrained`."""
        adapter = MotionAdapter.from_config(self._motion_adapter_config)
        adapter.load_state_dict(temporal_state_dict(self.denoiser))
        return nn.Module.to(adapter, self.empty_prompt.dtype)


def diffusion_loss(
    model: nn.Module,
    scheduler: DDPMScheduler | DDIMScheduler,
    latents: Tensor,
    noise: Tensor,
    timestep: Tensor,
    pose: Tensor,
    reference_latent: Tensor,
    reference_mask: Sequence[bool] | None = None,
    snr_gamma: float | None = None,
) -> Tensor:
    """Return the scalar MSE loss on the noise (method "Training"), or on v if `prediction_type` is "v_prediction".

    Args:
        model: a TCAN, or a wrapper of its `forward` (a DeepSpeed engine).
        scheduler: supplies the noise schedule only (`tcan.schedule.noise_schedule`).
        latents, noise: `[B, F, 4, h, w]`.
        timestep: int64 `[B]`, one per clip.
        pose, reference_latent, reference_mask: as in `TCAN.forward`.
        snr_gamma: weight each clip by `tcan.schedule.min_snr_weight` with this gamma; None: no weighting.
    """
    noisy = scheduler.add_noise(latents, noise, timestep)
    prediction = model(noisy, timestep, pose, reference_latent, reference_mask).float()
    target = noise.float()
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timestep).float()
    if snr_gamma is None:
        return F.mse_loss(prediction, target)
    per_clip = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
    return (min_snr_weight(scheduler, timestep, snr_gamma) * per_clip).mean()
