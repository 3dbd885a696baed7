"""Sources and datasets in a bucket, on local servers of S3 (moto) and of Google Cloud Storage (gcp-storage-emulator)."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from pipelines import cli, storage
from pipelines.dataset import clip_files, decode_row, read_info, rejected_files
from pipelines.preprocess.job import preprocess
from pipelines.preprocess.shards import writing
from pipelines.preprocess.sources import identify, list_sources
from pipelines.train.clips import ClipStore
from tcan.errors import UserError
from tests.gcs_server import READ_ONLY
from tests.pipelines.faults import write_video
from tests.pipelines.test_preprocess import OPTIONS, make_config


def test_sources_in_a_bucket_are_listed_and_identified(any_bucket: str, tmp_path: Path) -> None:
    names = ["a.mp4", "deep/er/b c.MKV", "deep/舞.webm", "c.txt", "empty.mp4"]
    for name in names:
        storage.write(f"{any_bucket}/list/{name}", b"" if name == "empty.mp4" else name.encode())
    storage.write(f"{any_bucket}/list/these.txt", f"# mine\na.mp4\n{tmp_path}/x.mp4\ns3://other/y.mp4\n".encode())

    def listed(source: str) -> list[str]:
        return [name.removeprefix(f"{any_bucket}/list/") for name in list_sources(f"{any_bucket}/list{source}")]

    assert listed("") == listed("/") == ["a.mp4", "deep/er/b c.MKV", "deep/舞.webm", "empty.mp4"]
    assert listed("/deep/*.MKV") == ["deep/er/b c.MKV"]
    assert listed("/a.mp4") == ["a.mp4"]
    assert listed("/these.txt") == [f"{tmp_path}/x.mp4", "a.mp4", "s3://other/y.mp4"]
    for source, message in (("/nothing", "no such file"), ("/*.avi", "no file matches")):
        with pytest.raises(UserError, match=message):
            listed(source)
    nowhere = any_bucket.replace("corpus", "nowhere")
    with pytest.raises(UserError, match=f"{nowhere}: no such bucket"):
        list_sources(f"{nowhere}/videos")
    with pytest.raises(UserError, match=f"{nowhere}: no such bucket"), writing(f"{nowhere}/out"):
        pass

    (tmp_path / "a.mp4").write_bytes(b"a.mp4")
    local, remote, empty, missing = identify(
        [
            str(tmp_path / "a.mp4"),
            f"{any_bucket}/list/a.mp4",
            f"{any_bucket}/list/empty.mp4",
            f"{any_bucket}/list/missing.mp4",
        ],
        {},
    )
    assert (
        local.video_id == remote.video_id and remote.version is not None and remote.version.startswith("5-")
    )
    assert (empty.problem, missing.problem) == ("empty file", "no such file")
    # Known versions are not read; their id comes from the mapping.
    assert identify([remote.path], {(remote.path, remote.version): "known"})[0].video_id == "known"


def test_files_are_overwritten_and_deleted(any_bucket: str) -> None:
    storage.write(f"{any_bucket}/files/x", b"12")
    storage.write(f"{any_bucket}/files/x", b"345")
    assert (storage.list_files(f"{any_bucket}/files"), storage.read_bytes(f"{any_bucket}/files/x")) == (
        [f"{any_bucket}/files/x"],
        b"345",
    )
    storage.delete(f"{any_bucket}/files/x")
    storage.delete(f"{any_bucket}/files/x")
    assert storage.list_files(f"{any_bucket}/files") == []
    nowhere = any_bucket.replace("corpus", "no-such-bucket")
    with pytest.raises(UserError, match=f"{nowhere}/x: cannot be written: .*bucket"):
        storage.write(f"{nowhere}/x", pa.py_buffer(b"1"))
    with pytest.raises(UserError, match=f"{nowhere}: no such bucket"):
        storage.list_files(nowhere)


def test_incomplete_uploads_are_never_visible(any_bucket: str) -> None:
    """A thread lists the bucket during the multipart upload of a 40 MB file."""
    seen, finished = set(), threading.Event()
    filesystem, path = storage.locate(f"{any_bucket}/seen")

    def watch() -> None:
        while not finished.is_set():
            files = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
            seen.add(tuple((item.path, item.size) for item in files))

    watcher = threading.Thread(target=watch)
    watcher.start()
    storage.write(f"{any_bucket}/seen/x", bytes(40 * 10**6))
    finished.set()
    watcher.join()
    assert filesystem.get_file_info(f"{path}/x").size == 40 * 10**6
    assert () in seen and seen <= {(), ((f"{path}/x", 40 * 10**6),)}


def test_errors_of_google_cloud_storage_are_one_line(gcs_bucket: str, tmp_path: Path) -> None:
    """Errors in the credentials and in the address are no OSErrors. Clients read both at their start."""
    (tmp_path / "empty.json").write_text("{}")
    for variables, reason in {
        ("GOOGLE_APPLICATION_CREDENTIALS", f"{tmp_path}/none.json"): "UNKNOWN: Cannot open credentials file",
        ("GOOGLE_APPLICATION_CREDENTIALS", f"{tmp_path}/empty.json"): "INVALID_ARGUMENT: Unsupported credential",
        ("CLOUD_STORAGE_EMULATOR_ENDPOINT", "nowhere"): "UNAVAILABLE",
        ("CLOUD_STORAGE_EMULATOR_ENDPOINT", "http://127.0.0.1:1"): "UNAVAILABLE: .*Could not connect to server",
    }.items():
        code = "import sys\nfrom pipelines import cli, storage\nstorage.GCS_RETRY_SECONDS = 1\nsys.exit(cli.main(sys.argv[1:]))"
        process = subprocess.run(
            [sys.executable, "-c", code, "dataset", "info", f"{gcs_bucket}/x"],
            capture_output=True, text=True, env=os.environ | dict([variables]), cwd=Path(__file__).parents[2],
        )  # fmt: skip
        line = process.stderr.strip()
        assert process.returncode == 2 and line.count("\n") == 0
        assert re.search(rf"{gcs_bucket}.*{reason}.*; ", line), line


def test_bucket_whose_objects_can_only_be_read(gcs_bucket: str) -> None:
    """The account may read objects, but neither write them nor read the properties of the bucket."""
    bucket = f"gs://{READ_ONLY}"
    storage.check_bucket(f"{bucket}/x")
    assert storage.list_files(f"{bucket}/x") == []
    with pytest.raises(UserError, match=f"{bucket}/x: cannot be written: PERMISSION_DENIED: .*403; "):
        storage.write(f"{bucket}/x", b"1")
    with pytest.raises(UserError, match=f"{bucket}/out.*: cannot be written: PERMISSION_DENIED"), writing(f"{bucket}/out"):
        pass


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
    videos, out = f"{bucket}/videos", f"{bucket}/data/set"
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
