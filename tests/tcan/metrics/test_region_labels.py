"""PSNR of labelled regions against closed forms, and the file of the labels."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.puppets.world import sample_clip
from tcan.crop import fit_image
from tcan.errors import UserError
from tcan.metrics import labelled_region_metrics
from tcan.metrics.region_labels import COMPARED, REGIONS, read_regions, write_regions

BODY, FACE, HAIR_EARS, HANDS = (1 + REGIONS.index(name) for name in ("body", "face", "hair_ears", "hands"))


@pytest.mark.parametrize("name", COMPARED)
def test_errors_of_a_region_change_its_psnr_only(name: str) -> None:
    clip = sample_clip("dance", 1, 3, size=64, every=6, regions=True)
    assert clip.regions is not None
    truth = clip.frames // 2  # headroom for the error
    region = clip.regions == 1 + REGIONS.index(name)
    found = labelled_region_metrics(truth + 10 * region[..., None].astype(np.uint8), truth, clip.regions)
    assert found.pop(f"psnr_{name}_true") == pytest.approx(20 * np.log10(255 / 10))
    assert set(found.values()) == {np.inf}
    outside = labelled_region_metrics(truth + 10 * ~region[..., None], truth, clip.regions)
    assert outside[f"psnr_{name}_true"] == np.inf


def test_psnr_is_over_the_pixels_of_all_frames_and_nan_without_pixels() -> None:
    """Errors of 20 in one of 4 pixels of a region, whose pixels are in two of three frames."""
    labels = np.zeros((3, 4, 4), np.uint8)
    labels[0, 0, :3], labels[2, 3, 3], labels[1] = HAIR_EARS, HAIR_EARS, BODY
    truth = np.full((3, 4, 4, 3), 100, np.uint8)
    result = truth.copy()
    result[2, 3, 3] -= 20
    result[0, 2], result[1] = 0, 255  # the background and the body do not count
    found = labelled_region_metrics(result, truth, labels)
    assert found["psnr_hair_ears_true"] == pytest.approx(20 * np.log10(255 / 10))  # RMSE 20 / sqrt(4)
    assert np.isnan(found["psnr_face_true"]) and np.isnan(found["psnr_hands_true"])


def test_file_of_labels_reads_back_and_is_reproducible(tmp_path: Path) -> None:
    clip = sample_clip("bizarre", 2, 4, size=64, regions=True)
    assert clip.regions is not None
    path = tmp_path / "a.regions.npz"
    write_regions(clip.regions, path)
    content = path.read_bytes()
    write_regions(clip.regions, path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    found = read_regions(path, 4, 64, 64)
    assert found is not None and found.dtype == np.uint8
    np.testing.assert_array_equal(found, clip.regions)
    np.testing.assert_array_equal(read_regions(path, 2, 64, 64), clip.regions[:2])
    assert read_regions(tmp_path / "b.regions.npz", 4, 64, 64) is None


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (64, 128)])
def test_labels_of_another_size_are_cropped_as_the_frames(size: tuple[int, int], tmp_path: Path) -> None:
    """Labels drawn as an image and cropped as a frame are nearly the same; no new label appears."""
    clip = sample_clip("dance", 2, 1, size=128, regions=True)
    assert clip.regions is not None
    write_regions(clip.regions, tmp_path / "a.regions.npz")
    found = read_regions(tmp_path / "a.regions.npz", 1, *size)
    assert found is not None and found.shape == (1, *size) and set(np.unique(found)) == {0, 1, 2, 3, 4}
    for label in (BODY, FACE):
        drawn = np.repeat(255 * (clip.regions[0] == label).astype(np.uint8)[..., None], 3, axis=2)
        fitted = fit_image(drawn, *size)[..., 0] > 127
        both = fitted & (found[0] == label)
        assert both.sum() > 0.85 * (fitted | (found[0] == label)).sum()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a file of region labels"),
        (b"no archive", "not a file of region labels"),
        ({"labels": np.zeros((2, 8, 8), np.uint8)}, "not a file of region labels"),
        ({"labels": np.zeros((2, 8, 8), object), "names": np.array(REGIONS)}, "not a file of region labels"),
        ({"labels": np.zeros((2, 8, 8)), "names": np.array(REGIONS)}, r"float64 \(2, 8, 8\): must be uint8"),
        ({"labels": np.zeros((2, 8), np.uint8), "names": np.array(REGIONS)}, r"must be uint8 \[F, H, W\]"),
        ({"labels": np.zeros((2, 8, 8), np.uint8), "names": np.array(["tail"])}, "regions tail: must be"),
        ({"labels": np.zeros((1, 8, 8), np.uint8), "names": np.array(REGIONS)}, "1 frames, but 2 of the"),
    ],
)
def test_invalid_files_of_labels_raise_user_errors(
    content: bytes | dict[str, np.ndarray], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.regions.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=reason):
        read_regions(path, 2, 8, 8)


def test_array_and_truncated_archive_raise_user_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.regions.npz"
    with open(path, "wb") as file:
        np.save(file, np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(UserError, match="not a file of region labels"):
        read_regions(path, 2, 8, 8)
    write_regions(np.random.default_rng(0).integers(0, 5, (2, 64, 64), np.uint8), path)
    damaged = bytearray(path.read_bytes())
    damaged[300:600] = bytes(300)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="not a file of region labels"):
        read_regions(path, 2, 64, 64)
