"""Puppet world: determinism, ground truth, motion and files of synthetic clips."""

import json

import cv2
import decord
import numpy as np
import pytest

from pipelines.demo import render
from pipelines.puppets.world import DISTRIBUTIONS, FPS, sample_clip, write_clip
from tcan.metrics.region_labels import REGIONS, read_regions

TOLERANCE = 0.05  # fraction of the image height; joints with a smaller error count as detected


def detected_fraction(keypoints: np.ndarray, prediction: np.ndarray, size: int) -> float:
    return float(
        (np.linalg.norm(keypoints[..., :2] - prediction[..., :2], axis=-1) < TOLERANCE * size).mean()
    )


@pytest.fixture(scope="module", params=DISTRIBUTIONS)
def clips(request):
    return [sample_clip(request.param, seed, 24, size=64, every=3, regions=True) for seed in range(24)]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_equal_seeds_give_identical_clips(distribution):
    clip, repeated = (sample_clip(distribution, 5, 6) for _ in range(2))
    assert clip.frames.tobytes() == repeated.frames.tobytes()
    assert clip.keypoints.tobytes() == repeated.keypoints.tobytes()
    other = sample_clip(distribution, 6, 6)
    assert not np.array_equal(clip.frames, other.frames)


def test_clip_has_documented_shapes_and_dtypes():
    clip = sample_clip("wide", 0, 3, size=96)
    assert clip.frames.shape == (3, 96, 96, 3) and clip.frames.dtype == np.uint8
    assert clip.keypoints.shape == (3, 18, 3) and clip.keypoints.dtype == np.float32
    assert clip.mask.shape == (3, 96, 96) and clip.mask.dtype == bool


def test_shorter_clip_is_a_prefix_of_a_longer_one():
    np.testing.assert_array_equal(sample_clip("dance", 2, 4).frames, sample_clip("dance", 2, 9).frames[:4])


def test_character_motion_and_background_seeds_are_independent():
    clip = sample_clip("dance", 1, 8)
    moved = sample_clip("dance", 1, 8, motion_seed=2)
    assert np.abs(clip.keypoints - moved.keypoints)[..., :2].max() > 10
    puppets = (clip.mask.any(0) | moved.mask.any(0)).astype(np.uint8)
    background = cv2.dilate(puppets, np.ones((5, 5), np.uint8)) == 0  # puppet edges blend into the background
    background[80:] = False  # region of the shadows
    np.testing.assert_array_equal(clip.frames[0][background], moved.frames[0][background])
    other_background = sample_clip("dance", 1, 8, background_seed=2)
    np.testing.assert_array_equal(clip.keypoints, other_background.keypoints)
    np.testing.assert_array_equal(clip.mask, other_background.mask)
    other_character = sample_clip("dance", 1, 8, character_seed=2)
    assert not np.array_equal(clip.keypoints, other_character.keypoints)


def test_keypoints_scale_with_the_image_size():
    small, large = sample_clip("wide", 3, 4, size=64), sample_clip("wide", 3, 4, size=512)
    np.testing.assert_allclose(small.keypoints[..., :2] * 8, large.keypoints[..., :2], atol=0.01)
    np.testing.assert_array_equal(small.keypoints[..., 2], large.keypoints[..., 2])


def test_joints_are_inside_the_puppet_mask(clips):
    body = slice(0, 14)
    on, inside = [], []
    for clip in clips:
        x, y = clip.keypoints[..., body, 0], clip.keypoints[..., body, 1]
        inside.append((x >= 0) & (x < 64) & (y >= 0) & (y < 64))
        columns, rows = np.clip(x, 0, 63).astype(int), np.clip(y, 0, 63).astype(int)
        on.append(clip.mask[np.arange(len(x))[:, None], rows, columns])
    assert np.mean(inside) > 0.998
    assert np.mean(on) > 0.995


@pytest.mark.parametrize(("distribution", "size"), [("wide", 96), ("dance", 128), ("bizarre", 192)])
def test_regions_change_neither_frames_nor_keypoints_nor_mask(distribution, size):
    clip = sample_clip(distribution, 5, 3, size, every=5)
    labelled = sample_clip(distribution, 5, 3, size, every=5, regions=True)
    assert clip.regions is None and labelled.regions.shape == clip.mask.shape
    assert labelled.regions.dtype == np.uint8
    for name in ("frames", "keypoints", "mask"):
        assert getattr(clip, name).tobytes() == getattr(labelled, name).tobytes()
        assert getattr(clip, name).dtype == getattr(labelled, name).dtype


