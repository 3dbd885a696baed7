"""Held-out variations of puppet clips: what they change, and what stays that of the `dance` clip."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipelines.puppets.variations import (
    OTHER_PUPPET,
    OTHER_SCALE,
    VARIATIONS,
    Variation,
    _layer,
    _still,
    sample_held_out,
)
from pipelines.puppets.world import FPS, Clip, sample_clip, write_clip

SEED, FRAMES = 3, 12
SAME_POSES: tuple[Variation, ...] = ("parallax", "passing", "light", "sketch", "xray", "noise", "four_arms")


@pytest.fixture(scope="module")
def clips() -> dict[str, Clip]:
    return {kind: sample_held_out(kind, SEED, FRAMES) for kind in ("dance", *VARIATIONS)}


@pytest.mark.parametrize("kind", VARIATIONS)
def test_equal_seeds_give_identical_clips_of_other_appearance(
    kind: Variation, clips: dict[str, Clip]
) -> None:
    clip, dance = clips[kind], clips["dance"]
    again = sample_held_out(kind, SEED, FRAMES)
    assert clip.frames.tobytes() == again.frames.tobytes()
    assert clip.keypoints.tobytes() == again.keypoints.tobytes()
    assert clip.frames.shape == (FRAMES, 128, 128, 3) and clip.frames.dtype == np.uint8
    assert clip.mask.shape == (FRAMES, 128, 128) and clip.mask.dtype == bool
    assert np.abs(clip.frames.astype(int) - dance.frames).mean() > 1
    if kind != "noise":  # drawn for all frames together
        shorter = sample_held_out(kind, SEED, 4)
        np.testing.assert_array_equal(shorter.frames, clip.frames[:4])


def test_distributions_are_those_of_sample_clip(clips: dict[str, Clip]) -> None:
    np.testing.assert_array_equal(clips["dance"].frames, sample_clip("dance", SEED, FRAMES).frames)


@pytest.mark.parametrize("kind", SAME_POSES)
def test_poses_are_those_of_the_dance_clip(kind: Variation, clips: dict[str, Clip]) -> None:
    np.testing.assert_array_equal(clips[kind].keypoints, clips["dance"].keypoints)


def test_layer_over_its_background_is_the_rendered_clip(clips: dict[str, Clip]) -> None:
    layer = _layer(SEED, np.arange(FRAMES) / FPS, 128)
    error = np.abs(layer.over(_still(SEED, 128)) - clips["dance"].frames)
    # Larger only in pixels in which edges of both meet, and in shadows.
    assert np.percentile(error, 99.5) <= 3 and error.max() < 32
    np.testing.assert_array_equal(layer.mask, clips["dance"].mask)


def inner(mask: np.ndarray) -> np.ndarray:
    """Pixels of masks `[F, H, W]` that are not at an edge."""
    return np.stack([cv2.erode(m.astype(np.uint8), np.ones((5, 5))) for m in mask]) > 0


@pytest.mark.parametrize("kind", ["parallax", "passing"])
def test_only_the_background_moves(kind: Variation, clips: dict[str, Clip]) -> None:
    clip, dance = clips[kind], clips["dance"]
    error = np.abs(clip.frames.astype(int) - dance.frames).max(axis=3)
    assert error[inner(clip.mask)].max() <= 1
    outside = ~np.stack([cv2.dilate(m.astype(np.uint8), np.ones((5, 5))) for m in clip.mask]).any(axis=0)
    outside[90:] = False  # shadows
    still = np.ptp(dance.frames[:, outside].astype(int), axis=0).max()
    changed = np.ptp(clip.frames[:, outside].astype(int), axis=0).max(axis=1) > 8
    assert still <= 1 and changed.mean() > {"parallax": 0.3, "passing": 0.05}[kind]


def test_light_changes_all_pixels_by_the_same_factor(clips: dict[str, Clip]) -> None:
    bright = clips["dance"].frames.astype(float)
    factors = clips["light"].frames / bright.clip(1)
    usable = bright > 150  # rounding is small
    for frame in range(FRAMES):
        for channel in range(3):
            values = factors[frame, ..., channel][usable[frame, ..., channel]]
            assert np.ptp(values) < 0.01 and 0.3 < values.mean() <= 1
    means = factors.mean(axis=(1, 2))
    assert (np.ptp(means, axis=0) > 0.05).all()


def test_turning_puppet_is_seen_from_both_sides() -> None:
    """Its shoulders are behind each other on the left and on the right; the face follows."""
    turning, dance = (sample_held_out(kind, SEED, 96).keypoints for kind in ("turns", "dance"))
    widths = [np.abs(k[:, 2, 0] - k[:, 5, 0]) for k in (turning, dance)]
    assert (widths[0] < 0.3 * np.median(widths[1])).mean() > 0.5
    nose = turning[:, 0, 0] - turning[:, [14, 15], 0].mean(axis=1)
    assert nose.min() < -1 and nose.max() > 1  # pixels


def test_crossing_puppet_is_smaller_and_hides_the_main_one(tmp_path: Path, clips: dict[str, Clip]) -> None:
    clip = sample_held_out("crossing", SEED, 28)  # a period of 1.2 s
    (other,) = clip.others
    original = sample_clip("dance", SEED + OTHER_PUPPET, 28).keypoints
    bones = [np.linalg.norm(k[:, 8, :2] - k[:, 9, :2], axis=1) for k in (other, original)]
    np.testing.assert_allclose(bones[0], OTHER_SCALE * bones[1], atol=1e-3)
    side = np.sign(other[:, 1, 0] - clip.keypoints[:, 1, 0])
    assert set(side) == {-1, 1}  # they exchange sides
    crossing = int(np.abs(other[:, 1, 0] - clip.keypoints[:, 1, 0]).argmin())
    torso = (other[crossing, 1, :2] + other[crossing, 8, :2] + other[crossing, 11, :2]) / 3
    x, y = torso.round().astype(int)
    alone = _layer(SEED + OTHER_PUPPET, np.arange(28) / FPS, 128)
    u, v = (alone.keypoints[crossing, [1, 8, 11], :2].sum(axis=0) / 3).round().astype(int)
    distance = np.abs(clip.frames[crossing, y, x].astype(int) - alone.colour[crossing, v, u]).max()
    assert distance < 80  # the color of the other puppet's torso, in front

    write_clip(clip, tmp_path / "clip")
    people = json.loads((tmp_path / "clip.json").read_text())["frames"][0]["people"]
    assert len(people) == 2
    first = np.array(people[0]["pose_keypoints_2d"]).reshape(18, 3)
    np.testing.assert_allclose(first, clip.keypoints[0], atol=1e-3)


def test_styles(clips: dict[str, Clip]) -> None:
    dance = clips["dance"].frames.astype(float)
    sketch, xray, noise = (clips[kind].frames.astype(float) for kind in ("sketch", "xray", "noise"))
    assert np.ptp(sketch, axis=3).max() == 0 and (sketch > 200).mean() > 0.7  # gray lines on white paper
    assert np.corrcoef(dance.mean(axis=3).ravel(), xray.mean(axis=3).ravel())[0, 1] < -0.99  # inverted
    residual = noise[1:] - noise[:-1]
    still = np.ptp(dance, axis=0).max(axis=2) == 0
    assert residual[:, still].std() == pytest.approx(10 * 2**0.5, rel=0.1)  # independent grain of 10 levels


def test_three_puppets_of_which_one_is_behind_the_main_one(clips: dict[str, Clip]) -> None:
    clip = sample_held_out("three", SEED, 28)  # a period of 1.2 s
    front, behind = clip.others
    for number, other in enumerate((front, behind), start=1):
        original = sample_clip("dance", SEED + number * OTHER_PUPPET, 28).keypoints
        bones = [np.linalg.norm(k[:, 8, :2] - k[:, 9, :2], axis=1) for k in (other, original)]
        np.testing.assert_allclose(bones[0], OTHER_SCALE * bones[1], atol=1e-3)
        assert len(set(np.sign(other[:, 1, 0] - clip.keypoints[:, 1, 0]))) == 2  # they exchange sides
    # Where the second one is, and the main one too, the main one is seen: the clip without the second one is equal there.
    alone = _layer(SEED, np.arange(28) / FPS, 128)
    shift = (clip.keypoints[0, 1, 0] - alone.keypoints[0, 1, 0]).round().astype(int)
    main = np.roll(alone.mask[0], shift, axis=1)
    x, y = clip.keypoints[0, [2, 5], :2].mean(axis=0).round().astype(int)
    color = alone.colour[0, y, x - shift]
    assert main[y, x] and np.abs(clip.frames[0, y, x] - color).max() < 30


def test_headless_puppet_is_the_dance_below_the_neck(clips: dict[str, Clip]) -> None:
    clip, dance = clips["headless"], clips["dance"]
    assert not clip.keypoints[:, [0, 14, 15, 16, 17], 2].any()
    body = np.arange(1, 14)
    np.testing.assert_array_equal(clip.keypoints[:, body], dance.keypoints[:, body])
    assert (clip.mask <= dance.mask).all() and clip.mask.sum() < 0.95 * dance.mask.sum()
    eyes = dance.keypoints[:, [14, 15], :2].mean(axis=1).round().astype(int)
    assert dance.mask[range(FRAMES), eyes[:, 1], eyes[:, 0]].all()
    assert clip.mask[range(FRAMES), eyes[:, 1], eyes[:, 0]].mean() < 0.1  # an arm in one frame
    for frame in range(FRAMES):
        below = int(dance.keypoints[frame, [8, 11], 1].mean())
        np.testing.assert_array_equal(clip.mask[frame, below:], dance.mask[frame, below:])


def test_four_arms_show_more_of_the_puppet(clips: dict[str, Clip]) -> None:
    clip, dance = clips["four_arms"], clips["dance"]
    assert (clip.mask >= dance.mask).all() and clip.mask.sum() > 1.03 * dance.mask.sum()
    error = np.abs(clip.frames.astype(int) - dance.frames).max(axis=3)
    assert error[inner(dance.mask)].max() <= 1  # the other two arms are behind
