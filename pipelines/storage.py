"""Local files and files in a bucket (`s3://`, `gs://`), each identified by an absolute path or a URI.

Arrow's file systems read credentials and endpoint from their usual locations: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
~/.aws, GOOGLE_APPLICATION_CREDENTIALS and so on.
"""

import errno
import io
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from tcan.errors import UserError

SCHEMES = ("s3://", "gs://")
# Google's client retries for 15 minutes by default, also if the endpoint is wrong. S3's client gives up after about 20 s.
GCS_RETRY_SECONDS = 30
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors that the user can fix: the disk is full, over quota or read-only, or permissions are missing.
USER_ERRNOS = DISK_FULL_ERRNOS | {
    errno.ENOENT,  # a path below a virtual file system such as /proc, where no file can be created
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


def is_remote(name: str | Path) -> bool:
    """Whether the name is a URI of a bucket."""
    return str(name).startswith(SCHEMES)


def local_path(name: str | Path) -> Path:
    """Path of a local file. `file://` URIs are converted."""
    return Path(url2pathname(urlparse(str(name)).path) if str(name).startswith("file://") else name)


def absolute(name: str | Path) -> str:
    """Absolute form of a path or URI, independent of the working directory. `file://` URIs are converted to paths."""
    return str(name).rstrip("/") if is_remote(name) else os.path.abspath(local_path(name).expanduser())


def locate(name: str | Path) -> tuple[pafs.FileSystem, str]:
    """Return the Arrow file system of a name and the path in that file system.

    Raises:
        UserError: the bucket cannot be reached.
    """
    if not is_remote(name):
        return pafs.LocalFileSystem(), os.path.abspath(name)
    scheme, _, path = str(name).partition("://")
    bucket = path.partition("/")[0]
    try:
        return _bucket(scheme, bucket), path
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{scheme}://{bucket}: cannot be reached: {one_line(error)}; check the endpoint and the credentials"
        ) from None


@lru_cache
def _bucket(scheme: str, bucket: str) -> pafs.FileSystem:
    if scheme != "gs":
        return pafs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]
    filesystem = pafs.FileSystem.from_uri(f"gs://{bucket}?retry_limit_seconds={GCS_RETRY_SECONDS}")[0]
    # The first request reads the credentials. Errors in them are no OSErrors; later requests raise only OSErrors.
    with suppress(OSError):
        filesystem.get_file_info(bucket)
    return filesystem


def check_bucket(name: str) -> None:
    """Check that the bucket of a URI exists.

    Raises:
        UserError: the bucket does not exist, or access to it is denied.
    """
    filesystem, path = locate(name)
    bucket = f"{name.partition('://')[0]}://{path.partition('/')[0]}"
    try:
        info = filesystem.get_file_info(path.partition("/")[0])
    except PermissionError:
        # From Google's client: roles for reading and writing objects do not include reading the properties of the bucket.
        return
    except OSError as error:
        raise UserError(
            f"{bucket}: cannot be reached: {one_line(error)}; check the endpoint and the credentials"
        ) from None
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"{bucket}: no such bucket; create it first")


def exists(name: str | Path) -> bool:
    """Whether a file or a non-empty folder exists.

    Raises:
        UserError: the bucket cannot be reached.
    """
    filesystem, path = locate(name)
    try:
        return filesystem.get_file_info(path).type != pafs.FileType.NotFound
    except OSError as error:
        raise UserError(
            f"{name}: cannot be read: {one_line(error)}; check the endpoint and the credentials"
        ) from None


def list_files(folder: str | Path, recursive: bool = False) -> list[str]:
    """Sorted names of the files in a folder; an empty list if the folder does not exist.

    Raises:
        UserError: the bucket does not exist or cannot be read.
    """
    filesystem, path = locate(folder)
    prefix = f"{str(folder).partition('://')[0]}://" if is_remote(folder) else ""
    try:
        found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed: {one_line(error)}; check the bucket and the credentials"
        ) from None
    if not found and is_remote(folder):
        check_bucket(str(folder))
    return sorted(prefix + item.path for item in found if item.type == pafs.FileType.File)