def test_regions_are_the_mask_and_agree_with_the_keypoints(clips):
    """Elbows and knees are body, the nose is face, eyes are face or below hair, 2 pixels beyond the wrists are hands."""
    labels_of = {"body": (3, 6, 9, 12), "face": (0,), "head": (14, 15), "hands": (4, 7)}
    allowed = {"body": {"body"}, "face": {"face"}, "head": {"face", "hair_ears"}, "hands": {"hands"}}
    found = {name: [] for name in labels_of}
    far = []
    for clip in clips:
        np.testing.assert_array_equal(clip.regions > 0, clip.mask)
        points = clip.keypoints[..., :2].copy()
        forearm = points[:, [4, 7]] - points[:, [3, 6]]
        points[:, [4, 7]] += 2 * forearm / np.linalg.norm(forearm, axis=-1, keepdims=True).clip(1e-6)
        columns, rows = np.moveaxis(points.clip(0, 63).astype(int), -1, 0)
        labels = clip.regions[np.arange(len(rows))[:, None], rows, columns]
        shown = clip.keypoints[..., 2] > 0
        for name, joints in labels_of.items():
            wanted = [1 + REGIONS.index(region) for region in allowed[name]]
            found[name].append(np.isin(labels, wanted)[:, joints][shown[:, joints]])
        frames, *yx = np.nonzero(clip.regions == 1 + REGIONS.index("hands"))
        distances = np.stack(yx[::-1], axis=-1)[:, None] - clip.keypoints[frames][:, [4, 7], :2]
        far.append(np.linalg.norm(distances, axis=-1).min(axis=1))
    fractions = {name: np.concatenate(values).mean() for name, values in found.items()}
    assert fractions["body"] > 0.97 and fractions["face"] > 0.98 and fractions["head"] > 0.99
    assert fractions["hands"] > 0.8  # long sleeves are drawn over the wrists
    assert np.concatenate(far).max() < 0.12 * 64


def test_right_shoulder_is_on_the_left_of_the_image(clips):
    keypoints = np.concatenate([clip.keypoints for clip in clips])
    right_shoulder, left_shoulder = keypoints[:, 2, 0], keypoints[:, 5, 0]
    assert np.mean(right_shoulder < left_shoulder) > 0.97  # for puppets that face the viewer


def test_puppets_fill_most_of_the_image_height(clips):
    tallest = []
    for clip in clips:
        rows = clip.mask.any(2)
        tallest.append(np.percentile(rows.sum(1), 75) / 64)
    assert 0.68 < np.mean(tallest) < 0.92


def test_predictions_without_looking_detect_few_joints(clips):
    """Control for pose metrics: constant and shuffled predictions must score low."""
    keypoints = np.stack([clip.keypoints for clip in clips])
    assert detected_fraction(keypoints, keypoints.mean((0, 1)), 64) < 0.25
    assert detected_fraction(keypoints, keypoints.mean(1, keepdims=True), 64) < 0.25  # mean pose per clip
    assert detected_fraction(keypoints, np.roll(keypoints, 1, axis=0), 64) < 0.4  # poses of another clip


def test_joint_speed_is_bounded():
    keypoints = sample_clip("dance", 4, 96).keypoints[..., :2]
    step = np.linalg.norm(np.diff(keypoints, axis=0), axis=-1)
    assert step.max() < 0.16 * 128


def test_labels_are_written_next_to_the_video_if_the_clip_has_them(tmp_path):
    clip = sample_clip("dance", 7, 3, size=64, regions=True)
    write_clip(clip, tmp_path / "a.b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.json", "a.b.mp4", "a.b.regions.npz"]
    np.testing.assert_array_equal(read_regions(tmp_path / "a.b.regions.npz", 3, 64, 64), clip.regions)


def test_held_out_sets_of_the_demo_have_labels_and_its_training_clips_none(tmp_path):
    render(tmp_path / "train", "dance", 1, 1, 2, 64)
    render(tmp_path / "dance", "dance", 1, 1, 2, 64, regions=True)
    render(tmp_path / "light", "light", 1, 1, 2, 64, regions=True)  # a variation, without labels
    for folder, count in (("train", 0), ("dance", 1), ("light", 0)):
        assert len(list((tmp_path / folder).glob("*.regions.npz"))) == count
    videos = [(tmp_path / folder / "00.mp4").read_bytes() for folder in ("train", "dance")]
    assert videos[0] == videos[1]


def test_written_clip_reads_back_with_frames_and_keypoints(tmp_path):
    clip = sample_clip("dance", 7, 12)
    write_clip(clip, tmp_path / "clip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.json", "clip.mp4"]
    video = decord.VideoReader(str(tmp_path / "clip.mp4"))
    assert len(video) == 12 and video.get_avg_fps() == pytest.approx(FPS)
    frames = video.get_batch(range(12)).asnumpy().astype(float)
    error = np.mean((frames - clip.frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 30

    truth = json.loads((tmp_path / "clip.json").read_text())
    assert (truth["fps"], truth["height"], truth["width"]) == (FPS, 128, 128)
    points = np.array([frame["people"][0]["pose_keypoints_2d"] for frame in truth["frames"]]).reshape(
        12, 18, 3
    )
    np.testing.assert_allclose(points, clip.keypoints, atol=0.001)
