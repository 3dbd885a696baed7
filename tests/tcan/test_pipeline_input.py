"""Arguments of TCANPipeline: every documented form of an image gives the same pixels, anything else is a user error."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tcan.errors import UserError
from tcan.pipeline_input import (
    changed_latents,
    check_options,
    draw_noise,
    on_cpu,
    to_character,
    to_image,
    to_motion,
)
from tcan.video import read_image


def all_values() -> np.ndarray:
    """RGB `[16, 16, 3]` with every uint8 value in every channel."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return np.stack([values, values.T, 255 - values], axis=-1)


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path: Path) -> None:
    pixels = all_values()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    floats = pixels.astype(np.float32) / 255
    chw = torch.from_numpy(pixels).movedim(-1, 0)
    forms: list[Any] = [pixels, floats, floats.astype(np.float64), floats.astype(np.float16)]
    forms += [Image.fromarray(pixels), tmp_path / "image.png", str(tmp_path / "image.png")]
    forms += [chw, chw.float() / 255, chw.double() / 255, (chw.float() / 255).requires_grad_()]
    for form in forms:
        np.testing.assert_array_equal(to_image(form), pixels)
    assert to_image(pixels) is pixels
    bfloat16 = to_image((chw / 255).bfloat16())
    assert np.abs(bfloat16.astype(int) - pixels).max() <= 1


def test_pil_conversions_of_opaque_images_equal_those_of_pil() -> None:
    image = Image.fromarray(all_values())
    for mode in ("RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBA", "LA"):
        converted = image.convert(mode)
        np.testing.assert_array_equal(to_image(converted), np.asarray(converted.convert("RGB")), mode)


def test_exif_orientation_of_pil_images_is_applied(tmp_path: Path) -> None:
    """Orientation 6: the first stored row is the right side of the image as displayed."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "rotated.png", exif=exif)
    with Image.open(tmp_path / "rotated.png") as opened:
        np.testing.assert_array_equal(to_image(opened), np.rot90(pixels, k=-1))


@pytest.mark.parametrize("suffix", ["png", "pgm", "tiff"])
def test_16_bit_grayscale_is_scaled_to_8_bits(tmp_path: Path, suffix: str) -> None:
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 16 16 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(path)
    expected = np.arange(256).reshape(16, 16, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(read_image(path), expected)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(to_image(opened), expected)


def test_float_tiff_is_scaled_or_refused(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(values / 255).save(tmp_path / "unit.tiff")
    np.testing.assert_array_equal(read_image(tmp_path / "unit.tiff")[..., 0], values)
    Image.fromarray(values).save(tmp_path / "bytes.tiff")
    with pytest.raises(UserError, match=r"bytes.tiff: float values from 0 to 255; scale them to \[0, 1\]"):
        read_image(tmp_path / "bytes.tiff")
    with pytest.raises(UserError, match="the image: 32-bit integer pixels"):
        to_image(Image.fromarray(values.astype(np.int32)))


def test_colors_with_an_icc_profile_are_converted_to_srgb(tmp_path: Path) -> None:
    """A profile whose red and green channels are swapped gives the swapped colors; PIL's own conversion ignores it."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")
    srgb[red : red + 4], srgb[green : green + 4] = b"gXYZ", b"rXYZ"
    pixels = np.full((4, 4, 3), (200, 40, 90), np.uint8)
    palette = Image.new("P", (4, 4))
    palette.putpalette(pixels[0, 0].tobytes())
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("RGBA"), palette):
        image.save(tmp_path / "image.png", icc_profile=bytes(srgb))
        for found in (read_image(tmp_path / "image.png"), to_image(Image.open(tmp_path / "image.png"))):
            np.testing.assert_allclose(found, pixels[..., [1, 0, 2]], atol=2)
    Image.fromarray(pixels).save(tmp_path / "broken.png", icc_profile=b"no profile")
    np.testing.assert_array_equal(read_image(tmp_path / "broken.png"), pixels)


def test_rounding_errors_of_float_images_are_accepted() -> None:
    image = np.array([[[-0.001, 0.5, 1.001]]], np.float32)
    np.testing.assert_array_equal(to_image(image), [[[0, 128, 255]]])


def test_transparent_pixels_of_pil_images_are_white() -> None:
    transparent = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    np.testing.assert_array_equal(to_image(transparent), 255)


def test_too_many_pixels_are_named(tmp_path: Path) -> None:
    Image.new("1", (14000, 14000)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"large\.png: more than 179 megapixels; scale the image down"):
        read_image(tmp_path / "large.png")


