"""Fault tolerance of preprocessing on a multi-node Ray cluster.

Faults: killed decoder, actor and node, small object store, full disk. The resulting dataset must equal that of an
uninterrupted job, without lost or duplicated clips.
"""

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
    """Write valid videos of several clips, a broken file and a copy."""
    for seed, (name, clips) in enumerate(CLIPS.items()):
        write_video(folder / name, 16 * clips, seed=seed)
    (folder / "text.mp4").write_text("no video")
    (folder / "copy.mp4").write_bytes((folder / "0.mp4").read_bytes())
    return folder


def assert_same_dataset(out: Path, uninterrupted: Path, videos: Path) -> None:
    """Check that each source is kept, rejected or a duplicate, and that the clips equal those of the other dataset."""
    assert read_info(out)["counts"] == read_info(uninterrupted)["counts"]
    rows = read_clips(out)
    assert_same_clips(out, rows, read_clips(uninterrupted))
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
        found, expected = decode_row(row), decode_row(other)
        assert all(np.allclose(found[name], expected[name], atol=2e-3) for name in expected), row["clip_id"]
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


@pytest.fixture(scope="module")
def datasets(pretrained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["decoder", "actor", "node"])
def test_killed_process_or_node_leaves_dataset_unchanged(datasets: Path, fault: str) -> None:
    assert_same_dataset(datasets / fault, datasets / "uninterrupted", datasets / "videos")


@pytest.mark.slow
def test_small_object_store_leaves_clips_unchanged(datasets: Path) -> None:
    truth = [row for row in read_clips(datasets / "uninterrupted") if row["source"].endswith("long.mp4")]
    assert_same_clips(datasets / "store", read_clips(datasets / "store"), truth)


def actor_processes() -> list[str]:
    """Names of the Ray Data actor processes below this process."""
    names = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            names += [name for name in process.cmdline() if re.match("ray::MapWorker", name)]
    return names


@pytest.mark.slow
def test_full_disk_ends_the_job_and_rerun_resumes(
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
        if not actor_processes():
            break
        time.sleep(0.1)
    assert not actor_processes()
    survived = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert survived and all(path.suffix == ".parquet" for path in survived)
    assert 0 < len(read_clips(out)) < sum(CLIPS.values())

    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert cli.main(job) == 0
    assert cli.main(["preprocess", str(videos), str(tmp_path / "uninterrupted"), *options]) == 0
    assert survived.items() <= {path: path.read_bytes() for path in out.rglob("*.parquet")}.items()
    assert_same_dataset(out, tmp_path / "uninterrupted", videos)
