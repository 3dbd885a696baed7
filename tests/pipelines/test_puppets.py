import json

import cv2
import decord
import numpy as np
import pytest

from pipelines.puppets.world import DISTRIBUTIONS, FPS, sample_clip, write_clip

TOLERANCE = 0.05  # of the image's height: a joint nearer than that counts as found


def joints_found(keypoints: np.ndarray, guess: np.ndarray, size: int) -> float:
    return float((np.linalg.norm(keypoints[..., :2] - guess[..., :2], axis=-1) < TOLERANCE * size).mean())


@pytest.fixture(scope="module", params=DISTRIBUTIONS)
def clips(request):
    return [sample_clip(request.param, seed, 24, size=64, every=3) for seed in range(24)]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_same_seed_gives_the_same_bytes(distribution):
    once, again = (sample_clip(distribution, 5, 6) for _ in range(2))
    assert once.frames.tobytes() == again.frames.tobytes()
    assert once.keypoints.tobytes() == again.keypoints.tobytes()
    other = sample_clip(distribution, 6, 6)
    assert not np.array_equal(once.frames, other.frames)


def test_shapes_and_types():
    clip = sample_clip("wide", 0, 3, size=96)
    assert clip.frames.shape == (3, 96, 96, 3) and clip.frames.dtype == np.uint8
    assert clip.keypoints.shape == (3, 18, 3) and clip.keypoints.dtype == np.float32
    assert clip.mask.shape == (3, 96, 96) and clip.mask.dtype == bool


def test_a_longer_clip_begins_with_the_shorter_one():
    np.testing.assert_array_equal(sample_clip("dance", 2, 4).frames, sample_clip("dance", 2, 9).frames[:4])


def test_character_motion_and_background_have_their_own_seeds():
    clip = sample_clip("dance", 1, 8)
    moved = sample_clip("dance", 1, 8, motion_seed=2)
    assert np.abs(clip.keypoints - moved.keypoints)[..., :2].max() > 10
    somebody = (clip.mask.any(0) | moved.mask.any(0)).astype(np.uint8)
    nobody = cv2.dilate(somebody, np.ones((5, 5), np.uint8)) == 0  # the edges are mixed with the background
    nobody[80:] = False  # where the shadows are
    np.testing.assert_array_equal(clip.frames[0][nobody], moved.frames[0][nobody])
    elsewhere = sample_clip("dance", 1, 8, background_seed=2)
    np.testing.assert_array_equal(clip.keypoints, elsewhere.keypoints)
    np.testing.assert_array_equal(clip.mask, elsewhere.mask)
    stranger = sample_clip("dance", 1, 8, character_seed=2)
    assert not np.array_equal(clip.keypoints, stranger.keypoints)


def test_keypoints_scale_with_the_image():
    small, large = sample_clip("wide", 3, 4, size=64), sample_clip("wide", 3, 4, size=512)
    np.testing.assert_allclose(small.keypoints[..., :2] * 8, large.keypoints[..., :2], atol=0.01)
    np.testing.assert_array_equal(small.keypoints[..., 2], large.keypoints[..., 2])


def test_joints_lie_on_the_puppet(clips):
    body = slice(0, 14)
    on, inside = [], []
    for clip in clips:
        x, y = clip.keypoints[..., body, 0], clip.keypoints[..., body, 1]
        inside.append((x >= 0) & (x < 64) & (y >= 0) & (y < 64))
        columns, rows = np.clip(x, 0, 63).astype(int), np.clip(y, 0, 63).astype(int)
        on.append(clip.mask[np.arange(len(x))[:, None], rows, columns])
    assert np.mean(inside) > 0.998
    assert np.mean(on) > 0.995


def test_right_and_left_are_the_dancers_own(clips):
    keypoints = np.concatenate([clip.keypoints for clip in clips])
    right_shoulder, left_shoulder = keypoints[:, 2, 0], keypoints[:, 5, 0]
    assert (
        np.mean(right_shoulder < left_shoulder) > 0.97
    )  # who faces the viewer has the right side at the left


def test_puppets_fill_the_image(clips):
    tallest = []
    for clip in clips:
        rows = clip.mask.any(2)
        tallest.append(np.percentile(rows.sum(1), 75) / 64)
    assert 0.68 < np.mean(tallest) < 0.92


def test_the_mean_pose_finds_few_joints(clips):
    """The control of every pose measure: who guesses without looking must not find the joints."""
    keypoints = np.stack([clip.keypoints for clip in clips])
    assert joints_found(keypoints, keypoints.mean((0, 1)), 64) < 0.25
    assert joints_found(keypoints, keypoints.mean(1, keepdims=True), 64) < 0.25  # the clip's own mean pose
    assert joints_found(keypoints, np.roll(keypoints, 1, axis=0), 64) < 0.4  # another clip's dance


def test_motion_is_smooth():
    keypoints = sample_clip("dance", 4, 96).keypoints[..., :2]
    step = np.linalg.norm(np.diff(keypoints, axis=0), axis=-1)
    assert step.max() < 0.16 * 128


def test_write_clip_round_trip(tmp_path):
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
