"""Processes and a machine that die in the middle of a job, on a real cluster of several nodes, a store and a disk that are
too small: nothing is lost, nothing comes twice, and what is made is what a calm job makes."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.dataset import decode_row, read_info
from pipelines.preprocess.inspect import verify
from pipelines.preprocess.shards import ShardWriter, VideoAssembler, read_contents, writing
from pipelines.preprocess.sources import Source, list_sources
from tcan.errors import UserError
from tests.pipelines.faults import write_video
from tests.pipelines.test_preprocess import OPTIONS, encoded_row, ending, person, read_clips

ROOT = Path(__file__).parents[2]
CLIPS = {"0.mp4": 5, "1.mp4": 5, "2.mp4": 5, "long.mp4": 12}


def write_videos(folder: Path) -> Path:
    """Good ones of several clips, a broken one and a copy."""
    for seed, (name, clips) in enumerate(CLIPS.items()):
        write_video(folder / name, 16 * clips, seed=seed)
    (folder / "text.mp4").write_text("no video")
    (folder / "copy.mp4").write_bytes((folder / "0.mp4").read_bytes())
    return folder


def assert_same(out: Path, calm: Path, videos: Path) -> None:
    """Every source kept, rejected or a duplicate, and the clips are those of the calm job."""
    assert read_info(out)["counts"] == read_info(calm)["counts"]
    rows = read_clips(out)
    assert_same_clips(out, rows, read_clips(calm))
    rejected = [row for file in (out / "rejected").iterdir() for row in pq.read_table(file).to_pylist()]
    assert Counter(row["source"] for row in rejected) + Counter({row["source"] for row in rows}) == Counter(
        list_sources(str(videos))
    )
    assert sorted(row["stage"] for row in rejected) == ["decode", "duplicate"]
    assert len(rows) == sum(CLIPS.values())


def assert_same_clips(out: Path, rows: list[dict], truth: list[dict]) -> None:
    verify(str(out))
    assert len({row["clip_id"] for row in rows}) == len(rows)
    for row, other in zip(rows, truth, strict=True):
        assert {key: row[key] for key in ("clip_id", "source", "split", "main_person")} == {
            key: other[key] for key in ("clip_id", "source", "split", "main_person")
        }
        ours, theirs = decode_row(row), decode_row(other)
        assert all(np.allclose(ours[name], theirs[name], atol=2e-3) for name in theirs), row["clip_id"]
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


@pytest.fixture(scope="module")
def made(bases_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_videos(folder / "videos")
    command = [sys.executable, "-m", "tests.pipelines.faulty_cluster", str(folder / "videos"), str(folder)]
    command += [*OPTIONS, f"--bases.vae={bases_folder}", f"--bases.pose={bases_folder / 'pose'}"]
    command += [f"--tracking.folder={folder / 'mlflow'}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["decoder", "actor", "node"])
def test_what_dies_changes_nothing(made: Path, fault: str) -> None:
    assert_same(made / fault, made / "calm", made / "videos")


@pytest.mark.slow
def test_a_store_that_is_too_small_changes_nothing(made: Path) -> None:
    truth = [row for row in read_clips(made / "calm") if row["source"].endswith("long.mp4")]
    assert_same_clips(made / "store", read_clips(made / "store"), truth)


def write_dataset(out: Path) -> None:
    """What is missing of four videos of 150 kB each, every one committed at once."""
    sources = [Source(f"/{i}", str(i) * 16, "1-1") for i in range(4)]
    with writing(str(out)):
        done = read_contents(str(out), {}).kept
        writer = ShardWriter(str(out), {}, 2**30, 0)
        assembler = VideoAssembler(
            writer, sources, min_person_share=0, min_person_height=0, validation_share=0.1
        )
        for i, source in enumerate(sources):
            if source.video_id in done:
                continue
            noise = np.random.default_rng(i)
            for start in range(0, 72, 24):
                latents = {name: noise.bytes(24 * 1024) for name in ("latent_mean", "latent_logvar")}
                assembler.add(encoded_row(source.video_id, start, [person(32, 40)[None]] * 24) | latents)
            assert assembler.add(ending(source.video_id, 3)) == "kept"


def test_a_disk_that_fills_up_in_a_shard_loses_that_shard_alone(small_disk: Path, tmp_path: Path) -> None:
    out = small_disk / "out"
    with pytest.raises(UserError, match="cannot be written: no space left on device; make room") as error:
        write_dataset(out)
    assert "\n" not in str(error.value)
    survived = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert 0 < len(survived) < 4 and all(path.suffix == ".parquet" for path in survived)

    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    write_dataset(out)
    write_dataset(tmp_path / "calm")
    assert {path: path.read_bytes() for path in survived} == survived
    assert not list(out.rglob(".*"))
    assert read_clips(out) == read_clips(tmp_path / "calm") and len(read_clips(out)) == 12
