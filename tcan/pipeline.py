"""TCANPipeline: animate the person of an image with a sequence of poses."""

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from tcan.crop import Box, crop_box, fit_image, fit_keypoints
from tcan.errors import UserError
from tcan.model import TCAN
from tcan.person_box import describe_crop, person_box
from tcan.pipeline_input import (
    ImageInput,
    MotionInput,
    Retargeting,
    changed_latents,
    check_options,
    check_size,
    check_tensor_inputs,
    check_window,
    draw_noise,
    on_cpu,
    set_timesteps,
    to_character,
    to_dtype,
    to_image,
    to_motion,
)
from tcan.pipeline_options import LoraOptions, VaeOptions
from tcan.pixels import from_vae_output, to_vae_input
from tcan.pose import PoseDetector, draw_poses, find_people, main_person_poses
from tcan.pose import retarget as retarget_poses
from tcan.pose.parts import BODY, keep_parts
from tcan.sampling import SamplingConfig
from tcan.schedule import noise_schedule
from tcan.transfer import copied_to_host, upload_tensor
from tcan.weights import load_model, load_pose_detector, load_pretrained, read_model_info, save_model
from tcan.weights.common import quiet
from tcan.window_inputs import WindowInputs

logger = logging.getLogger(__name__)
_LOCKS: WeakKeyDictionary[TCAN, Lock] = WeakKeyDictionary()  # pipelines may share a model
Callback = Callable[["TCANPipeline", int, int, dict[str, Tensor]], Any]


@dataclass
class TCANPipelineOutput(BaseOutput):
    """Output of `TCANPipeline`."""

    frames: np.ndarray | list[PIL.Image.Image] | Tensor
    """"np": float32 RGB `[F, H, W, 3]` in [0, 1]; "pt": tensor `[F, 3, H, W]` of the same values; "pil": list of F
    images; "latent": scaled latents `[F, C, h, w]`."""

    poses: np.ndarray
    """Driving poses after retargeting: keypoints `[F, N, 3]` in pixels of the frames, N as in `poses`."""


