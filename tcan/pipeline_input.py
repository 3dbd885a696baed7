"""Validation and conversion of the arguments of `TCANPipeline`."""

import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tcan.errors import UserError, first_line
from tcan.pixels import float_to_uint8, pil_to_uint8
from tcan.pose.keypoints import are_normalized, check_keypoints
from tcan.pose.parts import NUM_POINTS
from tcan.sampling import SamplingConfig
from tcan.video import read_image

ImageInput: TypeAlias = np.ndarray | Image.Image | Tensor | str | os.PathLike
"""An image: RGB as a numpy array `[H, W, 3]` or a tensor `[3, H, W]`, both uint8 or float in [0, 1]; a PIL image; the
path of an image file."""

MotionInput: TypeAlias = np.ndarray | Tensor | list | tuple
"""Keypoints `[F, 18, 3]` or `[F, 130, 3]`, or frames: RGB as a numpy array `[F, H, W, 3]` or a tensor `[F, 3, H, W]`, both uint8
or float in [0, 1]; a list of `ImageInput` of equal size."""

Retargeting = Literal["robust", "paper", "none"]
"""Method of `tcan.pose.retarget`, or "none"."""

_KEYPOINT_SHAPES = ((18, 3), (NUM_POINTS, 3))
OUTPUT_TYPES = ("np", "pil", "pt", "latent")

_IMAGE_FORMS = (
    "a numpy array [H, W, 3] or a tensor [3, H, W] (uint8, or float in [0, 1]), a PIL image or a path"
)
_MOTION_FORMS = (
    "keypoints [F, 18, 3], or frames as a numpy array [F, H, W, 3], a tensor [F, 3, H, W] (uint8, or float in [0, 1]) "
    "or a list of images"
)


def to_image(image: ImageInput, source: str = "the image") -> NDArray[np.uint8]:
    """Convert an image to uint8 RGB `[H, W, 3]`. A uint8 array is returned unchanged.

    Args:
        source: name of the image in error messages.

    Raises:
        UserError: another type or shape; float values that are NaN, infinite or outside [0, 1]; a file or a PIL image
            that cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        try:
            return pil_to_uint8(image, source)
        except OSError as error:  # PIL reads the pixels of an opened file only now
            raise UserError(f"{source}: cannot be read ({error}); use another image") from None
    if isinstance(image, Tensor):
        shape, channels = tuple(image.shape), 0
    elif isinstance(image, np.ndarray):
        shape, channels = image.shape, 2
    else:
        raise UserError(f"{source}: type {type(image).__name__}; pass {_IMAGE_FORMS}")
    if len(shape) != 3 or shape[channels] != 3 or 0 in shape:
        kind = "tensor" if isinstance(image, Tensor) else "array"
        raise UserError(f"{source}: {kind} of shape {_text(shape)}; pass {_IMAGE_FORMS}")
    if isinstance(image, Tensor):
        image = _to_numpy(image.detach().movedim(0, -1))
    return _to_uint8(image, source)


def to_motion(poses: MotionInput) -> np.ndarray:
    """Convert the driving motion to keypoints `[F, N, 3]` (N: 18 or 130) or to frames, uint8 RGB `[F, H, W, 3]`.

    Raises:
        UserError: another type or shape, no frames, frames of different sizes, keypoints that are NaN, infinite or
            relative to the image size; see `to_image`.
    """
    source = "the driving poses"
    if isinstance(poses, list | tuple):
        poses = _stack(poses)
    elif isinstance(poses, Tensor):
        poses = _to_numpy(poses.detach().movedim(1, -1) if poses.ndim == 4 else poses.detach())
    elif not isinstance(poses, np.ndarray):
        raise UserError(f"{source}: type {type(poses).__name__}; pass {_MOTION_FORMS}")
    if poses.ndim == 4 and poses.shape[-1] == 3 and 0 not in poses.shape:
        if poses.dtype == np.uint8:
            return poses
        return np.stack([_to_uint8(frame, "the driving frames") for frame in poses])
    if poses.ndim != 3 or poses.shape[1:] not in _KEYPOINT_SHAPES or not len(poses):
        raise UserError(f"{source}: shape {_text(poses.shape)}; pass {_MOTION_FORMS}")
    check_keypoints(poses, source, frames=True)
    if are_normalized(poses):
        raise UserError(
            f"{source}: keypoints from 0 to 1; multiply x by the width and y by the height of the image"
        )
    return poses


def to_character(character: np.ndarray | Tensor) -> np.ndarray:
    """Check the keypoints of the character, `[18, 3]`.

    Raises:
        UserError: another shape; NaN or inf.
    """
    character = _to_numpy(character.detach()) if isinstance(character, Tensor) else np.asarray(character)
    check_keypoints(character, "the character", frames=False)
    return character


def check_options(
    generator: torch.Generator | None, decode_batch: int, output_type: str, retarget: str
) -> None:
    """Check options that take effect late, before anything runs.

    Raises:
        UserError: an option of another type or out of its range.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise UserError(
            f"generator: type {type(generator).__name__}; pass one torch.Generator, such as "
            "torch.Generator().manual_seed(0), or None"
        )
    if not isinstance(decode_batch, int) or decode_batch < 1:
        raise UserError(f"decode_batch = {decode_batch}: must be an integer >= 1; set e.g. 8")
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type = {output_type!r}: unknown; use one of {', '.join(OUTPUT_TYPES)}")
    if retarget not in get_args(Retargeting):
        raise UserError(f"retarget = {retarget!r}: unknown; use one of {', '.join(get_args(Retargeting))}")


