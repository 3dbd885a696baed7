"""Processes and a machine that die in the middle of a job, on a real cluster of several nodes, a store and a disk that are
too small: nothing is lost, nothing comes twice, and what is made is what a calm job makes."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from pipelines import cli
from pipelines.dataset import decode_row, read_info
from pipelines.preprocess.dataset_commands import verify
from pipelines.preprocess.sources import list_sources
from tests.pipelines.faults import write_video
from tests.pipelines.test_preprocess import OPTIONS, read_clips

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
    assert sorted(row["step"] for row in rejected) == ["decode", "duplicate"]
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
def made(pretrained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_videos(folder / "videos")
    command = [sys.executable, "-m", "tests.pipelines.faulty_cluster", str(folder / "videos"), str(folder)]
    command += [
        *OPTIONS,
        f"--pretrained.vae={pretrained_folder}",
        f"--pretrained.pose={pretrained_folder / 'pose'}",
    ]
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


def workers() -> list[str]:
    """Processes of this one's Ray in which a job's actors live."""
    names = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            names += [name for name in process.cmdline() if re.match("ray::MapWorker", name)]
    return names


@pytest.mark.slow
def test_a_job_whose_disk_is_full_ends_and_goes_on_when_there_is_room(
    small_disk: Path,
    tmp_path: Path,
    pretrained_folder: Path,
    ray_cluster: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    videos, out = write_videos(tmp_path / "videos"), small_disk / "out"
    options = [
        f"--pretrained.vae={pretrained_folder}",
        f"--pretrained.pose={pretrained_folder / 'pose'}",
        *OPTIONS,
    ]
    options += [f"--tracking.folder={tmp_path / 'mlflow'}", "--preprocess.commit_seconds=0"]
    job = ["preprocess", str(videos), str(out), *options]
    assert cli.main(job) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"tcan: error: .*/clips.*: cannot be written: no space left on device; free disk space .*\n", error
    )
    for _ in range(300):
        if not workers():
            break
        time.sleep(0.1)
    assert not workers()
    survived = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert survived and all(path.suffix == ".parquet" for path in survived)
    assert 0 < len(read_clips(out)) < sum(CLIPS.values())

    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert cli.main(job) == 0
    assert cli.main(["preprocess", str(videos), str(tmp_path / "calm"), *options]) == 0
    assert survived.items() <= {path: path.read_bytes() for path in out.rglob("*.parquet")}.items()
    assert_same(out, tmp_path / "calm", videos)