class TCANPipeline(VaeOptions, LoraOptions, DiffusionPipeline):
    """Animates the person of one image with a sequence of poses (TCAN, arXiv 2407.09012).

        pipe = TCANPipeline.from_pretrained("runs/model").to("cuda")
        frames = pipe(image, driving_frames, generator=torch.Generator().manual_seed(0)).frames

    Device memory depends on the window and the frame size, not on the number of frames. Host memory grows with it, because
    each denoising step visits all windows: it contains all poses, and all latents (16 bytes per 8 x 8 pixels: 64 KiB per frame
    at 512 x 512) with the scheduler's copies. Pose images are drawn per window, frames are decoded per batch, and
    `tcan.window_inputs.CACHED_WINDOWS` bounds the cached inputs of windows. For a long video, request "latent" and use `decode`.
    """

    scheduler: SchedulerMixin  # set by register_modules
    model_cpu_offload_seq = "vae->tcan->vae"
    _optional_components: ClassVar = ["pose_detector"]
    _callback_tensor_inputs: ClassVar = ["latents", "noise_pred"]

    def __init__(
        self,
        vae: AutoencoderKL,
        tcan: TCAN,
        scheduler: SchedulerMixin,
        pose_detector: PoseDetector | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, tcan=tcan, scheduler=scheduler, pose_detector=pose_detector)
        self.model_info: dict[str, Any] = dict(tcan.info)
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        model_folder: str | os.PathLike,
        *,
        torch_dtype: torch.dtype | str = torch.float32,
        variant: str | None = None,
        device: torch.device | str = "cpu",
        **sources: str,
    ) -> "TCANPipeline":
        """Load a model folder and the pretrained models that it names.

        Args:
            torch_dtype: data type of weights and activations, or its name, such as "float16".
            variant: variant of the files in diffusers' layout to prefer, such as "fp16".
            sources: overrides of the sources of pretrained models (`unet="path"`, `pose="path"`, ...), in the forms
                that `load_pretrained` accepts.

        Raises:
            UserError: the folder is not a complete model; a pretrained model cannot be loaded or is not the one that
                the model was trained on.
        """
        info = read_model_info(model_folder)
        requested = {part: model["source"] for part, model in info["pretrained"].items()} | sources
        pose = requested.pop("pose", None)
        pretrained = load_pretrained(**requested, variant=variant, device=device, dtype=to_dtype(torch_dtype))
        tcan = load_model(model_folder, pretrained)
        detector = None if pose is None else load_pose_detector(pose, device, **info.get("draw", {}))
        scheduler = noise_schedule(pretrained.scheduler, **info.get("schedule", {}))
        return cls(pretrained.vae, tcan, scheduler, detector)

    def to(self, *args: Any, **kwargs: Any) -> "TCANPipeline":
        """Same as `DiffusionPipeline.to`; also moves the pose network, which keeps its dtype."""
        with quiet():  # diffusers warns about modules to keep in float32, of which there are none
            super().to(*args, **kwargs)
        if self.pose_detector is not None:
            self.pose_detector.to(self.device)
        return self

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save a model folder for `from_pretrained`: the trained weights, and the names of the pretrained models."""
        if kwargs:
            raise ValueError(f"save_pretrained does not support these options: {', '.join(kwargs)}")
        if self._loras.loras:
            raise UserError(
                f"{save_directory}: a LoRA is merged into the weights; call unload_lora_weights first"
            )
        save_model(self.tcan, save_directory, **self.model_info)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        poses: MotionInput,
        *,
        sampling: SamplingConfig | None = None,
        retarget: Retargeting = "robust",
        character: np.ndarray | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        decode_batch: int = 8,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **overrides: Any,
    ) -> TCANPipelineOutput | tuple:
        """Generate one frame per pose.

        Args:
            image: the character, of any size and in any form of `ImageInput`. It is cropped to the aspect ratio of the
                output: with retargeting around the person (see `tcan.person_box.person_box`), else at the center.
            poses: keypoints `[F, 18, 3]` or `[F, 130, 3]` (`tcan.pose.parts`), or the frames of a driving video (see
                `MotionInput`), in which the pose network tracks the main person. With retargeting, keypoints may be in pixels of
                any image; without it, they are in pixels of the output.
            sampling: options of the denoising loop; None: the defaults.
            retarget: fit the poses to the proportions and the position of the character (see `tcan.pose.retarget`), or "none".
            character: keypoints of the character `[18, 3]` in pixels of the image; None: detected by the pose network.
            height, width: size of the output in pixels, multiples of 8; None: the size used in training.
            num_inference_steps: diffusers' name of `SamplingConfig.steps`.
            generator: source of the noise, on any device; a CPU generator gives the same noise on every device.
            decode_batch: number of frames that the VAE decodes at once, >= 1.
            output_type: "np", "pt", "pil" or "latent".
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)`. If it returns a dict with "latents",
                these replace the latents. `pipe._interrupt = True` ends the denoising after this step.
            callback_on_step_end_tensor_inputs: names of the tensors for the callback, each `[F, C, h, w]`: "latents" and
                "noise_pred".
            overrides: fields of `SamplingConfig` that replace those of `sampling`, such as `steps=50`.

        Raises:
            UserError: no person in the image or in the driving frames; a height or width that is not a multiple of 8;
                an argument of another type or shape, or out of its range.
            TypeError: an unknown option.
        """
        if num_inference_steps is not None:
            overrides["steps"] = num_inference_steps
        sampling = (sampling or SamplingConfig()).override(**overrides)
        check_window(sampling, self.tcan.max_frames)
        height = self.height if height is None else height
        width = self.width if width is None else width
        check_size(height, width)
        check_options(generator, decode_batch, output_type, retarget)
        check_tensor_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        image, poses = to_image(image), to_motion(poses)
        character = None if character is None else to_character(character)
        poses, box = self._prepare_poses(image, poses, retarget, character, height, width)
        latents = self.denoise(
            fit_image(image, height, width, box),
            poses,
            sampling=sampling,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        frames: Any = latents
        if output_type != "latent":
            images = np.concatenate(list(self.decode(latents, decode_batch)))
            frames = self.numpy_to_pil(images) if output_type == "pil" else images
            frames = torch.from_numpy(images).movedim(-1, 1).contiguous() if output_type == "pt" else frames
        self.maybe_free_model_hooks()
        return TCANPipelineOutput(frames, poses) if return_dict else (frames, poses)

    @torch.no_grad()
    def denoise(
        self,
        image: np.ndarray,
        poses: np.ndarray,
        *,
        sampling: SamplingConfig | None = None,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **overrides: Any,
    ) -> Tensor:
        """Generate the latents of all frames, in host memory (method.md, Inference).

        The appearance features are computed once per timestep, for all windows. The ControlNet residuals and the UNet's
        down blocks are computed once per window, for both rows of guidance; the pose embedding once for all timesteps.

        Args:
            image: uint8 RGB `[H, W, 3]`, of the output's size.
            poses: keypoints `[F, 18, 3]` in pixels of the output.
            sampling, generator, callback_on_step_end, overrides: see `__call__`.

        Returns:
            scaled latents `[F, C, h, w]`, float32.
        """
        sampling = (sampling or SamplingConfig()).override(**overrides)
        device = self._execution_device
        self._interrupt = False
        # A new scheduler: `add_noise` in training moves the schedule's tensors to the GPU, but the latents stay on the
        # CPU; and schedulers have state, which simultaneous calls must not share.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        reference = self.encode(image)
        height, width = image.shape[:2]
        clip = WindowInputs(self.tcan, lambda part: self.draw(part, height, width), poses, sampling, device)

        set_timesteps(scheduler, sampling.steps)
        shape = (sampling.window, *reference.shape[1:])
        noise = draw_noise(shape, generator)
        # The noise of one window, repeated along time: all windows start from the same noise.
        noise = noise[torch.arange(clip.num_padded_frames) % sampling.window]
        latents = self.first_latents(
            scheduler, noise, reference.float().cpu() if sampling.start_from_reference else None
        )
        del noise  # of the size of the latents
        # Stochastic schedulers draw noise at every step.
        stochastic = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": on_cpu(generator)} if stochastic else {}

        for step, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            t = torch.full((1,), timestep.item(), dtype=timestep.dtype, device=device)
            features = self.tcan.appearance(reference, t)
            noisy = scheduler.scale_model_input(latents, timestep)[None]
            predictions = (
                self.predict_noise(
                    upload_tensor(noisy[:, frames], device, reference.dtype),
                    t,
                    clip.pose_embedding(index),
                    features,
                    sampling.guidance_scale,
                    clip.temperature(index),
                    sampling.ptm_limit,
                    sampling.controlnet_scale,
                )
                for index, frames in enumerate(clip.windows.indices)
            )
            prediction = clip.windows.average(copied_to_host(eps.float() for eps in predictions))[0]
            latents = scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
            if callback_on_step_end is not None:
                current = latents[: len(poses)]
                tensors = {"latents": current, "noise_pred": prediction[: len(poses)]}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                output = callback_on_step_end(self, step, int(timestep), chosen)
                latents = torch.cat([changed_latents(output, current), latents[len(poses) :]])
            if self._interrupt:
                break
        self.maybe_free_model_hooks()  # with model offloading, makes room for the VAE
        return latents[: len(poses)]

    def first_latents(self, scheduler: SchedulerMixin, noise: Tensor, reference: Tensor | None) -> Tensor:
        """The scheduler's initial latents, `[F, C, h, w]`, from noise `[F, C, h, w]`.

        Without a reference: the noise, scaled. With a reference latent `[1, C, h, w]`: that latent, noised to the first
        timestep, after the mean of each frame and channel is subtracted from the noise. At the last timestep of SD1.5's
        schedule part of the signal remains, so the network interprets the mean of the latents as the brightness of the
        image. The mean of a frame's noise deviates by about 1 / sqrt(h w); the smaller the latents, the more the
        brightness varies between frames.
        """
        if reference is None:
            return noise * scheduler.init_noise_sigma
        noise = noise - noise.mean((-2, -1), keepdim=True)
        return scheduler.add_noise(
            reference.expand_as(noise), noise, scheduler.timesteps[:1].expand(len(noise))
        )

    def predict_noise(
        self,
        noisy: Tensor,
        timestep: Tensor,
        pose: Tensor,
        features: list[Tensor],
        guidance_scale: float,
        temperature: Tensor | None,
        ptm_limit: int | None = None,
        controlnet_scale: float = 1.0,
    ) -> Tensor:
        """Predict the noise of one window with guidance: eps_uncond + scale (eps_ref - eps_uncond).

        Guidance acts on the appearance only. Both rows have the same text and pose, so they share the residuals.

        Args:
            noisy: `[1, F, C, h, w]`.
            timestep: `[1]`.
            pose: pose embedding by `TCAN.embed_pose`, `[1, F, C_0, h, w]`.
            features: appearance features of the reference, one row.
            guidance_scale: 1 skips the unconditional row.
            temperature: `[H, W]`; None: no temperature map.
            ptm_limit, controlnet_scale: see `SamplingConfig`.

        Returns:
            `[1, F, C, h, w]`.
        """
        residuals = self.tcan.pose_residuals(noisy, timestep, pose, controlnet_scale)
        rows = None if guidance_scale == 1 else [False, True]
        with _LOCKS.setdefault(self.tcan, Lock()):  # `denoise` sets the temperature as attributes of layers
            both = self.tcan.denoise(noisy, timestep, residuals, features, rows, temperature, ptm_limit)
        if rows is None:
            return both
        without, with_reference = both.chunk(2)
        return without + guidance_scale * (with_reference - without)

    @torch.no_grad()
    def encode(self, image: np.ndarray) -> Tensor:
        """Encode an image, uint8 RGB `[H, W, 3]`, to the mean of its scaled latent, `[1, C, h, w]`."""
        pixels = to_vae_input(torch.from_numpy(image).to(self._execution_device)[None], self.vae.dtype)
        # contiguous: channels-last convolutions round differently
        return self.vae.encode(pixels.contiguous()).latent_dist.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 8) -> Iterator[np.ndarray]:
        """Decode scaled latents `[F, C, h, w]` in batches: float32 RGB `[<= batch, H, W, 3]` in [0, 1] each."""
        check_options(None, batch, "np", "none")
        for part in latents.split(batch):
            part = part.to(self._execution_device, self.vae.dtype) / self.vae.config.scaling_factor
            yield from_vae_output(self.vae.decode(part, return_dict=False)[0]).cpu().numpy()

    def _prepare_poses(
        self,
        image: np.ndarray,
        poses: np.ndarray,
        retarget: Retargeting,
        character: np.ndarray | None,
        height: int,
        width: int,
    ) -> tuple[np.ndarray, Box]:
        """Keypoints `[F, 18, 3]` in pixels of the output from the argument `poses` of `__call__`; crop of the image."""
        size = (image.shape[0], image.shape[1], height, width)
        if poses.ndim == 4:
            frame_height, frame_width = poses.shape[1:3]
            poses = self.detect_poses(poses, "the driving video")
            if retarget == "none":
                poses = self.scale_poses(poses, frame_height, frame_width, height, width)
        box = crop_box(*size)
        if retarget == "none":
            return poses, box
        if character is None:
            character = self.detect_poses(image[None], "the image")[0, BODY]
        if (around := person_box(character, *size)) != box:
            logger.warning("the image: %s", describe_crop(character, around))
        return retarget_poses(poses, fit_keypoints(character, *size, box=around), retarget), around

    @property
    def height(self) -> int:
        """Height of the training images in pixels."""
        return self._info("height")

    @property
    def width(self) -> int:
        """Width of the training images in pixels."""
        return self._info("width")

    def _info(self, key: str) -> int:
        if key not in self.model_info:
            raise UserError(f"{key}: unknown, as no model folder was loaded; set pipe.model_info[{key!r}]")
        return self.model_info[key]

    def draw(self, poses: np.ndarray, height: int | None = None, width: int | None = None) -> np.ndarray:
        """Draw keypoints `[F, N, 3]` (N: 18 or 130) with the parts and strokes of the training: uint8 RGB `[F, H, W, 3]`."""
        poses = keep_parts(poses, **self.model_info.get("draw", {}))
        style = self.model_info.get("pose_style", "skeleton")
        return draw_poses(poses, height or self.height, width or self.width, self._info("stick_width"), style)

    def scale_poses(
        self,
        poses: np.ndarray,
        source_height: int,
        source_width: int,
        height: int | None = None,
        width: int | None = None,
    ) -> np.ndarray:
        """Map keypoints `[F, 18, 3]` from pixels of a source image to pixels of the output, cropped as images are."""
        return fit_keypoints(poses, source_height, source_width, height or self.height, width or self.width)

    def detect_poses(
        self, frames: Iterable[np.ndarray], source: str, smoothing_window: int = 0
    ) -> np.ndarray:
        """Detect the main person in every frame (see `tcan.pose.main_person_poses`): keypoints `[F, N, 3]`.

        Args:
            frames: uint8 RGB `[H, W, 3]` each, consumed in batches, so a generator keeps memory constant.
            source: name of the frames in error messages.
            smoothing_window: smoothing window in frames (odd, >= 5); 0 disables.

        Raises:
            UserError: no person in any frame; no pose network was loaded.
        """
        if self.pose_detector is None:
            raise UserError(
                f"{source}: this pipeline has no pose network; pass keypoints, or load the network with "
                "from_pretrained(pose=SOURCE)"
            )
        is_offloaded = hasattr(self.vae, "_hf_hook")  # accelerate moves modules only
        if is_offloaded:
            self.pose_detector.to(self._execution_device)
        try:
            people = find_people(self.pose_detector, frames)
        finally:
            if is_offloaded:
                self.pose_detector.to("cpu")
        return main_person_poses(*people, source, smoothing_window)
