"""Puppet world: determinism, ground truth, motion and files of synthetic clips."""

import json

import cv2
import decord
import numpy as np
import pytest

from pipelines.puppets.world import DISTRIBUTIONS, FPS, sample_clip, write_clip

TOLERANCE = 0.05  # fraction of the image height; joints with a smaller error count as detected


def detected_fraction(keypoints: np.ndarray, prediction: np.ndarray, size: int) -> float:
    return float(
        (np.linalg.norm(keypoints[..., :2] - prediction[..., :2], axis=-1) < TOLERANCE * size).mean()
    )


@pytest.fixture(scope="module", params=DISTRIBUTIONS)
def clips(request):
    return [sample_clip(request.param, seed, 24, size=64, every=3) for seed in range(24)]


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
