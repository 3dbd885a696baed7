"""Files on this machine or in a bucket (`s3://`, `gs://`), by one name each: an absolute path or a URI.

Credentials and endpoint come from where Arrow's file systems look for them: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws,
GOOGLE_APPLICATION_CREDENTIALS and so on.
"""

import errno
import io
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from tcan.errors import UserError

SCHEMES = ("s3://", "gs://")
# What the person who started the job can mend: the disk is full or over quota, read-only or not theirs.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MENDABLE = FULL | {
    errno.ENOENT,  # of a path in a place like /proc, where nothing can be made
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


def is_remote(name: str | Path) -> bool:
    return str(name).startswith(SCHEMES)


def absolute(name: str | Path) -> str:
    """The same place, named so that any working directory finds it."""
    return str(name).rstrip("/") if is_remote(name) else os.path.abspath(os.path.expanduser(name))


def locate(name: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system of a name and the path in it.

    Raises:
        UserError: a bucket that cannot be reached at all.
    """
    if not is_remote(name):
        return pafs.LocalFileSystem(), os.path.abspath(name)
    scheme, _, path = str(name).partition("://")
    bucket = path.partition("/")[0]
    try:
        return _bucket(scheme, bucket), path
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{scheme}://{bucket}: cannot be reached: {one_line(error)}") from None


@lru_cache
def _bucket(scheme: str, bucket: str) -> pafs.FileSystem:
    return pafs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]


def check_bucket(name: str) -> None:
    """
    Raises:
        UserError: the bucket of this URI is not there, or may not be seen.
    """
    filesystem, path = locate(name)
    bucket = f"{name.partition('://')[0]}://{path.partition('/')[0]}"
    try:
        there = filesystem.get_file_info(path.partition("/")[0])
    except OSError as error:
        raise UserError(f"{bucket}: cannot be reached: {one_line(error)}") from None
    if there.type == pafs.FileType.NotFound:
        raise UserError(f"{bucket}: no such bucket; make it first")


def list_files(folder: str | Path, recursive: bool = False) -> list[str]:
    """Names of the files in a folder, sorted; none where there is no such folder.

    Raises:
        UserError: a bucket that is not there or not to be read.
    """
    filesystem, path = locate(folder)
    prefix = f"{str(folder).partition('://')[0]}://" if is_remote(folder) else ""
    try:
        found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {one_line(error)}") from None
    return sorted(prefix + item.path for item in found if item.type == pafs.FileType.File)


def open_file(name: str | Path) -> pa.NativeFile:
    """The file, to read from its beginning; of a bucket's, 8 MiB a request.

    Raises:
        FileNotFoundError, OSError: as Arrow raises them.
    """
    filesystem, path = locate(name)
    return filesystem.open_input_stream(path, buffer_size=2**23)


def read_bytes(name: str | Path) -> bytes:
    """
    Raises:
        FileNotFoundError, OSError: as Arrow raises them.
    """
    with open_file(name) as file:
        return file.read()


@contextmanager
def open_parquet(name: str | Path) -> Iterator[pq.ParquetFile]:
    """The file of that name in a dataset.

    Raises:
        UserError: it isn't there, or is damaged, which may also be found while it is read.
    """
    filesystem, path = locate(name)
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            yield file
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{name}: cannot be read ({one_line(error)}); delete it, and the same tcan preprocess makes its videos again"
        ) from None


def delete(name: str | Path) -> None:
    """Deletes a file, if it is there."""
    filesystem, path = locate(name)
    with mendable(name), suppress(FileNotFoundError):
        filesystem.delete_file(path)


def open_partial(folder: str | Path) -> io.BufferedRandom:
    """A new file, to write and read, which `publish` gives a name in that folder. Until then it lies there under a name of
    its own, `.*.partial`; what is to go to a bucket, in this machine's temporary folder, without a name.

    Raises:
        UserError: the folder is not to be written to.
    """
    with mendable(folder):
        if is_remote(folder):
            return tempfile.TemporaryFile()
        return open(f"{folder}/.{uuid.uuid4().hex}.partial", "x+b")


def publish(file: io.BufferedRandom, name: str | Path) -> None:
    """Gives a file of `open_partial`'s its name, when it is whole, and closes it; what fails leaves nothing behind.

    Raises:
        UserError: the disk is full, or the folder or bucket is not to be written to.
    """
    with mendable(name), _discarded_on_error(file):
        file.flush()
        if is_remote(name):
            _upload(file, name)
        else:
            os.fsync(file.fileno())
            os.replace(file.name, name)
        file.close()


def _upload(file: io.BufferedRandom, name: str | Path) -> None:
    """Under its own name at once: in a bucket it appears when the upload is complete, and one that breaks off leaves
    nothing to be seen. A copy from a temporary name would end at 5 GB, the most that S3 copies.

    Arrow does it in one call, since a stream of its that an interrupt ends in between is closed, and that completes it.
    """
    filesystem, path = locate(name)
    pafs.copy_files(
        f"/dev/fd/{file.fileno()}",
        path,
        source_filesystem=pafs.LocalFileSystem(),
        destination_filesystem=filesystem,
        chunk_size=2**23,
    )


@contextmanager
def _discarded_on_error(file: io.BufferedRandom) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):  # what it still wanted to write
            file.close()
        if isinstance(file.name, str):
            os.unlink(file.name)
        raise


def write(name: str | Path, data: bytes) -> None:
    """Writes a file, which is there when it is whole.

    Raises:
        UserError: as `publish`.
    """
    file = open_partial(str(name).rpartition("/")[0])
    with mendable(name), _discarded_on_error(file):
        file.write(data)
    publish(file, name)


@contextmanager
def mendable(name: str | Path) -> Iterator[None]:
    """Errors of writing that the user can mend, as a UserError."""
    try:
        yield
    except OSError as error:
        if not is_remote(name) and error.errno not in MENDABLE:
            raise
        reason = os.strerror(error.errno).lower() if error.errno in MENDABLE else one_line(error)
        room = "make room there or " if error.errno in FULL else ""
        raise UserError(
            f"{name}: cannot be written: {reason}; {room}give another OUT, and run again"
        ) from None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