def check_size(height: Any, width: Any) -> None:
    """Check the size of the output in pixels.

    Raises:
        UserError: not a positive multiple of 8.
    """
    for side in (height, width):
        if not isinstance(side, Integral) or side < 1 or side % 8:
            raise UserError(
                f"height {height}, width {width}: must be multiples of 8, above 0; change the size"
            )


def check_tensor_inputs(names: Sequence[str], allowed: Sequence[str]) -> None:
    """Check `callback_on_step_end_tensor_inputs`.

    Raises:
        UserError: an unknown name.
    """
    if unknown := [name for name in names if name not in allowed]:
        raise UserError(
            f"callback_on_step_end_tensor_inputs: unknown {unknown[0]!r}; use {', '.join(allowed)}"
        )


def check_window(sampling: SamplingConfig, max_frames: int) -> None:
    """Require that the temporal layers have a position for every frame of a window.

    Raises:
        UserError: the window is longer.
    """
    if sampling.window > max_frames:
        raise UserError(
            f"{sampling.prefix}window = {sampling.window}: the model's motion modules have {max_frames} positions; set at "
            f"most {max_frames}"
        )


def to_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A data type, or its name as in `torch`, such as "float16".

    Raises:
        UserError: not a floating-point type.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"torch_dtype = {dtype}: unknown; use float32, bfloat16 or float16")
    return found


def set_timesteps(scheduler: Any, steps: int) -> None:
    """Set the number of steps of a scheduler.

    Raises:
        UserError: the scheduler does not support it, such as `LCMScheduler` above 50 steps.
    """
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise UserError(
            f"steps = {steps}: not supported by {type(scheduler).__name__} ({first_line(error)}); set fewer steps"
        ) from None


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Normal noise in host memory, drawn on the device of the generator."""
    device = torch.device("cpu") if generator is None else generator.device
    return randn_tensor(shape, generator=generator, device=device).cpu()


def on_cpu(generator: torch.Generator | None) -> torch.Generator | None:
    """The generator, or a CPU generator seeded from it: schedulers draw noise where the latents are, on the CPU."""
    if generator is None or generator.device.type == "cpu":
        return generator
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def changed_latents(output: Any, current: Tensor) -> Tensor:
    """The latents that a callback returned in a dict, else the current ones, `[F, C, h, w]`.

    Raises:
        UserError: "latents" is not a tensor of the same shape.
    """
    changed = output.get("latents", current) if isinstance(output, dict) else current
    if not isinstance(changed, Tensor) or changed.shape != current.shape:
        shape = list(getattr(changed, "shape", ()))
        raise UserError(
            f"callback_on_step_end: returned latents of shape {shape}; return a tensor of shape {list(current.shape)}"
        )
    return changed.to(current)


def _stack(items: list | tuple) -> np.ndarray:
    """A list of images to frames, uint8 `[F, H, W, 3]`; a list of keypoints `[N, 3]` to `[F, N, 3]`."""
    keypoints = [_keypoints_of(item) for item in items]
    if all(item is not None for item in keypoints):
        return (
            np.stack([item for item in keypoints if item is not None]) if keypoints else np.empty((0, 18, 3))
        )
    frames = [to_image(item, f"driving frame {index}") for index, item in enumerate(items)]
    for index, frame in enumerate(frames):
        if frame.shape != frames[0].shape:
            raise UserError(
                f"driving frame {index}: shape {_text(frame.shape)}, but frame 0 has {_text(frames[0].shape)}; "
                "pass frames of one size"
            )
    return np.stack(frames)


def _keypoints_of(item: Any) -> np.ndarray | None:
    """An item of the list of poses as an array, if it has the shape of keypoints."""
    if isinstance(item, list | tuple):
        try:
            item = np.asarray(item)
        except ValueError:  # rows of different lengths
            return None
    if not isinstance(item, np.ndarray | Tensor) or item.shape not in _KEYPOINT_SHAPES:
        return None
    return _to_numpy(item.detach()) if isinstance(item, Tensor) else item


def _to_uint8(image: np.ndarray, source: str) -> NDArray[np.uint8]:
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise UserError(f"{source}: dtype {image.dtype}; pass uint8, or float in [0, 1]")
    return float_to_uint8(image, source)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    # numpy has no bfloat16; float16 and float32 in [0, 1] give the same uint8
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def _text(shape: Any) -> str:
    return f"[{', '.join(map(str, shape))}]"
