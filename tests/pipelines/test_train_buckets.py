"""Training on clips of several sizes: the order of the videos, the samples, and complete runs."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL

from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler, join_batches
from pipelines.train.order import VideoOrder
from tcan.fingerprint import fingerprint
from tcan.pose import draw_poses
from tests.training import (
    changed_clips,
    encoded_value,
    losses,
    make_config,
    make_sampler,
    write_dataset,
)

SIZES = {"square": (64, 64), "wide": (48, 80), "tall": (80, 48)}


def order_of(counts: list[int], batch_size: int, seed: int = 0) -> tuple[VideoOrder, np.ndarray]:
    """An order of videos in buckets of these sizes, mixed at random, and the bucket of each video."""
    buckets = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    return VideoOrder(buckets, batch_size, lambda *key: np.random.default_rng([seed, *key])), buckets


@pytest.mark.parametrize(
    ("counts", "batch_size"), [([7], 4), ([5, 9, 2], 4), ([40, 1, 3], 8), ([3, 2], 16), ([16, 32], 8)]
)
def test_no_video_is_drawn_more_often_than_epochs_and_none_is_skipped(
    counts: list[int], batch_size: int
) -> None:
    """After e epochs each bucket has used all of its samples except fewer than a batch."""
    order, buckets = order_of(counts, batch_size)
    drawn, step = np.zeros(len(buckets), int), 0
    for epoch in range(1, 40):
        while step < sum(epoch * count // batch_size for count in counts):
            videos = [order.video(step, index) for index in range(batch_size)]
            assert len(set(buckets[videos])) == 1
            np.add.at(drawn, videos, 1)
            step += 1
        assert drawn.max() <= epoch
        for bucket, count in enumerate(counts):
            of_bucket = drawn[buckets == bucket]
            assert 0 <= epoch * count - of_bucket.sum() < batch_size
            assert of_bucket.max() - of_bucket.min() <= 1  # the videos of a bucket take turns
    assert drawn.min() > 0


def test_order_depends_only_on_seed_step_and_index() -> None:
    forward, _ = order_of([11, 6, 4], 4)
    videos = {(step, index): forward.video(step, index) for step in range(60) for index in range(4)}
    backward, _ = order_of([11, 6, 4], 4)
    assert {key: backward.video(*key) for key in reversed(videos)} == videos
    other, _ = order_of([11, 6, 4], 4, seed=1)
    assert {key: other.video(*key) for key in videos} != videos
    batches = [forward.batch(step)[0] for step in range(500)]
    assert Counter(batches)[0] / 500 == pytest.approx(11 / 21, abs=0.02)
    repeats = sum(a == b for a, b in itertools.pairwise(batches)) / 499
    assert 0.2 < repeats < 0.6  # the buckets alternate in random order


def bucket_dataset(folder: Path, vae: str = "", videos_per_size: int = 3) -> Path:
    """Videos of 40 frames; their names are the size and a number."""
    names = [f"{size}{number}" for number in range(videos_per_size) for size in SIZES]
    sizes = {name: SIZES[name[:-1]] for name in names}
    return write_dataset(folder / "dataset", {name: [(0, 40)] for name in names}, 0, 0, vae, sizes)


@pytest.mark.parametrize("stage", [1, 2])
def test_batches_have_one_size_and_poses_follow_it(tmp_path: Path, stage: int) -> None:
    sampler, frames = make_sampler(bucket_dataset(tmp_path), stage, size=None), 1 if stage == 1 else 16
    seen = Counter()
    for step in range(12):
        batch = sampler.batch(step, range(4))
        height, width = SIZES[sampler.video(step, 0).video_id[:-1]]
        assert batch.latents.shape == batch.noise.shape == (4, frames, 4, height // 8, width // 8)
        assert batch.reference.shape == (4, 4, height // 8, width // 8)
        keypoints = np.zeros((frames, 18, 3), np.float32)
        keypoints[:, 1] = (width / 2, height / 2, 1)
        keypoints[:, 2] = (width / 2 - 15, height / 2 + 5, 1)
        for pose in batch.pose.numpy():
            np.testing.assert_array_equal(pose, draw_poses(keypoints, height, width, 2))
        # Each latent is at its own position: nothing is cropped.
        rows, columns = np.mgrid[: height // 8, : width // 8]
        np.testing.assert_allclose(batch.reference[0, 2:].numpy() * 2, [rows, columns], atol=1e-4)
        seen[height, width] += 1
        # Two workers with two accumulation steps share the batch.
        parts = [part for rank in (0, 1) for part in sampler.worker_batches(step, rank, 2, 1)]
        assert {part.latents.shape for part in parts} == {(1, *batch.latents.shape[1:])}
    assert seen == dict.fromkeys(SIZES.values(), 4)


def test_dataset_of_one_square_bucket_gives_the_samples_of_a_dataset_without_buckets(tmp_path: Path) -> None:
    videos = {name: [(0, 40)] for name in "abcde"}
    plain = make_sampler(write_dataset(tmp_path / "plain", videos, 64, 64), 1)
    sizes = dict.fromkeys(videos, (64, 64))
    bucket = make_sampler(write_dataset(tmp_path / "bucket", videos, 0, 0, "", sizes), 1, size=None)
    for step in range(8):
        for key, value in plain.sample(step, 3).items():
            np.testing.assert_array_equal(value, bucket.sample(step, 3)[key])


def test_validation_samples_cover_all_sizes(tmp_path: Path) -> None:
    sampler = Sampler(
        ClipStore(bucket_dataset(tmp_path)), 1, seed=0, batch_size=9, size=None, vae_scaling_factor=0.5,
        stick_width=2, frames=16, drop_reference=0.0, mixed=True,
    )  # fmt: skip
    singles = [sampler.batch(0, [index]) for index in range(9)]
    assert sorted(encoded_value(batch.reference[0], 1) for batch in singles) == list(range(9))
    joined = join_batches(singles)
    assert sorted(tuple(8 * side for side in batch.latents.shape[-2:]) for batch in joined) == sorted(
        SIZES.values()
    )
    assert [len(batch.latents) for batch in joined] == [3, 3, 3]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, pretrained: Path) -> Path:
    vae = fingerprint(AutoencoderKL.from_pretrained(pretrained / "vae"))
    folder = bucket_dataset(tmp_path_factory.mktemp("clips"), vae, videos_per_size=4)
    rng = np.random.default_rng(0)
    for row in changed_clips(folder):
        row["split"] = "validation" if row["video_id"].endswith("3") else "train"
        shape = (4, row["height"] // 8, row["width"] // 8)
        row["latent_mean"] = rng.normal(0, 2, (40, *shape)).astype("<f2").tobytes()
        row["latent_logvar"] = rng.normal(-3, 1, (40, *shape)).astype("<f2").tobytes()
        row["reference_latent_mean"] = rng.normal(0, 2, shape).astype("<f2").tobytes()
    return folder


def shape_of_step(clips: Path, step: int) -> tuple[int, ...]:
    return make_sampler(clips, 1, size=None).sample(step, 0)["latents"].shape


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_workers_or_restarts(
    tmp_path: Path,
    pretrained: Path,
    clips: Path,
    ray_cluster: None,
) -> None:
    """Two workers; one worker that stops after 3 steps, and two workers that resume."""
    from pipelines.train.job import train

    found = {}
    for name, runs in {
        "undisturbed": [("--train.workers=2",)],
        "resumed": [("--train.workers=1", "--train.stage1.steps=3"), ("--train.workers=2",)],
    }.items():
        for more in runs:
            options = ("--train.stage1.steps=6", "--train.stage1.sample_every=100", *more)
            config = make_config(pretrained, tmp_path / name, *options)
            train(clips, tmp_path / name / "out", config, stage="1")
        curve = losses(config, tmp_path / name / "out", 1)
        assert all(len(values) == 1 for values in curve.values())
        found[name] = {step: values[0] for step, values in curve.items()}
    assert sorted(found["undisturbed"]) == list(range(1, 7))
    assert len({shape_of_step(clips, step) for step in range(6)}) == len(SIZES)
    assert found["resumed"] == pytest.approx(found["undisturbed"], rel=1e-5)