def truncated_image(path: Path) -> Image.Image:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return Image.open(path)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.full((4, 4, 3), 1.5), r"float values from 1.5 to 1.5; scale them to \[0, 1\], or pass uint8"),
        (np.full((4, 4, 3), -0.1), "float values from -0.1 to -0.1"),
        (np.full((4, 4, 3), np.nan, np.float32), "float values contain NaN or inf"),
        (torch.full((3, 4, 4), float("inf")), "float values contain NaN or inf"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64; pass uint8, or float"),
        (np.zeros((4, 4), np.uint8), r"array of shape \[4, 4\]; pass a numpy array \[H, W, 3\]"),
        (np.zeros((3, 4, 4), np.uint8), r"array of shape \[3, 4, 4\]; pass"),
        (np.zeros((4, 4, 4), np.uint8), r"array of shape \[4, 4, 4\]; pass"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"array of shape \[1, 4, 4, 3\]; pass"),
        (np.zeros((0, 4, 3), np.uint8), r"array of shape \[0, 4, 3\]; pass"),
        (torch.zeros(4, 4, 3), r"tensor of shape \[4, 4, 3\]; pass .* a tensor \[3, H, W\]"),
        ([np.zeros((4, 4, 3), np.uint8)], "type list; pass a numpy array"),
        (None, "type NoneType; pass a numpy array"),
    ],
)
def test_other_images_are_user_errors(image: Any, reason: str) -> None:
    with pytest.raises(UserError, match=f"the image: {reason}"):
        to_image(image)


def test_unreadable_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the image: cannot be read"):
        to_image(truncated_image(tmp_path / "cut.png"))
    with pytest.raises(UserError, match=r"missing\.png: no such image"):
        to_image(tmp_path / "missing.png")


def test_every_form_of_driving_frames_gives_the_same_pixels(tmp_path: Path) -> None:
    frames = np.stack([all_values(), all_values()[::-1]])
    fchw = torch.from_numpy(frames).movedim(-1, 1)
    Image.fromarray(frames[0]).save(tmp_path / "0.png")
    mixed = [tmp_path / "0.png", frames[1] / 255]
    for form in (frames, frames / 255, fchw, fchw.float() / 255, list(frames), list(fchw), mixed):
        np.testing.assert_array_equal(to_motion(form), frames)
    np.testing.assert_array_equal(to_motion([Image.fromarray(frame) for frame in frames]), frames)


def test_keypoints_are_unchanged() -> None:
    poses = 64 * np.random.default_rng(0).random((4, 18, 3))
    assert to_motion(poses) is poses
    for form in (list(poses), poses.tolist(), torch.from_numpy(poses), list(torch.from_numpy(poses))):
        np.testing.assert_array_equal(to_motion(form), poses)
    np.testing.assert_array_equal(to_character(poses[0].tolist()), poses[0])


@pytest.mark.parametrize(
    ("poses", "reason"),
    [
        (np.zeros((4, 17, 3)), r"the driving poses: shape \[4, 17, 3\]; pass keypoints \[F, 18, 3\]"),
        (np.zeros((18, 3)), r"the driving poses: shape \[18, 3\]"),
        (np.zeros((0, 18, 3)), r"the driving poses: shape \[0, 18, 3\]"),
        ([], r"the driving poses: shape \[0, 18, 3\]"),
        (np.zeros((2, 3, 8, 8)), r"the driving poses: shape \[2, 3, 8, 8\]"),
        (torch.zeros(2, 8, 8, 3), r"the driving poses: shape \[2, 8, 3, 8\]"),
        (np.full((2, 18, 3), np.nan), "the driving poses: NaN or inf"),
        (np.full((2, 18, 3), 0.5), "the driving poses: keypoints from 0 to 1; multiply x by the width"),
        ("dance.mp4", "the driving poses: type str; pass keypoints"),
        (np.full((2, 8, 8, 3), 2.0), "the driving frames: float values from 2 to 2"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "driving frame 1: shape"),
        ([[1, 2], [3]], "driving frame 0: type list"),
    ],
)
def test_other_driving_motions_are_user_errors(poses: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        to_motion(poses)


def test_invalid_options_are_user_errors() -> None:
    check_options(torch.Generator(), 1, "pt", "paper")
    for options, reason in (
        ((0, 8, "np"), "generator: type int; pass one torch.Generator"),
        (([torch.Generator()], 8, "np"), "generator: type list"),
        ((None, 0, "np"), "decode_batch = 0: must be an integer >= 1"),
        ((None, 1.5, "np"), "decode_batch = 1.5"),
        ((None, 8, "numpy"), "output_type = 'numpy': unknown; use one of np, pil, pt, latent"),
    ):
        with pytest.raises(UserError, match=reason):
            check_options(*options, "robust")
    with pytest.raises(UserError, match=r"the character: shape \[17, 3\]"):
        to_character(np.zeros((17, 3)))
    with pytest.raises(UserError, match="the character: NaN or inf"):
        to_character(np.full((18, 3), np.inf))
    with pytest.raises(UserError, match=r"callback_on_step_end: returned latents of shape \[1, 4, 8, 8\]"):
        changed_latents({"latents": torch.zeros(1, 4, 8, 8)}, torch.zeros(2, 4, 8, 8))


def test_cpu_generators_draw_the_noise_of_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    expected = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw_noise((2, 4, 8, 8), generator), expected)
    assert on_cpu(generator) is generator and on_cpu(None) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
def test_cuda_generators_draw_noise_in_host_memory() -> None:
    def generator() -> torch.Generator:
        return torch.Generator("cuda").manual_seed(3)

    expected = torch.randn(2, 4, 8, 8, generator=generator(), device="cuda").cpu()
    assert torch.equal(draw_noise((2, 4, 8, 8), generator()), expected)
    first, second = on_cpu(generator()), on_cpu(generator())
    assert first is not None and second is not None
    assert torch.equal(torch.randn(4, generator=first), torch.randn(4, generator=second))
