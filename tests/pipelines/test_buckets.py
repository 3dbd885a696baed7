"""A dataset in a bucket on a local S3 server, of videos on a local server of Google Cloud Storage."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines import cli, storage
from pipelines.dataset import clip_files, decode_row, read_info, rejected_files
from pipelines.preprocess.job import preprocess
from pipelines.train.clips import ClipStore
from tests.pipelines.faults import write_video
from tests.pipelines.test_preprocess import OPTIONS, make_config


def read_rows(dataset: str) -> dict[str, dict]:
    rows = []
    for name in clip_files(dataset):
        with storage.open_parquet(name) as file:
            rows += file.read().to_pylist()
    return {row["clip_id"]: row for row in rows}


def modification_times(dataset: str) -> dict[str, int]:
    """Modification time in ns of each file of a dataset."""
    names = [*clip_files(dataset), *rejected_files(dataset), f"{dataset}/dataset.json"]
    filesystem, _ = storage.locate(dataset)
    files = filesystem.get_file_info([storage.locate(name)[1] for name in names])
    return {item.path: item.mtime_ns for item in files}


@pytest.mark.slow
def test_preprocess_reads_and_writes_buckets_as_local_folders(
    bucket: str,
    gcs_bucket: str,
    pretrained_folder: Path,
    tmp_path: Path,
    ray_cluster: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "videos"
    for i in range(3):
        write_video(folder / f"{i} ä.mp4", 40, seed=i)
    (folder / "text.mp4").write_text("text")
    (folder / "twin.mp4").write_bytes((folder / "0 ä.mp4").read_bytes())
    last = folder / "2 ä.mp4"
    videos, out = f"{gcs_bucket}/videos", f"{bucket}/data/set"
    options = [
        *OPTIONS,
        f"--pretrained.vae={pretrained_folder}",
        f"--pretrained.pose={pretrained_folder}/pose",
    ]
    options.append(f"--tracking.folder={tmp_path / 'mlflow'}")

    def run_job() -> None:
        """Run in a new process, because Ray workers must start after the server address is set."""
        command = [sys.executable, "-m", "pipelines.cli", "preprocess", videos, out, *options]
        process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert process.returncode == 0, process.stdout + process.stderr

    for path in set(folder.iterdir()) - {last}:
        storage.write(f"{videos}/{path.name}", path.read_bytes())
    run_job()
    counts = {"sources": 4, "videos": 2, "clips": 6, "frames": 80, "rejected": 1, "duplicates": 1}
    assert read_info(out)["counts"] == counts
    before = modification_times(out)
    config = make_config(pretrained_folder, tmp_path)
    assert preprocess(videos, out, config)["new_videos"] == 0
    assert "nothing to add" in capsys.readouterr().out and modification_times(out) == before

    storage.write(f"{videos}/{last.name}", last.read_bytes())
    run_job()
    after = modification_times(out)
    assert after.pop("corpus/data/set/dataset.json") > before.pop("corpus/data/set/dataset.json")
    assert after.items() > before.items()

    for command in ("verify", "info"):
        assert cli.main(["dataset", command, out]) == 0
    output = capsys.readouterr().out
    assert re.search(
        rf"{out}: verified: \d files, 3 videos, 9 clips", output
    )  # files depend on the times of commits
    assert "1 of 5 sources rejected, 1 duplicates" in output
    preprocess(str(folder), str(tmp_path / "out"), config)
    rows, expected = read_rows(out), read_rows(str(tmp_path / "out"))
    assert rows.keys() == expected.keys() and len(rows) == 9
    for clip, row in rows.items():
        remote, local = decode_row(row), decode_row(expected[clip])
        assert all(np.allclose(remote[name], local[name], atol=2e-3) for name in local), clip
        assert row["source"] == expected[clip]["source"].replace(str(folder), videos)
    stored = [video for split in ("train", "validation") for video in ClipStore(out, split).videos]
    assert sorted(len(video) for video in stored) == [40, 40, 40]
    existing = storage.list_files(f"{bucket}/data", recursive=True)
    files = modification_times(out).keys() | {"corpus/data/set/index.parquet"}
    assert {name.removeprefix("s3://") for name in existing} == files
