"""Conversion between uint8 frames, PIL images, float images and the tensors that the networks take.

diffusers' `VaeImageProcessor` converts float images in [0, 1] on the CPU. Here frames stay uint8 until they are on the
device, which moves 25 % of the bytes.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from tcan.errors import UserError

if TYPE_CHECKING:  # modules that decoder processes import must not import torch
    import torch
    from torch import Tensor


def to_vae_input(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 RGB `[N, H, W, 3]` -> `[N, 3, H, W]` in [-1, 1], the VAE's input, on the same device."""
    return frames.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1


def from_vae_output(images: Tensor) -> Tensor:
    """`[N, 3, H, W]` in [-1, 1] -> float32 RGB `[N, H, W, 3]` in [0, 1], on the same device."""
    return (images / 2 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1)


def to_controlnet_input(drawn: Tensor) -> Tensor:
    """Drawn poses, uint8 RGB `[..., H, W, 3]` -> float32 `[..., 3, H, W]` in [0, 1], on the same device."""
    return drawn.movedim(-1, -3).float() / 255


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Float RGB in [0, 1] -> uint8, of any shape."""
    return (frames * 255).round().astype(np.uint8)


def float_to_uint8(image: np.ndarray, source: str) -> NDArray[np.uint8]:
    """Float values in [0, 1] -> uint8, of any shape. Rounding errors, up to 0.5 gray levels outside, are accepted.

    Args:
        source: name of the image in error messages.

    Raises:
        UserError: NaN, inf, or values outside [0, 1].
    """
    if not np.isfinite(image).all():
        raise UserError(f"{source}: float values contain NaN or inf; pass float values in [0, 1], or uint8")
    low, high = image.min(), image.max()
    if low * 255 < -0.5 or high * 255 >= 255.5:
        raise UserError(
            f"{source}: float values from {low:g} to {high:g}; scale them to [0, 1], or pass uint8"
        )
    return to_uint8(image.astype(np.float32))


def pil_to_uint8(image: Image.Image, source: str) -> NDArray[np.uint8]:
    """Convert a PIL image of any mode to uint8 RGB `[H, W, 3]`.

    EXIF orientation is applied, colors with an ICC profile are converted to sRGB, and transparent pixels are blended with white. 16-bit grayscale is scaled to 8 bits,
    and float grayscale from [0, 1]; PIL's own conversion clips both to 255.

    Args:
        source: name of the image in error messages.

    Raises:
        UserError: 32-bit integers, float values outside [0, 1], or a mode that PIL cannot convert to RGB.
    """
    # PIL reads a 16-bit PGM as 32-bit integers, already scaled to 16 bits.
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = _to_srgb(ImageOps.exif_transpose(image))
    if deep:
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(float_to_uint8(np.asarray(image), source))
    elif image.mode == "I":
        raise UserError(f"{source}: 32-bit integer pixels have no defined range; convert the image to 8 bits")
    try:
        image = image.convert("RGBA")
    except ValueError:
        raise UserError(
            f"{source}: mode {image.mode} cannot be converted; convert the image to RGB"
        ) from None
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colors of an image with an ICC profile to sRGB; an unusable profile is ignored, as browsers do."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("P", "PA"):  # the profile refers to the colors of the palette
        image = image.convert("RGBA")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGBA":
            colors = ImageCms.profileToProfile(image.convert("RGB"), source, ImageCms.createProfile("sRGB"))
            assert colors is not None
            colors.putalpha(image.getchannel("A"))
            return colors
        return (
            ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            or image
        )
    except (ImageCms.PyCMSError, OSError):
        return image
