"""Local copies of inputs in a bucket, and local outputs that are uploaded to a bucket when they are complete.

Libraries for videos, images and weights read and write local files. The copies of a process are deleted when it exits.
`file://` URIs are converted to local paths.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path

import pyarrow.fs as pafs

from pipelines import storage
from tcan.errors import UserError

UPLOAD_LAST = ".json"
"""Suffix of the files of a result that are uploaded after all others. Readers regard a result as complete when they exist."""
TEMPORARY = "temporary-"  # prefix of the folders of one result or of the inputs of one task


@lru_cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tcan-")  # deleted at exit


def _local_path(uri: str, root: str) -> Path:
    """Path of the local copy; `original_names` restores the URI."""
    scheme, _, path = uri.partition("://")
    return Path(root, scheme, path)


@cache
def _download(uri: str, root: str) -> Path:
    filesystem, path = storage.locate(uri)
    local = _local_path(uri, root)
    with _read_errors(uri):
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            storage.check_bucket(uri)
            raise UserError(f"{uri}: no such file or folder; check the URI")
        # `copy_files` does not create the folder itself, and on Google Cloud Storage no subfolders.
        names = storage.list_files(uri, recursive=True) if info.type == pafs.FileType.Directory else [uri]
        for name in names:
            _local_path(name, root).parent.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(
            path, str(local), source_filesystem=filesystem, destination_filesystem=pafs.LocalFileSystem()
        )
    return local


@contextmanager
def _read_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{uri}: cannot be read: {storage.one_line(error)}; check the endpoint and the credentials"
        ) from None


def local_input(name: str | Path) -> Path:
    """Local path of a file or folder; downloads it from a bucket, once per process.

    Raises:
        UserError: nothing exists at the URI, or the bucket cannot be read.
    """
    if storage.is_remote(name):
        return _download(storage.absolute(name), _folder().name)
    return storage.local_path(name)


@contextmanager
def temporary_inputs() -> Iterator[Callable[[str], Path]]:
    """A function like `local_input`, whose copies are deleted at the end of the block."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=_folder().name) as root:

        def copy(name: str) -> Path:
            return (
                _download(storage.absolute(name), root)
                if storage.is_remote(name)
                else storage.local_path(name)
            )

        yield copy


@contextmanager
def local_output(name: str | Path) -> Iterator[Path]:
    """Local path to write a result (a file or a folder) to; at the end of the block it is uploaded to a bucket.

    Files that the block writes next to the result (e.g. a preview) are uploaded as well. Files with the suffix
    UPLOAD_LAST are uploaded last. If the block raises, nothing is uploaded.

    Raises:
        UserError: the bucket does not exist or cannot be written.
    """
    if not storage.is_remote(name):
        yield storage.local_path(name)
        return
    name = storage.absolute(name)
    storage.check_bucket(name)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=_folder().name) as root:
        local = _local_path(name, root)
        local.parent.mkdir(parents=True)
        yield local
        upload(local.parent, name.rpartition("/")[0])


def upload(folder: Path, uri: str) -> None:
    """Upload the contents of a local folder, files with the suffix UPLOAD_LAST last. They are deleted first if they exist.

    Raises:
        UserError: the bucket does not exist or cannot be written.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    # An older result must not look complete while its files are replaced. A single file is replaced atomically.
    for path in files if len(files) > 1 else ():
        if path.suffix == UPLOAD_LAST:
            storage.delete(f"{uri}/{path.relative_to(folder).as_posix()}")
    # The files of the folder itself after those of its subfolders.
    for path in sorted(files, key=lambda path: (path.suffix == UPLOAD_LAST, -len(path.parts), path)):
        name = f"{uri}/{path.relative_to(folder).as_posix()}"
        with storage.user_errors(name), path.open("r+b") as file:
            storage.upload(file, name)
    _download.cache_clear()  # it may have copies of the replaced files


def original_names(text: str) -> str:
    """Replace the paths of local copies in a message by their URIs."""
    if not _folder.cache_info().currsize:
        return text
    schemes = "|".join(scheme.removesuffix("://") for scheme in storage.SCHEMES)
    return re.sub(rf"{re.escape(_folder().name)}/(?:{TEMPORARY}\w+/)?({schemes})/", r"\1://", text)