def open_file(name: str | Path) -> pa.NativeFile:
    """Open a file for sequential reading. Files in a bucket are read in requests of 8 MiB.

    Raises:
        FileNotFoundError, OSError: raised by Arrow.
    """
    filesystem, path = locate(name)
    return filesystem.open_input_stream(path, buffer_size=2**23)


def read_bytes(name: str | Path) -> bytes:
    """Read a complete file.

    Raises:
        FileNotFoundError, OSError: raised by Arrow.
    """
    with open_file(name) as file:
        return file.read()


@contextmanager
def open_parquet(name: str | Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of a clip dataset. Read errors inside the block are converted as well.

    Raises:
        UserError: the file is missing or damaged.
    """
    filesystem, path = locate(name)
    with damaged_file(name), pq.ParquetFile(path, filesystem=filesystem) as file:
        yield file


@contextmanager
def damaged_file(name: str | Path) -> Iterator[None]:
    """Convert errors of reading a file of a clip dataset to UserError."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{name}: cannot be read ({one_line(error)}); delete the file and rerun tcan preprocess to regenerate its videos"
        ) from None


def delete(name: str | Path) -> None:
    """Delete a file if it exists."""
    filesystem, path = locate(name)
    with user_errors(name), suppress(FileNotFoundError):
        filesystem.delete_file(path)


def open_partial(folder: str | Path) -> io.BufferedRandom:
    """Create a temporary file for reading and writing, which `publish` later moves to its name in `folder`.

    Local files are created in `folder` as `.*.partial`. Files for a bucket are unnamed files in the local temporary folder.

    Raises:
        UserError: the folder cannot be written.
    """
    with user_errors(folder):
        if is_remote(folder):
            return tempfile.TemporaryFile()
        return open(f"{folder}/.{uuid.uuid4().hex}.partial", "x+b")


def publish(file: io.BufferedRandom, name: str | Path) -> None:
    """Move a complete file from `open_partial` to its name and close it. On failure the file is deleted.

    Raises:
        UserError: the disk is full, or the folder or bucket cannot be written.
    """
    with user_errors(name), _discarded_on_error(file):
        file.flush()
        if is_remote(name):
            upload(file, name)
        else:
            os.fsync(file.fileno())
            os.replace(file.name, name)
        file.close()


def upload(file: io.BufferedRandom, name: str | Path) -> None:
    """Upload a file directly to its final name.

    In a bucket an object becomes visible when its upload completes, and an interrupted upload leaves no object. Copying from
    a temporary name would fail above 5 GB, the limit of S3's copy operation.

    `copy_files` uploads in one call. With an output stream, an interrupt would close the stream, and closing completes the
    upload of a partial object.
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
        with suppress(OSError):  # close() flushes buffered data, which may fail again
            file.close()
        if isinstance(file.name, str):
            os.unlink(file.name)
        raise


def write(name: str | Path, data: bytes) -> None:
    """Write a file atomically: it appears under its name only when it is complete.

    Raises:
        UserError: see `publish`.
    """
    file = open_partial(str(name).rpartition("/")[0])
    with user_errors(name), _discarded_on_error(file):
        file.write(data)
    publish(file, name)


@contextmanager
def user_errors(name: str | Path) -> Iterator[None]:
    """Convert write errors that the user can fix to UserError."""
    try:
        yield
    except OSError as error:
        if not is_remote(name) and error.errno not in USER_ERRNOS:
            raise
        reason = os.strerror(error.errno).lower() if error.errno in USER_ERRNOS else one_line(error)
        if is_remote(name) and error.errno == errno.ENOENT:  # buckets need no folders
            reason = "no such bucket"
        space = "free disk space or " if error.errno in DISK_FULL_ERRNOS else ""
        raise UserError(
            f"{name}: cannot be written: {reason}; {space}choose another OUT, then rerun"
        ) from None


def one_line(error: BaseException) -> str:
    """An error's complete message on one line, truncated to 200 characters.

    Messages of Google's client are reduced to the status and the reason, which follows explanations of any length.
    """
    text = " ".join(str(error).split())
    if status := re.search(r"google::cloud::Status\((\w+): ", text):
        reason = text[status.end() :].partition(" error_info={")[0]
        text = (
            f"{status[1]}: "
            + re.split("with a last message of |The underlying error message was: ", reason)[-1]
        )
    return text[:200]
