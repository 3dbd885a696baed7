"""Training of the mini preset's UNet, and of its ControlNet and motion modules with the UNet frozen.

The training differs from that of Stable Diffusion in one point. There, a prompt describes the image. The puppet world has
no text, so the UNet learns with a *reference* in 75 % of the samples: another frame of the same character, whose features
enter its self-attention as in TCAN's reference attention. TCAN's stage 1 therefore starts from a UNet that can use a
reference, as the paper's starts from one that can use a prompt.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from pipelines.puppets.corpus import SIZE, Rendered
from pipelines.puppets.fit import RECIPE, Batch, Setting, fit
from pipelines.puppets.mini_vae import LATENT_CHANNELS, zero_last_convolutions
from tcan.appearance import capture_features, install_appearance
from tcan.attention import Appearance
from tcan.model import TCAN
from tcan.pixels import to_controlnet_input
from tcan.pose.draw import PoseStyle, draw_poses
from tcan.schedule import min_snr_weight

CHANNELS = (48, 96, 128, 128)
HEADS = 4
NORM_GROUPS = 16
PROMPT_WIDTH = 64
STICK_WIDTH = 2
REFERENCE_FRACTION = 0.75
SNR_GAMMA = 5.0

STEPS = {"unet": 8300, "controlnet": 2150, "motion": 1560}
LEARNING_RATE = {"unet": 2e-3, "controlnet": 2e-3, "motion": 1.5e-3}
IMAGES = 32
"""Images per step, for UNet and ControlNet."""
CLIPS = 3
"""Clips per step, for the motion modules."""


def new_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=CHANNELS,
        norm_num_groups=NORM_GROUPS,
        attention_head_dim=HEADS,
        cross_attention_dim=PROMPT_WIDTH,
    )
    zero_last_convolutions(unet)
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def new_motion_adapter() -> MotionAdapter:
    adapter = MotionAdapter(
        block_out_channels=CHANNELS,
        motion_layers_per_block=1,
        motion_num_attention_heads=HEADS,
        motion_norm_num_groups=NORM_GROUPS,
        motion_max_seq_length=32,
        use_motion_mid_block=False,
    )
    for name, parameter in adapter.named_parameters():
        if ".proj_out." in name:  # the untrained layers are the identity
            nn.init.zeros_(parameter)
    return adapter


def new_text_encoder() -> CLIPTextModel:
    """Build the untrained text encoder. It only produces the constant embedding of the empty prompt."""
    config = CLIPTextConfig(
        vocab_size=3,
        hidden_size=PROMPT_WIDTH,
        intermediate_size=2 * PROMPT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return CLIPTextModel(config)


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Samples:
    """Training batches as a function of the step: latents, the reference latent of another frame, poses, noise.

    Args:
        rendered: frames `[N, F, H, W, 3]` with their keypoints.
        latents: of these frames, `[N, F, C, h, w]`.
        pose_style: of the pose images.
    """

    def __init__(self, rendered: Rendered, latents: Tensor, pose_style: PoseStyle = "skeleton"):
        self.keypoints, self.latents, self.pose_style = rendered.keypoints, latents, pose_style
        self.scheduler = new_scheduler()

    def images_at(self, step: int, part: int, batch: int = 1, drawn: bool = True) -> Batch:
        """Return `IMAGES * batch` clips of one frame. The reference is another frame of the same character.

        Args:
            drawn: whether the batch has pose images; without them, it takes less time.
        """
        rng = np.random.default_rng([part, step])
        count, frames_each = self.latents.shape[:2]
        size = IMAGES * batch
        which = torch.from_numpy(rng.choice(count, size, replace=False))
        target = torch.from_numpy(rng.integers(frames_each, size=size))
        reference = (target + torch.from_numpy(rng.integers(1, frames_each, size=size))) % frames_each
        return self._noised(
            rng,
            self.latents[which, target][:, None].float(),
            self.latents[which, reference].float(),
            self.keypoints[which.numpy(), target.numpy()][:, None] if drawn else None,
        )

    def clips_at(self, step: int, part: int, batch: int = 1) -> Batch:
        """Return `CLIPS * batch` clips of 16 frames without pose images. The reference is a frame of the same clip."""
        rng = np.random.default_rng([part, step])
        count, frames = self.latents.shape[:2]
        size = CLIPS * batch
        which = torch.from_numpy(rng.choice(count, size, replace=False))
        reference = torch.from_numpy(rng.integers(frames, size=size))
        latents = self.latents[which].float()
        return self._noised(rng, latents, latents[torch.arange(size), reference], None)

    def _noised(
        self, rng: np.random.Generator, latents: Tensor, reference: Tensor, keypoints: np.ndarray | None
    ) -> Batch:
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        timestep = torch.from_numpy(rng.integers(1000, size=len(latents)))
        batch = {
            "noisy": self.scheduler.add_noise(latents, noise, timestep),
            "noise": noise,
            "timestep": timestep,
            "weight": min_snr_weight(self.scheduler, timestep, SNR_GAMMA),
            "reference_latent": reference,
            # A list, because the networks read it on the host.
            "reference_mask": (rng.random(len(latents)) < REFERENCE_FRACTION).tolist(),
        }
        if keypoints is not None:
            poses = [draw_poses(clip, SIZE, SIZE, STICK_WIDTH, self.pose_style) for clip in keypoints]
            batch["pose"] = to_controlnet_input(torch.from_numpy(np.stack(poses)))
        return batch


def noise_loss(prediction: Tensor, batch: Batch) -> Tensor:
    """Mean squared error of the predicted noise with min-SNR-gamma weights."""
    error = (prediction.float() - batch["noise"]).square().flatten(1).mean(1)
    return (error * batch["weight"]).mean()


def train_unet(
    samples: Samples, prompt: Tensor, work: Path, setting: Setting = RECIPE
) -> UNet2DConditionModel:
    unet = new_unet().to(memory_format=torch.channels_last)
    install_appearance(unet)
    prompt = prompt.to(setting.device)

    def loss_of(step: int, batch: Batch) -> Tensor:
        timestep, prompts = batch["timestep"], prompt.expand(len(batch["timestep"]), -1, -1)
        with torch.no_grad():  # halves the cost; TCAN's stage 1 trains the features
            features = capture_features(unet, batch["reference_latent"], timestep, prompts)
        prediction = unet(
            batch["noisy"][:, 0],
            timestep,
            prompts,
            cross_attention_kwargs={"appearance": Appearance(features, batch["reference_mask"])},
        ).sample
        return noise_loss(prediction[:, None], batch)

    return fit(
        "unet",
        unet,
        lambda step: samples.images_at(step, 3, setting.batch, drawn=False),
        loss_of,
        steps=STEPS["unet"],
        lr=LEARNING_RATE["unet"],
        work=work,
        setting=setting,
    )


def train_controlnet(
    samples: Samples,
    unet: UNet2DConditionModel,
    prompt: Tensor,
    work: Path,
    setting: Setting = RECIPE,
    *,
    start: ControlNetModel | None = None,
    steps: int | None = None,
) -> ControlNetModel:
    """Train a ControlNet inside a TCAN whose other parts are frozen and untrained.

    Args:
        start: weights to start from; None: an untrained ControlNet.
        steps: None: those of the recipe.
    """
    tcan = TCAN(unet, start or ControlNetModel.from_unet(unet), new_motion_adapter(), prompt)
    tcan.controlnet.requires_grad_(True)
    for block in tcan.controlnet.down_blocks:
        if hasattr(block, "motion_modules"):
            block.motion_modules.requires_grad_(False)

    def loss_of(step: int, batch: Batch) -> Tensor:
        inputs = (batch[key] for key in ("noisy", "timestep", "pose", "reference_latent", "reference_mask"))
        return noise_loss(tcan(*inputs), batch)

    fitted = fit(
        "controlnet",
        tcan,
        lambda step: samples.images_at(step, 4, setting.batch),
        loss_of,
        steps=steps or STEPS["controlnet"],
        lr=LEARNING_RATE["controlnet"],
        work=work,
        setting=setting,
    )
    controlnet = ControlNetModel.from_unet(unet)
    weights = {k: v for k, v in fitted.controlnet.state_dict().items() if "motion_modules" not in k}
    controlnet.load_state_dict(weights)
    return controlnet


def train_motion(
    samples: Samples, unet: UNet2DConditionModel, prompt: Tensor, work: Path, setting: Setting = RECIPE
) -> MotionAdapter:
    """Train temporal layers in the frozen UNet as in AnimateDiff, without poses (the ControlNet does not run)."""
    tcan = TCAN(unet, ControlNetModel.from_unet(unet), new_motion_adapter(), prompt)
    tcan.set_stage(2)
    tcan.controlnet.requires_grad_(False)

    def loss_of(step: int, batch: Batch) -> Tensor:
        with torch.no_grad():
            features = tcan.appearance(batch["reference_latent"], batch["timestep"])
        prediction = tcan.denoise(batch["noisy"], batch["timestep"], None, features, batch["reference_mask"])
        return noise_loss(prediction, batch)

    fitted = fit(
        "motion",
        tcan,
        lambda step: samples.clips_at(step, 5, setting.batch),
        loss_of,
        steps=STEPS["motion"],
        lr=LEARNING_RATE["motion"],
        work=work,
        setting=setting,
    )
    return fitted.motion_adapter()
