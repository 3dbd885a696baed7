"""Samples of a training: they depend only on seed and step, and follow the rules of each stage."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler
from tcan.pose import PoseErrors, draw_poses
from tests.training import SIZE, changed_clips, encoded_value, make_sampler, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    videos = {
        "long": [(0, 24), (24, 24), (48, 24), (72, 28)],
        "short": [(0, 24), (24, 16)],
        "gap": [(0, 24), (40, 17)],
    }
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset", videos, SIZE, SIZE)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 4), (2, 2), (2, 1), (4, 1), (1, 1)])
def test_worker_batches_form_the_same_global_batch(dataset, stage, workers, micro_batch):
    step = 5
    expected = [make_sampler(dataset, stage).sample(step, index) for index in range(4)]
    worker_batches = [
        make_sampler(dataset, stage).worker_batches(step, rank, workers, micro_batch)
        for rank in range(workers)
    ]
    # Order of the global batch: accumulation steps, then workers, then samples of the micro batch.
    batches = [
        worker_batches[rank][turn] for turn in range(len(worker_batches[0])) for rank in range(workers)
    ]
    for key in expected[0]:
        global_batch = torch.cat([getattr(batch, key) for batch in batches]).numpy()
        np.testing.assert_array_equal(global_batch, np.stack([sample[key] for sample in expected]))


def test_sample_depends_only_on_seed_step_and_index(dataset):
    used = make_sampler(dataset, 2)
    for step in range(6):
        used.batch(step, range(4))
    again, fresh, other = (
        used.sample(6, 1),
        make_sampler(dataset, 2).sample(6, 1),
        make_sampler(dataset, 2, seed=1).sample(6, 1),
    )
    for key in again:
        np.testing.assert_array_equal(again[key], fresh[key])
    assert not np.array_equal(again["noise"], other["noise"])
    assert not np.array_equal(again["noise"], used.sample(6, 2)["noise"])
    assert not np.array_equal(again["noise"], used.sample(7, 1)["noise"])


def test_stage1_reference_and_target_have_minimum_distance(dataset):
    source = make_sampler(dataset, 1, batch_size=1)
    frames = {
        0: [*range(100)],
        1: [*range(40)],
        2: [*range(24), *range(40, 57)],
    }  # by video, in dataset order
    distances: dict[int, Counter] = {0: Counter(), 1: Counter(), 2: Counter()}
    reference_masks = []
    for step in range(900):
        sample = source.sample(step, 0)
        video = encoded_value(sample["reference"], 1)
        assert encoded_value(sample["latents"][0], 1) == video
        reference, target = (
            frames[video].index(encoded_value(s, 0)) for s in (sample["reference"], sample["latents"][0])
        )
        distances[video][(target - reference) % len(frames[video])] += 1
        reference_masks.append(bool(sample["reference_mask"]))
        assert 0 <= sample["timestep"] < 1000
    assert set(distances[0]) == set(range(30, 70))  # U[30, L - 31], L = 100
    assert 0 not in distances[1] and len(distances[1]) > 35  # any other frame
    assert 0 not in distances[2] and len(distances[2]) > 35
    assert 0.06 < 1 - np.mean(reference_masks) < 0.14


def test_stage2_samples_consecutive_frames_with_first_frame_reference(dataset):
    source = make_sampler(dataset, 2, batch_size=1)
    starts: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for step in range(600):
        sample = source.sample(step, 0)
        numbers = [encoded_value(frame, 0) for frame in sample["latents"]]
        assert numbers == list(range(numbers[0], numbers[0] + 16))
        assert encoded_value(sample["reference"], 0) == -1
        assert encoded_value(sample["reference"], 1) == encoded_value(sample["latents"][0], 1)
        assert sample["reference_mask"]
        starts[encoded_value(sample["latents"][0], 1)].add(numbers[0])
    assert starts[0] <= set(range(85)) and len(starts[0]) > 60  # windows may cross clip boundaries
    assert starts[2] == {*range(9), 40, 41}  # windows must not cross the gap


def test_reference_option_selects_first_or_random_frame(dataset):
    def sampler_with(stage, reference):
        return Sampler(
            ClipStore(dataset), stage, seed=0, batch_size=1, size=SIZE, vae_scaling_factor=0.5, stick_width=2, frames=16,
            drop_reference=0.1, reference=reference,
        )  # fmt: skip

    first, random = sampler_with(1, "first"), sampler_with(2, "random")
    references = set()
    for step in range(60):
        sample = first.sample(step, 0)
        assert encoded_value(sample["reference"], 0) == -1  # first frame of the video
        assert encoded_value(sample["latents"][0], 0) > 0
        sample = random.sample(step, 0)
        # From the same video.
        assert encoded_value(sample["reference"], 1) == encoded_value(sample["latents"][0], 1)
        references.add(encoded_value(sample["reference"], 0))
    assert len(references) > 20 and min(references) >= 0


def test_noise_offset_adds_one_constant_per_channel(dataset):
    def noise(step, offset):
        source = Sampler(
            ClipStore(dataset), 2, seed=0, batch_size=1, size=SIZE, vae_scaling_factor=0.5, stick_width=2, frames=16,
            drop_reference=0.1, noise_offset=offset,
        )  # fmt: skip
        return source.sample(step, 0)

    shifts = []
    for step in range(100):
        baseline, shifted = noise(step, 0.0), noise(step, 0.05)
        shift = shifted["noise"] - baseline["noise"]
        np.testing.assert_allclose(
            shift, np.broadcast_to(shift[:1, :, :1, :1], shift.shape), rtol=0, atol=1e-6
        )
        shifts.append(shift[0, :, 0, 0])
        for key in baseline.keys() - {"noise"}:
            np.testing.assert_array_equal(baseline[key], shifted[key])
    assert np.std(shifts) == pytest.approx(0.05, rel=0.2) and abs(np.mean(shifts)) < 0.01


def sampler_with_pose_errors(dataset: Path, stage: int, **errors: float) -> Sampler:
    return Sampler(
        ClipStore(dataset), stage, seed=0, batch_size=1, size=SIZE, vae_scaling_factor=0.5, stick_width=2, frames=16,
        drop_reference=0.1, pose_errors=PoseErrors(**errors),
    )  # fmt: skip


def test_pose_errors_have_requested_rates_and_sizes(dataset):
    """The poses of the dataset have two joints at fixed positions: neck and right shoulder, connected by a limb."""

    def drawn(**errors: float) -> np.ndarray:
        """Centres of the two drawn joints in 640 frames, [640, 2, (y, x)]; NaN where a joint is not drawn."""
        source, centres = sampler_with_pose_errors(dataset, 2, **errors), []
        for frame in np.concatenate([source.sample(step, 0)["pose"] for step in range(40)]):
            positions = [np.argwhere((frame == colour).all(-1)) for colour in ((255, 85, 0), (255, 170, 0))]
            centres.append([pixels.mean(0) if len(pixels) else (np.nan, np.nan) for pixels in positions])
        return np.array(centres)

    true = np.array([[SIZE / 2, SIZE / 2], [SIZE / 2 + 5, SIZE / 2 - 15]])
    np.testing.assert_allclose(drawn(), np.broadcast_to(true, (640, 2, 2)), atol=0.5)

    missing = np.isnan(drawn(dropout=0.3)).any(-1)
    assert missing.mean(0) == pytest.approx([0.3, 0.3], abs=0.06)
    # Joints are dropped independently.
    assert (missing[:, 0] & missing[:, 1]).mean() == pytest.approx(0.09, abs=0.04)

    moved = drawn(jitter=0.03) - true
    assert np.nanstd(moved, (0, 1)) == pytest.approx([0.03 * SIZE] * 2, rel=0.1)
    assert abs(np.corrcoef(moved[:, 0, 0], moved[:, 1, 0])[0, 1]) < 0.1
    # Jitter is independent between frames.
    assert abs(np.corrcoef(moved[:-1, 0, 0], moved[1:, 0, 0])[0, 1]) < 0.1

    positions = drawn(outliers=0.4)
    missing = np.isnan(positions).all((1, 2))
    swapped = (abs(positions - true[::-1]) < 0.5).all((1, 2))
    # 50% of the outlier poses are empty; the others are permuted, and 50% of the permutations of two joints are swaps.
    assert (missing.mean(), swapped.mean()) == pytest.approx((0.2, 0.1), abs=0.05)
    assert (abs(positions[~missing & ~swapped] - true) < 0.5).all()


def test_pose_errors_depend_only_on_seed_and_step_and_change_only_poses(dataset):
    errors = {"dropout": 0.2, "jitter": 0.05, "outliers": 0.2}
    used = sampler_with_pose_errors(dataset, 2, **errors)
    used.sample(4, 0)
    again, fresh, clean = (
        used.sample(5, 0),
        sampler_with_pose_errors(dataset, 2, **errors).sample(5, 0),
        sampler_with_pose_errors(dataset, 2).sample(5, 0),
    )
    np.testing.assert_array_equal(again["pose"], fresh["pose"])
    assert not np.array_equal(again["pose"], clean["pose"])
    for key in clean.keys() - {"pose"}:
        np.testing.assert_array_equal(again[key], clean[key])
    stage1, baseline = (
        sampler_with_pose_errors(dataset, 1, **errors).sample(5, 0),
        sampler_with_pose_errors(dataset, 1).sample(5, 0),
    )
    np.testing.assert_array_equal(stage1["pose"], baseline["pose"])  # pose errors apply to stage 2 only


def test_every_video_is_sampled_once_per_epoch(dataset):
    source = make_sampler(dataset, 1, batch_size=2)
    ids = [source.video(*divmod(n, 2)).video_id for n in range(30)]
    epochs = [tuple(ids[n : n + 3]) for n in range(0, 30, 3)]
    assert all(sorted(epoch) == ["gap", "long", "short"] for epoch in epochs)
    assert len(set(epochs)) > 1


def test_crop_is_identical_for_latents_reference_and_pose(tmp_path):
    wide = write_dataset(tmp_path / "wide", {"a": [(0, 40)]}, SIZE + 32, SIZE + 64)
    source, corners = make_sampler(wide, 1), set()
    for step in range(40):
        sample = source.sample(step, 0)
        y, x = (round(float(sample["reference"][channel, 0, 0]) * 2) for channel in (2, 3))
        rows, columns = np.mgrid[y : y + 8, x : x + 8]
        for part in (sample["reference"], sample["latents"][0]):
            np.testing.assert_allclose(part[2:] * 2, [rows, columns], atol=1e-4)
        keypoints = np.zeros((1, 18, 3), np.float32)
        keypoints[0, 1] = (64 - 8 * x, 48 - 8 * y, 1)
        keypoints[0, 2] = (49 - 8 * x, 53 - 8 * y, 1)
        np.testing.assert_array_equal(sample["pose"], draw_poses(keypoints, SIZE, SIZE, 2))
        corners.add((y, x))
    assert {y for y, _ in corners} == set(range(5)) and {x for _, x in corners} == set(range(9))


def test_latents_are_sampled_from_the_posterior(tmp_path):
    folder = write_dataset(tmp_path / "set", {"a": [(0, 40)]}, SIZE, SIZE)
    for row in changed_clips(folder):
        row["latent_mean"] = np.full((40, 4, 8, 8), 3, "<f2").tobytes()
        row["latent_logvar"] = np.full((40, 4, 8, 8), np.log(4), "<f2").tobytes()
    source = make_sampler(folder, 1)
    values = np.stack([source.sample(step, 0)["latents"] for step in range(100)])
    assert values.mean() == pytest.approx(3 * 0.5, abs=0.05)  # scaled by the VAE scaling factor
    assert values.std() == pytest.approx(2 * 0.5, abs=0.05)
