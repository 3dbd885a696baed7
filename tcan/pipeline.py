"""TCANPipeline: a image and a sequence of poses -> frames."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tcan.errors import UserError
from tcan.model import TCAN
from tcan.pose import PoseDetector, draw_poses, find_people, one_body
from tcan.pose import retarget as retarget_poses
from tcan.schedule import noise_schedule
from tcan.temperature import temperature_map
from tcan.video import fit_image, fit_keypoints
from tcan.weights import load_model, load_pose_detector, load_pretrained, read_model_info, save_model
from tcan.windows import Windows

EMBEDDED_WINDOWS = 64
"""Windows whose embedded poses the host keeps (2.5 MiB a frame at 512 x 512 in half precision); those of further windows
are made anew at each step."""


@dataclass
class TCANPipelineOutput(BaseOutput):
    """What a call returns."""

    frames: np.ndarray | list[PIL.Image.Image] | Tensor
    """"np": float32 RGB `[F, H, W, 3]` in [0, 1]; "pil": a list of F images; "latent": scaled latents `[F, C, h, w]`."""

    poses: np.ndarray
    """The poses that drove the frames, after retargeting: keypoints `[F, 18, 3]` in the frames' pixels."""


class TCANPipeline(DiffusionPipeline):
    """Animates the person of one image with a sequence of poses (TCAN, arXiv 2407.09012).

        pipe = TCANPipeline.from_pretrained("runs/model").to("cuda")
        frames = pipe(image, driving_frames, generator=torch.Generator().manual_seed(0)).frames

    Device memory depends on the window and the size of the frames, not on their number. What the host must hold of a
    whole video: its poses, its latents (16 bytes for each 8 x 8 pixels: 64 KiB a frame at 512 x 512) and the
    scheduler's working copies of them, and a temperature map a window (4 bytes a pixel), because each step of the
    denoising goes through all windows before the next begins. Pose images are drawn window by window and frames decoded
    batch by batch; `EMBEDDED_WINDOWS` bounds what is kept of the former. The result's `frames` are all frames at once: for a long video ask for "latent" and go through
    `decode`.
    """

    model_cpu_offload_seq = "vae->tcan->vae"
    _optional_components: ClassVar = ["pose_detector"]

    def __init__(
        self,
        vae: AutoencoderKL,
        tcan: TCAN,
        scheduler: SchedulerMixin,
        pose_detector: PoseDetector | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, tcan=tcan, scheduler=scheduler, pose_detector=pose_detector)
        self.model_info: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        model_folder: str | os.PathLike,
        *,
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **sources: str,
    ) -> "TCANPipeline":
        """Loads a model folder and the pretrained it names.

        Args:
            sources: where to take a base from instead (`unet="path"`, `pose="path"`, ...), as `load_pretrained` takes them.

        Raises:
            UserError: the folder isn't a whole model, a base can't be loaded or isn't the one that it was trained on.
        """
        info = read_model_info(model_folder)
        asked = {part: base["source"] for part, base in info["pretrained"].items()} | sources
        pose = asked.pop("pose", None)
        pretrained = load_pretrained(**asked, device=device, dtype=torch_dtype)
        tcan = load_model(model_folder, pretrained)
        detector = None if pose is None else load_pose_detector(pose, device)
        pipe = cls(
            pretrained.vae, tcan, noise_schedule(pretrained.scheduler, **info.get("schedule", {})), detector
        )
        pipe.model_info = info
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes the model folder that `from_pretrained` reads: what was trained, and the names of the pretrained."""
        if kwargs:
            raise ValueError(f"a model folder takes no options: {', '.join(kwargs)}")
        save_model(self.tcan, save_directory, **self.model_info)

    @torch.no_grad()
    def __call__(
        self,
        image: np.ndarray | PIL.Image.Image,
        poses: np.ndarray,
        *,
        retarget: bool = True,
        character: np.ndarray | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        window: int = 16,
        overlap: int = 4,
        loop: bool = False,
        ptm: bool = True,
        ptm_strength: float = 1.0,
        ptm_limit: int | None = None,
        controlnet_scale: float = 1.0,
        start_from_reference: bool = False,
        generator: torch.Generator | None = None,
        decode_batch: int = 8,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[["TCANPipeline", int, int, dict[str, Tensor]], Any] | None = None,
    ) -> TCANPipelineOutput | tuple:
        """A frame for each pose.

        Args:
            image: the character, uint8 RGB `[H, W, 3]` or a PIL image of any size; its largest centred part of the
                output's proportions is used.
            poses: keypoints `[F, 18, 3]`, or the frames of a driving video, uint8 RGB `[F, H, W, 3]`, whose main
                person the pose network then follows. With `retarget` keypoints may be in pixels of any image; without,
                they are in pixels of the output.
            retarget: fit the poses to the character's proportions and place.
            character: the character's own keypoints `[18, 3]` in the image's pixels; found by the pose network if None.
            height, width: of the output in pixels, multiples of 64; those of training if None.
            guidance_scale: of the appearance: 1 turns guidance, and its second pass, off.
            window, overlap: frames that attend to each other, and how many neighbouring windows share.
            loop: the poses end where they begin: so does the result (`Windows`).
            ptm: the pose-driven temperature map on the UNet's temporal attention.
            ptm_strength: how steeply it rises with the distance from the skeleton (`temperature_map`); 1 is the paper's.
            ptm_limit: it acts in layers whose grid has at most so many cells on its longer side; None: in all.
            controlnet_scale: of the poses' residuals.
            start_from_reference: begin with the image under the first timestep's noise, rather than with noise alone
                (`first_latents`).
            generator: fixes the noise; on the CPU it gives the same noise whatever the device.
            decode_batch: frames that the VAE decodes at once.
            output_type: "np", "pil" or "latent".
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": [F, C, h, w]})`.

        Raises:
            UserError: no person in the image or in the driving frames; a height or width no multiple of 64.
        """
        height, width = height or self.height, width or self.width
        if height % 64 or width % 64:
            raise UserError(f"height {height}, width {width}: must be multiples of 64")
        image = np.asarray(image.convert("RGB") if isinstance(image, PIL.Image.Image) else image)
        poses = self._prepare_poses(image, np.asarray(poses), retarget, character, height, width)
        latents = self.denoise(
            fit_image(image, height, width),
            poses,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            window=window,
            overlap=overlap,
            loop=loop,
            ptm=ptm,
            ptm_strength=ptm_strength,
            ptm_limit=ptm_limit,
            controlnet_scale=controlnet_scale,
            start_from_reference=start_from_reference,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
        )
        frames: Any = latents
        if output_type != "latent":
            images = np.concatenate(list(self.decode(latents, decode_batch)))
            frames = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return TCANPipelineOutput(frames, poses) if return_dict else (frames, poses)

    def denoise(
        self,
        image: np.ndarray,
        poses: np.ndarray,
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        window: int = 16,
        overlap: int = 4,
        loop: bool = False,
        ptm: bool = True,
        ptm_strength: float = 1.0,
        ptm_limit: int | None = None,
        controlnet_scale: float = 1.0,
        start_from_reference: bool = False,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[["TCANPipeline", int, int, dict[str, Tensor]], Any] | None = None,
    ) -> Tensor:
        """The latents of all frames by the scheduler's steps (method.md, Inference), on the host.

        Per timestep the appearance features are computed once, for all windows; per window the ControlNet's residuals
        and the UNet's down blocks once, for both rows of guidance; the ControlNet's pose encoder, which knows no
        timestep, once in all (of a long video: EMBEDDED_WINDOWS).

        Args:
            image: uint8 RGB `[H, W, 3]`, of the output's size.
            poses: keypoints `[F, 18, 3]` in pixels of the output.

        Returns:
            scaled latents `[F, C, h, w]`, float32.
        """
        device = self._execution_device
        reference = self.encode(image)
        windows = Windows(len(poses), window, overlap, loop)
        padded = poses[windows.source.numpy()]

        def draw(part: Tensor) -> Tensor:
            """uint8 `[F, 3, H, W]`, drawn when needed: images of all windows would be far more than the latents."""
            return torch.from_numpy(self.draw(padded[part.numpy()], *image.shape[:2])).permute(0, 3, 1, 2)

        embedded: dict[int, Tensor] = {}

        def embed(index: int, part: Tensor) -> Tensor:
            """A window's poses as the ControlNet takes them in, `[1, F, C_0, h, w]`."""
            if index in embedded:
                return embedded[index].to(device)
            pose = self.tcan.embed_pose(draw(part)[None].to(device) / 255)
            if index < EMBEDDED_WINDOWS:
                embedded[index] = pose.cpu()
            return pose

        temperatures = [
            temperature_map(draw(part), ptm_strength) if ptm else None for part in windows.indices
        ]

        self.scheduler.set_timesteps(num_inference_steps)
        noise = randn_tensor((window, *reference.shape[1:]), generator=generator, device=torch.device("cpu"))
        # one window's noise repeated along time, so that all windows start from the same
        noise = noise[torch.arange(len(padded)) % window]
        latents = self.first_latents(noise, reference.float().cpu() if start_from_reference else None)
        # Samplers that draw noise at every step draw it here.
        draws = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if draws else {}

        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            t = timestep.to(device).reshape(1)
            features = self.tcan.appearance(reference, t)
            noisy = self.scheduler.scale_model_input(latents, timestep)[None]
            predictions = (
                self.predict_noise(
                    noisy[:, part].to(device, reference.dtype),
                    t,
                    embed(index, part),
                    features,
                    guidance_scale,
                    None if temperature is None else temperature.to(device),
                    ptm_limit,
                    controlnet_scale,
                )
                for index, (part, temperature) in enumerate(zip(windows.indices, temperatures, strict=True))
            )
            prediction = windows.average(eps.float().cpu() for eps in predictions)[0]
            latents = self.scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, int(timestep), {"latents": latents[: windows.num_frames]})
        return latents[: windows.num_frames]

    def first_latents(self, noise: Tensor, reference: Tensor | None) -> Tensor:
        """What the scheduler's first step begins with, `[F, C, h, w]` of noise `[F, C, h, w]`.

        Without a reference the noise alone. With one, `[1, C, h, w]`, that image under the noise, of which each frame's
        and channel's mean is taken out. For at the last timestep of SD1.5's schedule something of the image is left, so
        the network takes what the latents' mean is for the image's brightness; a frame's noise has a mean of its own,
        about 1 / sqrt(h w), and the smaller the latents, the more the frames' brightness differs.
        """
        if reference is None:
            return noise * self.scheduler.init_noise_sigma
        noise = noise - noise.mean((-2, -1), keepdim=True)
        return self.scheduler.add_noise(
            reference.expand_as(noise), noise, self.scheduler.timesteps[:1].expand(len(noise))
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
        """The guided noise of one window: eps_uncond + scale (eps_ref - eps_uncond).

        Both rows share text and pose, guidance acts on the appearance alone; so the residuals serve both.

        Args:
            noisy: `[1, F, C, h, w]`.
            timestep: `[1]`.
            pose: what `TCAN.embed_pose` made of the pose images, `[1, F, C, h, w]`.
            features: of the reference, one row.
            temperature: `[H, W]`.

        Returns:
            `[1, F, C, h, w]`.
        """
        residuals = self.tcan.pose_residuals(noisy, timestep, pose, controlnet_scale)
        if guidance_scale == 1:
            return self.tcan.denoise(noisy, timestep, residuals, features, None, temperature, ptm_limit)
        both = self.tcan.denoise(noisy, timestep, residuals, features, [False, True], temperature, ptm_limit)
        without, with_reference = both.chunk(2)
        return without + guidance_scale * (with_reference - without)

    def encode(self, image: np.ndarray) -> Tensor:
        """uint8 RGB `[H, W, 3]` -> the mean of its scaled latent `[1, C, h, w]`."""
        pixels = (
            torch.from_numpy(image).to(self._execution_device).permute(2, 0, 1)[None].to(self.vae.dtype)
            / 127.5
            - 1
        )
        return self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor

    def decode(self, latents: Tensor, batch: int = 8) -> Iterator[np.ndarray]:
        """Scaled latents `[F, C, h, w]` -> float32 RGB `[<= batch, H, W, 3]` in [0, 1], batch by batch."""
        for part in latents.split(batch):
            part = part.to(self._execution_device, self.vae.dtype) / self.vae.config.scaling_factor
            pixels = self.vae.decode(part, return_dict=False)[0]
            yield (pixels / 2 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1).cpu().numpy()

    def _prepare_poses(
        self,
        image: np.ndarray,
        poses: np.ndarray,
        retarget: bool,
        character: np.ndarray | None,
        height: int,
        width: int,
    ) -> np.ndarray:
        """The poses `[F, 18, 3]` in pixels of the output."""
        if poses.ndim == 4:
            frame_height, frame_width = poses.shape[1:3]
            poses = self.detect_poses(poses, "the driving video")
            if not retarget:
                poses = self.scale_poses(poses, frame_height, frame_width, height, width)
        if not retarget:
            return poses
        if character is None:
            character = self.detect_poses(image[None], "the image")[0]
        return retarget_poses(poses, fit_keypoints(character, image.shape[0], image.shape[1], height, width))

    @property
    def height(self) -> int:
        """Of the images it was trained on, in pixels."""
        return self.model_info["height"]

    @property
    def width(self) -> int:
        """Of the images it was trained on, in pixels."""
        return self.model_info["width"]

    def draw(self, poses: np.ndarray, height: int | None = None, width: int | None = None) -> np.ndarray:
        """Keypoints `[F, 18, 3]` -> pose images, uint8 RGB `[F, H, W, 3]`, with the strokes it was trained on."""
        return draw_poses(poses, height or self.height, width or self.width, self.model_info["stick_width"])

    def scale_poses(
        self,
        poses: np.ndarray,
        source_height: int,
        source_width: int,
        height: int | None = None,
        width: int | None = None,
    ) -> np.ndarray:
        """Keypoints `[F, 18, 3]` in pixels of a source image -> of the output, cut and resized as images are."""
        return fit_keypoints(poses, source_height, source_width, height or self.height, width or self.width)

    def detect_poses(self, frames: Iterable[np.ndarray], what: str, smooth: int = 0) -> np.ndarray:
        """The main person's keypoints `[F, 18, 3]`, in every frame (`tcan.pose.one_body` says how).

        Args:
            frames: uint8 RGB `[H, W, 3]` each; taken a few at a time, so a generator needs no memory.
            what: names them where something is wrong with them.
            smooth: frames over which to smooth the movement (odd, 5 or more); 0: not at all.

        Raises:
            UserError: no person in any of them; no pose network was loaded.
        """
        if self.pose_detector is None:
            raise UserError(
                f"{what}: this pipeline has no pose network; give keypoints, or from_pretrained(pose=SOURCE)"
            )
        return one_body(*find_people(self.pose_detector, frames), what, smooth)
