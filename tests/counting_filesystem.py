"""An Arrow file system that counts the files, requests and bytes that are read from local files."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from pipelines import storage


class Counts:
    files = requests = bytes = 0

    def reset(self) -> None:
        self.files = self.requests = self.bytes = 0


class _CountedFile(io.FileIO):
    def __init__(self, path: str, counts: Counts):
        super().__init__(path)
        self._counts = counts
        counts.files += 1

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self._counts.requests += 1
        self._counts.bytes += len(data or b"")
        return data or b""


class _CountingHandler(pafs.FSSpecHandler):
    """Delegates to the local file system; only reading is counted."""

    def __init__(self, counts: Counts):
        self.counts = counts
        self.local = pafs.LocalFileSystem()

    def get_type_name(self) -> str:
        return "counting"

    def get_file_info(self, paths: Any) -> Any:
        return self.local.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self.local.get_file_info(selector)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_CountedFile(path, self.counts), "r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_CountedFile(path, self.counts), "r")


@contextmanager
def counted_reads() -> Iterator[Counts]:
    """Count what `pipelines.storage` reads from local files inside the block."""
    counts = Counts()
    filesystem = pafs.PyFileSystem(_CountingHandler(counts))
    locate = storage.locate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "locate", lambda name: (filesystem, locate(name)[1]))
        yield counts
