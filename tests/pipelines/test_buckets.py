"""Sources and files in a bucket, on a real S3 server (moto's) of this machine."""

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
from pipelines.train.data import ClipStore
from tcan.errors import UserError
from tests.pipelines.faults import write_video
from tests.pipelines.test_preprocess import OPTIONS, make_config


def put(uri: str, content: bytes) -> None:
    storage.write(uri, content)


def test_sources_of_a_bucket_are_listed_and_identified(bucket: str, tmp_path: Path) -> None:
    names = ["a.mp4", "deep/er/b c.MKV", "deep/舞.webm", "c.txt", "empty.mp4"]
    for name in names:
        put(f"{bucket}/list/{name}", b"" if name == "empty.mp4" else name.encode())
    put(f"{bucket}/list/these.txt", f"# mine\na.mp4\n{tmp_path}/x.mp4\ns3://other/y.mp4\n".encode())

    def found(what: str) -> list[str]:
        return [name.removeprefix(f"{bucket}/list/") for name in list_sources(f"{bucket}/list{what}")]

    assert found("") == found("/") == ["a.mp4", "deep/er/b c.MKV", "deep/舞.webm", "empty.mp4"]
    assert found("/deep/*.MKV") == ["deep/er/b c.MKV"]
    assert found("/a.mp4") == ["a.mp4"]
    assert found("/these.txt") == [f"{tmp_path}/x.mp4", "a.mp4", "s3://other/y.mp4"]
    for what, words in (("/nothing", "no such file"), ("/*.avi", "no file matches")):
        with pytest.raises(UserError, match=words):
            found(what)
    with pytest.raises(UserError, match="s3://nowhere: no such bucket"), writing("s3://nowhere/out"):
        pass

    (tmp_path / "a.mp4").write_bytes(b"a.mp4")
    here, there, empty, gone = identify(
        [
            str(tmp_path / "a.mp4"),
            f"{bucket}/list/a.mp4",
            f"{bucket}/list/empty.mp4",
            f"{bucket}/list/gone.mp4",
        ],
        {},
    )
    assert here.video_id == there.video_id and there.version is not None and there.version.startswith("5-")
    assert (empty.problem, gone.problem) == ("empty file", "no such file")
    # What is known is not read: the id is taken from there.
    assert identify([there.path], {(there.path, there.version): "known"})[0].video_id == "known"


def test_a_file_appears_when_it_is_whole(bucket: str) -> None:
    storage.write(f"{bucket}/whole/x", b"12")
    storage.write(f"{bucket}/whole/x", b"345")
    assert (storage.list_files(f"{bucket}/whole"), storage.read_bytes(f"{bucket}/whole/x")) == (
        [f"{bucket}/whole/x"],
        b"345",
    )
    storage.delete(f"{bucket}/whole/x")
    storage.delete(f"{bucket}/whole/x")
    assert storage.list_files(f"{bucket}/whole") == []
    with pytest.raises(UserError, match=r"s3://no-such-bucket/x: cannot be written: .*bucket"):
        storage.write("s3://no-such-bucket/x", pa.py_buffer(b"1"))


def test_nothing_but_whole_files_is_ever_seen(bucket: str) -> None:
    """Of 40 MB in several parts, by somebody who looks all the while."""
    seen, over = set(), threading.Event()
    filesystem, path = storage.locate(f"{bucket}/seen")

    def look() -> None:
        while not over.is_set():
            found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
            seen.add(tuple((item.path, item.size) for item in found))

    looking = threading.Thread(target=look)
    looking.start()
    storage.write(f"{bucket}/seen/x", bytes(40 * 10**6))
    over.set()
    looking.join()
    assert filesystem.get_file_info(f"{path}/x").size == 40 * 10**6
    assert () in seen and seen <= {(), ((f"{path}/x", 40 * 10**6),)}


def read_rows(dataset: str) -> dict[str, dict]:
    rows = []
    for name in clip_files(dataset):
        with storage.open_parquet(name) as file:
            rows += file.read().to_pylist()
    return {row["clip_id"]: row for row in rows}


def times(dataset: str) -> dict[str, int]:
    """When each of a dataset's files was written."""
    names = [*clip_files(dataset), *rejected_files(dataset), f"{dataset}/dataset.json"]
    filesystem, _ = storage.locate(dataset)
    found = filesystem.get_file_info([storage.locate(name)[1] for name in names])
    return {item.path: item.mtime_ns for item in found}


@pytest.mark.slow
def test_a_bucket_of_videos_becomes_a_dataset_in_a_bucket(
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

    def job() -> None:
        """In a process of its own: Ray's workers must be born after the server's address is known."""
        command = [sys.executable, "-m", "pipelines.cli", "preprocess", videos, out, *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stdout + done.stderr

    for path in set(folder.iterdir()) - {last}:
        put(f"{videos}/{path.name}", path.read_bytes())
    job()
    counts = {"sources": 4, "videos": 2, "clips": 6, "frames": 80, "rejected": 1, "duplicates": 1}
    assert read_info(out)["counts"] == counts
    before = times(out)
    config = make_config(pretrained_folder, tmp_path)
    assert preprocess(videos, out, config)["new_videos"] == 0
    assert "nothing to add" in capsys.readouterr().out and times(out) == before

    put(f"{videos}/{last.name}", last.read_bytes())
    job()
    after = times(out)
    assert after.pop("corpus/data/set/dataset.json") > before.pop("corpus/data/set/dataset.json")
    assert after.items() > before.items() and len(after) == len(before) + 1

    for command in ("verify", "info"):
        assert cli.main(["dataset", command, out]) == 0
    shown = capsys.readouterr().out
    assert (
        f"{out}: whole: 3 files, 3 videos, 9 clips" in shown
        and "of 5 sources 1 rejected, 1 duplicates" in shown
    )
    preprocess(str(folder), str(tmp_path / "out"), config)
    rows, truth = read_rows(out), read_rows(str(tmp_path / "out"))
    assert rows.keys() == truth.keys() and len(rows) == 9
    for clip, row in rows.items():
        ours, theirs = decode_row(row), decode_row(truth[clip])
        assert all(np.allclose(ours[name], theirs[name], atol=2e-3) for name in theirs), clip
        assert row["source"] == truth[clip]["source"].replace(str(folder), videos)
    stored = [video for split in ("train", "validation") for video in ClipStore(out, split).videos]
    assert sorted(len(video.number) for video in stored) == [40, 40, 40]
    left = storage.list_files(f"{bucket}/data", recursive=True)
    assert {name.removeprefix("s3://") for name in left} == times(out).keys()
