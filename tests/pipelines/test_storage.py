"""Files in buckets, on local servers of S3 (moto) and of Google Cloud Storage (gcp-storage-emulator)."""

import io
import re
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.preprocess.shards import writing
from pipelines.preprocess.sources import identify, list_sources
from tcan.errors import UserError
from tests.gcs_server import READ_ONLY
from tests.pipelines.test_cli import error_of


def test_sources_in_a_bucket_are_listed_and_identified(any_bucket: str, tmp_path: Path) -> None:
    names = ["a.mp4", "deep/er/b c.MKV", "deep/舞.webm", "c.txt", "empty.mp4"]
    for name in names:
        storage.write(f"{any_bucket}/list/{name}", b"" if name == "empty.mp4" else name.encode())
    storage.write(
        f"{any_bucket}/list/these.txt", f"# mine\na.mp4\n{tmp_path}/x.mp4\ns3://other/y.mp4\n".encode()
    )

    def listed(source: str) -> list[str]:
        return [
            name.removeprefix(f"{any_bucket}/list/") for name in list_sources(f"{any_bucket}/list{source}")
        ]

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


def test_parts_of_a_parquet_file_are_read(any_bucket: str) -> None:
    """The file is larger than the buffers of a connection: parts are read while its download is under way."""
    table = pa.table({name: range(start, start + 300_000) for start, name in enumerate("ab")})
    data = io.BytesIO()
    pq.write_table(table, data, row_group_size=100_000, compression="none", use_dictionary=False)
    name = f"{any_bucket}/parquet/table.parquet"
    storage.write(name, data.getvalue())
    with storage.open_parquet(name) as file:
        assert file.read_row_group(2, columns=["b"])["b"].equals(table["b"].slice(200_000))
        assert file.read().equals(table)
    with pytest.raises(UserError, match=f"{name}2: cannot be read "), storage.open_parquet(f"{name}2"):
        pass


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("GOOGLE_APPLICATION_CREDENTIALS", "{folder}/none.json", "UNKNOWN: Cannot open credentials file"),
        (
            "GOOGLE_APPLICATION_CREDENTIALS",
            "{folder}/empty.json",
            "INVALID_ARGUMENT: Unsupported credential type",
        ),
        (
            "CLOUD_STORAGE_EMULATOR_ENDPOINT",
            "http://127.0.0.1:1",
            "UNAVAILABLE: .*Could not connect to server",
        ),
        ("CLOUD_STORAGE_EMULATOR_ENDPOINT", "", "UNKNOWN: .*URL using bad/illegal format"),
    ],
)
def test_wrong_address_or_credentials_of_google_cloud_storage(
    variable: str,
    value: str,
    reason: str,
    gcs_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.json").write_text("{}")
    monkeypatch.setenv(variable, value.format(folder=tmp_path))
    monkeypatch.setattr(storage, "GCS_RETRY_SECONDS", 1)
    storage._bucket.cache_clear()  # clients read the variables when they are created
    line = error_of(capsys, "dataset", "info", f"{gcs_bucket}/x")
    assert re.search(rf"{gcs_bucket}.*{reason}.*; ", line), line
    storage._bucket.cache_clear()


def test_bucket_whose_objects_can_only_be_read(gcs_bucket: str) -> None:
    """The account may read objects, but neither write them nor read the properties of the bucket."""
    bucket = f"gs://{READ_ONLY}"
    storage.check_bucket(f"{bucket}/x")
    assert storage.list_files(f"{bucket}/x") == []
    with pytest.raises(UserError, match=f"{bucket}/x: cannot be written: permission denied; "):
        storage.write(f"{bucket}/x", b"1")
    with (
        pytest.raises(UserError, match=f"{bucket}/out.*: cannot be written: permission denied"),
        writing(f"{bucket}/out"),
    ):
        pass
