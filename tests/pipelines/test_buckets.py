"""Sources and files in a bucket, on a real S3 server (moto's) of this machine."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import requests

from pipelines import storage
from pipelines.preprocess.shards import writing
from pipelines.preprocess.sources import identify, list_sources
from tcan.errors import UserError


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket, reached as any is: by what the environment says, which Ray's workers inherit."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        assert requests.put(f"http://127.0.0.1:{port}/corpus", timeout=60).ok
        yield "s3://corpus"
    server.stop()


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
