"""TCAN as one module: the frozen pretrained, what each stage trains, and the loss."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDIMScheduler, DDPMScheduler, MotionAdapter, UNet2DConditionModel
from torch import Tensor, nn

from tcan.appa import add_appa, appa_parameters, appa_state_dict, load_appa_state_dict
from tcan.appearance import appearance_unet, capture_features, install_appearance, share_down_blocks
from tcan.attention import Appearance
from tcan.memory_efficient import make_memory_efficient
from tcan.schedule import min_snr_weight
from tcan.temporal import load_temporal_state_dict, motion_unet, temporal_layers, temporal_state_dict
from tcan.temporal_controlnet import control_residuals, temporal_controlnet

Residuals = tuple[Sequence[Tensor], Tensor]


class TCAN(nn.Module):
    """Denoiser with APPA and temporal layers, appearance UNet, ControlNet with temporal layers.

    unet, controlnet, motion_adapter: the pretrained, copied: those given are left as they are.
    empty_prompt: `[1, T, D]`, the text encoder's output for the empty prompt. It moves and is cast with the
        module, and floating inputs are cast to its dtype.

    Shapes below: B clips of F frames; latents `[B, F, 4, h, w]`, already times the VAE's scaling factor;
    H = 8 h and W = 8 w. A clip of one frame is a image: the temporal layers pass it unchanged.
    Raises ValueError for a motion adapter that doesn't fit (`tcan.temporal.motion_unet`).
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
    ):
        super().__init__()
        self.appearance_unet = appearance_unet(unet)
        self.denoiser = motion_unet(unet, motion_adapter)
        install_appearance(self.denoiser)
        share_down_blocks(self.denoiser)
        add_appa(self.denoiser, lora_rank, lora_alpha)
        self.controlnet = temporal_controlnet(controlnet, motion_adapter)
        for network in (self.appearance_unet, self.denoiser, self.controlnet):
            make_memory_efficient(network)
        self.register_buffer("empty_prompt", empty_prompt.detach().clone(), persistent=False)
        self._motion_adapter_config = motion_adapter.config
        self.stage: int | None = None
        self.requires_grad_(False)
        self.eval()

    def set_stage(self, stage: int) -> None:
        """Let exactly a stage's parameters require gradients: 1 appearance UNet, APPA; 2 temporal layers."""
        if stage not in (1, 2):
            raise ValueError(f"stage {stage}: there are stages 1 and 2")
        self.stage = stage
        self.requires_grad_(False)
        if stage == 1:
            self.appearance_unet.requires_grad_(True)
            for parameter in appa_parameters(self.denoiser).values():
                parameter.requires_grad_(True)
        else:
            for layer in self._temporal_layers():
                layer.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TCAN":
        """As `nn.Module.train`, but what the stage doesn't train stays in eval mode."""
        super().train(False)
        self.training = mode
        if self.stage == 1:
            self.appearance_unet.train(mode)
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

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of the blocks and compute the rest again in the backward pass."""
        for network in (self.appearance_unet, self.denoiser, self.controlnet):
            network.enable_gradient_checkpointing()

    def appearance(self, reference_latent: Tensor, timestep: Tensor) -> list[Tensor]:
        """The reference's features, one per joined block (10 at SD1.5 size): `[B, h_i * w_i, C_i]`.

        reference_latent `[B, 4, h, w]`, clean (the VAE's mean); timestep `[B]`, that of the target.
        """
        prompt = self.empty_prompt.expand(len(reference_latent), -1, -1)
        return capture_features(self.appearance_unet, reference_latent.to(prompt.dtype), timestep, prompt)

    def embed_pose(self, pose: Tensor) -> Tensor:
        """What the ControlNet's pose encoder makes of pose images `[B, F, 3, H, W]` in [0, 1]: `[B, F, C_0, h, w]`.

        It depends on no timestep: a sampler needs it once a clip.
        """
        embed = self.controlnet.controlnet_cond_embedding
        return embed(pose.flatten(0, 1).to(self.dtype)).unflatten(0, pose.shape[:2])

    def pose_residuals(self, noisy: Tensor, timestep: Tensor, pose: Tensor, scale: float = 1.0) -> Residuals:
        """The ControlNet's residuals (12 down and one middle at SD1.5 size), each `[B * F, C_i, h_i, w_i]`.

        noisy `[B, F, 4, h, w]`, timestep `[B]`, pose `[B, F, 3, H, W]` in [0, 1] or what `embed_pose` made of it.
        scale: they are multiplied by it.
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

    def denoise(
        self,
        noisy: Tensor,
        timestep: Tensor,
        residuals: Residuals | None,
        features: Sequence[Tensor] | None,
        reference_mask: Tensor | Sequence[bool] | None = None,
        temperature: Tensor | None = None,
        temperature_limit: int | None = None,
    ) -> Tensor:
        """The prediction `[B, F, 4, h, w]`.

        noisy `[B, F, 4, h, w]`, timestep `[B]`.
        residuals: `pose_residuals` of these clips; None: no pose.
        features: `appearance` of these clips, or of one reference, then shared by all; None: none.
        reference_mask: `[B]` bool: a row where it is False uses plain self-attention; None: all keep it.
        temperature: `[H, W]` or `[B, H, W]` (`tcan.temperature`); None: 1.
        temperature_limit: cells of the longer side of a layer's grid; the temperature of layers above it is 1; None: no
            limit.

        Guidance is one call of one clip with `reference_mask=[False, True]`: a prediction `[2, F, 4, h, w]`, for which
        the down blocks, where no reference reaches, run once (`tcan.appearance.share_down_blocks`).
        """
        batch, frames = noisy.shape[:2]
        rows, kwargs = batch, None
        if features is not None:
            keep = None if reference_mask is None else torch.as_tensor(reference_mask, dtype=torch.bool)
            kwargs = {"appearance": Appearance(features, keep, frames)}
            rows = batch if keep is None else len(keep)
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
        reference_mask: Tensor | None = None,
    ) -> Tensor:
        """The prediction `[B, F, 4, h, w]`: residuals, features and denoising in one; what training calls.

        Shapes as in `pose_residuals`, `appearance` and `denoise`.
        """
        residuals = self.pose_residuals(noisy, timestep, pose)
        features = self.appearance(reference_latent, timestep)
        eps = self.denoise(noisy, timestep, residuals, features, reference_mask)
        if self.stage == 1 and reference_mask is not None and not reference_mask.any():
            # No row looked at the reference. Gradients of zero, not none at all: data-parallel workers must
            # agree on which parameters have one.
            eps = eps + 0 * sum(f[0, 0, 0] for f in features)
        return eps

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The weights that training makes, by part: what a model folder stores (after stage 1 the first two
        suffice).

        `appearance_unet`: names of the UNet it was copied from; `appa`: PEFT's names (`tcan.appa`);
        `motion_adapter`: names of a `MotionAdapter`; `temporal_controlnet`: names within the ControlNet.
        """
        return {
            "appearance_unet": self.appearance_unet.state_dict(),
            "appa": appa_state_dict(self.denoiser),
            "motion_adapter": temporal_state_dict(self.denoiser),
            "temporal_controlnet": temporal_state_dict(self.controlnet),
        }

    def load_parts(self, parts: dict[str, dict[str, Tensor]]) -> None:
        """Load any of `parts`. Raises KeyError or RuntimeError unless its names are exactly this model's."""
        load = {
            "appearance_unet": self.appearance_unet.load_state_dict,
            "appa": lambda state: load_appa_state_dict(self.denoiser, state),
            "motion_adapter": lambda state: load_temporal_state_dict(self.denoiser, state),
            "temporal_controlnet": lambda state: load_temporal_state_dict(self.controlnet, state),
        }
        for name, state in parts.items():
            load[name](state)

    def motion_adapter(self) -> MotionAdapter:
        """A copy of the denoiser's temporal layers as diffusers' container, to `save_pretrained`."""
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
    reference_mask: Tensor | None = None,
    snr_gamma: float | None = None,
) -> Tensor:
    """MSE on the noise, a scalar (method "Training"); on v where the scheduler's prediction type is that.

    model: a TCAN, or what wraps its `forward` (a DeepSpeed engine). scheduler: for its schedule alone
    (`tcan.schedule.noise_schedule`). snr_gamma: weigh each clip by `tcan.schedule.min_snr_weight`. latents, noise `[B, F, 4, h, w]`; timestep int64 `[B]`, one per clip; the rest as in
    `TCAN.forward`.
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
