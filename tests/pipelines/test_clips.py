"""The index of a dataset and random access to its frames: equal to the rows of the Parquet files, few bytes and requests."""

import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import cli, storage
from pipelines.dataset import CLIP_SCHEMA, clip_files, decode_row
from pipelines.dataset_index import INDEX_FILE, INDEX_SCHEMA, POSITIONED, read_index, write_index
from pipelines.preprocess.shards import ShardWriter, writing
from pipelines.staging import upload
from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler
from pipelines.train.disk_cache import DiskCache
from tcan.errors import UserError
from tests.counting_filesystem import counted_reads
from tests.pipelines.test_dataset import write_dataset

VIDEOS = {"a": [(0, 64), (64, 64)], "b": [(0, 64), (70, 40)], "c": [(0, 5)]}


def clip_row(video: str, start: int, frames: int, height: int, width: int) -> dict:
    """A row of random values that depend on the video and the first frame only."""
    rng = np.random.default_rng([ord(video), start])
    latents = rng.normal(0, 2, (2, frames, 4, height // 8, width // 8)).astype("<f2")
    keypoints = rng.uniform(0, height, (frames, 18, 3)).astype("<f4").tobytes()
    return dict.fromkeys(CLIP_SCHEMA.names) | {
        "clip_id": f"{video}-{start:06d}", "video_id": video, "source": video, "source_version": "1-1", "split": "train",
        "start": start, "num_frames": frames, "fps": 8.0, "height": height, "width": width, "crop": [0, 0, 8, 8],
        "latent_mean": latents[0].tobytes(), "latent_logvar": latents[1].tobytes(), "keypoints": keypoints,
        "people_per_frame": [1] * frames, "people": keypoints, "main_person": [0] * frames,
        "reference_latent_mean": latents[0, 0].tobytes(), "reference_keypoints": keypoints[:216],
    }  # fmt: skip


def write_clips(folder: Path, size: int, videos: dict = VIDEOS, files: int = 2) -> Path:
    with writing(str(folder)):
        writer = ShardWriter(str(folder), {}, 1 << 30, 1e9)
        for number, (video, spans) in enumerate(videos.items()):
            writer.add_video(clip_row(video, *span, size, size + 16) for span in spans)
            if number < files - 1:
                writer.commit()
        writer.commit()
    write_index(str(folder))
    return folder


def test_frames_equal_the_rows_that_pyarrow_reads(tmp_path: Path) -> None:
    store = ClipStore(write_clips(tmp_path, 64), cache_bytes=100_000)
    rows = {}
    for file in clip_files(tmp_path):
        for row in pq.read_table(file).to_pylist():
            rows[row["video_id"], row["start"]] = decode_row(row)
    assert [video.video_id for video in store.videos] == ["a", "b", "c"]
    for video in store.videos:
        spans = VIDEOS[video.video_id]
        clips = [rows[video.video_id, start] for start, _ in spans]
        np.testing.assert_array_equal(
            video.number, np.concatenate([np.arange(start, start + length) for start, length in spans])
        )
        np.testing.assert_array_equal(store.reference_latent(video), clips[0]["reference_latent_mean"])
        for positions in ([0], [len(video) - 1, 3, 3], range(len(video) - 5, len(video)), range(len(video))):
            found = store.frames(video, positions)
            for key, values in found.items():
                expected = np.concatenate([clip[key] for clip in clips])[list(positions)]
                np.testing.assert_array_equal(values, expected)
    assert list(store.videos_with(6, consecutive=False)) == [0, 1]
    assert list(store.videos_with(65, consecutive=True)) == [0]
    assert list(store.videos_with(64, consecutive=True)) == [0, 1]


def test_stage1_sample_reads_at_most_a_quarter_of_its_clips(tmp_path: Path) -> None:
    """Before, a sample read the row groups with its two frames; these hold 64 frames or more."""
    write_clips(tmp_path, 512, {"a": [(0, 64), (64, 64), (128, 64)]})
    (file,) = clip_files(tmp_path)
    group_bytes = pq.ParquetFile(file).metadata.row_group(0).total_byte_size
    assert group_bytes > 64 * 2 * 4 * 64 * 64 * 2
    samples = 20
    with counted_reads() as counts:
        sampler = Sampler(
            ClipStore(tmp_path, cache_bytes=0), 1, seed=0, batch_size=1, size=512, vae_scaling_factor=0.5, stick_width=4,
            frames=16, drop_reference=0.1,
        )  # fmt: skip
        counts.reset()
        for step in range(samples):
            sampler.sample(step, 0)
    latent = 4 * 64 * 66 * 2
    assert counts.bytes / samples == 3 * latent + 18 * 3 * 4  # two means, one log-variance, one pose
    assert counts.bytes / samples <= 2 * group_bytes / 4
    assert counts.requests / samples == 4 and counts.files == 1


def test_stage2_sample_reads_only_its_frames(tmp_path: Path) -> None:
    write_clips(tmp_path, 64, {"a": [(0, 64)]})
    with counted_reads() as counts:
        store = ClipStore(tmp_path)
        counts.reset()
        store.frames(store.videos[0], range(10, 26))
        assert (counts.requests, counts.bytes) == (3, 16 * (2 * 4 * 8 * 10 * 2 + 18 * 3 * 4))
        store.frames(store.videos[0], range(11, 30))  # 4 frames are not in the cache
        assert (counts.requests, counts.bytes) == (6, 20 * (2 * 4 * 8 * 10 * 2 + 18 * 3 * 4))


def test_opening_a_dataset_reads_one_file(tmp_path: Path) -> None:
    write_clips(tmp_path, 64, {name: [(0, 8), (8, 8)] for name in "abcdefgh"}, files=8)
    assert len(clip_files(tmp_path)) == 8
    with counted_reads() as counts:
        assert len(ClipStore(tmp_path)) == 8
    assert (counts.files, counts.bytes) == (1, (tmp_path / INDEX_FILE).stat().st_size)


def test_index_reads_only_new_files(tmp_path: Path) -> None:
    write_clips(tmp_path, 64)
    with writing(str(tmp_path)):
        writer = ShardWriter(str(tmp_path), {}, 1 << 30, 1e9)
        writer.add_video([clip_row("d", 0, 8, 64, 80)])
        writer.commit()
    assert read_index(tmp_path)["video_id"].to_pylist() == ["a", "a", "b", "b", "c"]
    with counted_reads() as counts:
        extended = write_index(str(tmp_path))
    assert counts.files == 2  # the previous index and the new file
    assert extended["video_id"].to_pylist() == ["a", "a", "b", "b", "c", "d"]
    (tmp_path / INDEX_FILE).unlink()
    assert write_index(str(tmp_path)).equals(extended) and read_index(tmp_path).equals(extended)


def test_threads_share_a_store(tmp_path: Path) -> None:
    """Concurrent reads with a cache that is too small for them return the right frames."""
    store = ClipStore(write_clips(tmp_path, 64, {"a": [(0, 64)]}), cache_bytes=20_000)
    video = store.videos[0]
    expected = store.frames(video, range(64))
    problems = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(100):
            positions = rng.integers(0, 64, 4)
            for key, values in store.frames(video, positions).items():
                if not np.array_equal(values, expected[key][positions]):
                    problems.append((key, positions))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_missing_or_damaged_index_is_a_user_error(tmp_path: Path) -> None:
    write_clips(tmp_path, 64)
    (tmp_path / INDEX_FILE).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"index.parquet: cannot be read .*; rerun the same tcan preprocess"):
        ClipStore(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(UserError, match=r"index.parquet: cannot be read .*; rerun the same tcan preprocess"):
        ClipStore(tmp_path)


def test_truncated_file_is_a_user_error(tmp_path: Path) -> None:
    store = ClipStore(write_clips(tmp_path, 64, {"a": [(0, 64)]}))
    (file,) = clip_files(tmp_path)
    Path(file).write_bytes(Path(file).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"clips-.*cannot be read .*shorter than its index"):
        store.frames(store.videos[0], [60])


@pytest.mark.parametrize(
    ("column", "problem"), [("latent_mean", "does not match the clips"), ("file", "contains clips of")]
)
def test_verify_detects_a_wrong_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, problem: str
) -> None:
    write_dataset(tmp_path)
    index = read_index(tmp_path)
    changed = [
        "clips/other.parquet" if column == "file" else value + 2 for value in index[column].to_pylist()
    ]
    number = INDEX_SCHEMA.get_field_index(column)
    field = INDEX_SCHEMA.field(column)
    pq.write_table(index.set_column(number, field, pa.array(changed, field.type)), tmp_path / INDEX_FILE)
    assert cli.main(["dataset", "verify", str(tmp_path)]) == 2
    assert problem in capsys.readouterr().out


def test_positions_point_to_the_values_of_many_row_groups(tmp_path: Path) -> None:
    """Clips of 0.7 MB: several row groups of several rows."""
    write_clips(tmp_path, 192, {"a": [(i * 48, 48) for i in range(14)]})
    (file,) = clip_files(tmp_path)
    content = Path(file).read_bytes()
    parquet = pq.ParquetFile(file)
    assert parquet.num_row_groups > 3 and parquet.metadata.row_group(0).num_rows > 1
    for row in read_index(tmp_path).to_pylist():
        clip = parquet.read_row_group(row["row_group"]).slice(row["row"], 1).to_pylist()[0]
        for column in POSITIONED:
            assert content[row[column] :].startswith(clip[column])


def test_frames_of_a_bucket_are_read_again_from_the_disk(any_bucket: str, tmp_path: Path) -> None:
    """The files are deleted from the bucket after the first read."""
    upload(write_clips(tmp_path / "dataset", 64), f"{any_bucket}/cached")
    store = ClipStore(f"{any_bucket}/cached", cache_bytes=0, disk_bytes=1 << 20)
    reference = ClipStore(tmp_path / "dataset")
    positions = [0, 1, 2, 63, 64]
    store.frames(store.videos[0], positions), store.reference_latent(store.videos[0])
    store._open.clear()
    for name in clip_files(f"{any_bucket}/cached"):
        storage.delete(name)
    again, expected = (s.frames(s.videos[0], positions) for s in (store, reference))
    assert all((again[column] == expected[column]).all() for column in expected)
    assert (store.reference_latent(store.videos[0]) == reference.reference_latent(reference.videos[0])).all()
    with pytest.raises(UserError):
        store.frames(store.videos[0], [3])


def test_the_disk_cache_returns_only_what_was_stored_and_stays_small() -> None:
    cache, rng, stored = DiskCache(1000), np.random.default_rng(0), {}
    for key in range(500):
        stored[key] = rng.bytes(int(rng.integers(1, 400)))
        cache.put(key, stored[key])
        kept = {old: value for old in stored if (value := cache.get(old)) is not None}
        assert all(stored[old] == value for old, value in kept.items())
        assert kept and list(kept) == list(range(min(kept), key + 1))  # the newest ones
        assert sum(map(len, kept.values())) <= 1000 >= os.fstat(cache._file.fileno()).st_size
    cache.put("too large", bytes(1001))
    assert cache.get("too large") is None
