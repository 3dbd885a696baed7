"""Listing and identification of sources: the user's argument -> video files with a content id each."""

import fnmatch
import glob
import hashlib
import os
import posixpath
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.fs as pafs

from pipelines import storage
from tcan.errors import UserError

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
)


@dataclass(frozen=True)
class Source:
    """A file with the id of its content, or the reason why it cannot be read."""

    path: str
    """Absolute path or URI; bytes that are not UTF-8 are escaped."""
    video_id: str | None = None
    """First 16 hex digits of the SHA-256 of the file."""
    version: str | None = None
    """{bytes}-{modification time in ns}."""
    problem: str | None = None
    """Why the file cannot be read."""


def list_sources(videos: str) -> list[str]:
    """Return the sorted, unique absolute paths or URIs of the sources.

    Args:
        videos: one of these, locally or in a bucket (`s3://`, `gs://`):

            - a folder, searched recursively for files with a video suffix;
            - a text file (`.txt`) with one path or URI per line; relative paths start at the folder of the list, empty
              lines and lines that begin with # are ignored;
            - any other file;
            - a glob pattern; `**` matches any number of subfolders (in a bucket, `*` also matches `/`).

            Files that a list or a pattern names are used whatever their suffix.

    Raises:
        UserError: the source does not exist, or contains no videos.
    """
    name = storage.absolute(videos)
    kind, files = _list_remote(name) if storage.is_remote(name) else _list_local(name)
    if not files:
        raise UserError(f"{videos}: {NO_SOURCES[kind]}")
    return sorted(set(files))


NO_SOURCES = {
    "folder": f"no videos in this folder; add files with one of the suffixes {' '.join(VIDEO_SUFFIXES)}",
    "list": "the list names no videos; write one path per line",
    "pattern": "no file matches this pattern; check it, and quote it so that the shell does not expand it",
    "nothing": "no such file or folder; give a folder of videos, a glob pattern, a video or a list (.txt)",
}


def _list_local(path: str) -> tuple[str, list[str]]:
    if os.path.isdir(path):
        return "folder", [file for file in _walk(path) if _is_video(file)]
    if os.path.lexists(path):
        return ("list", _read_list(path)) if path.lower().endswith(".txt") else ("file", [path])
    if glob.has_magic(path):
        return "pattern", [file for file in glob.glob(path, recursive=True) if not os.path.isdir(file)]
    return "nothing", []


def _list_remote(uri: str) -> tuple[str, list[str]]:
    filesystem, path = storage.locate(uri)
    try:
        file_type = filesystem.get_file_info(path).type
    except OSError as error:
        raise UserError(
            f"{uri}: cannot be read: {storage.one_line(error)}; check the bucket and the credentials"
        ) from None
    if file_type == pafs.FileType.File:
        return ("list", _read_list(uri)) if uri.lower().endswith(".txt") else ("file", [uri])
    if file_type == pafs.FileType.Directory:
        return "folder", [file for file in storage.list_files(uri, recursive=True) if _is_video(file)]
    if glob.has_magic(uri):
        parts = uri.split("/")
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        files = storage.list_files("/".join(parts[:fixed]), recursive=True)
        return "pattern", [file for file in files if fnmatch.fnmatchcase(file, uri)]
    storage.check_bucket(uri)
    return "nothing", []


def _is_video(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES


def identify(paths: list[str], known: Mapping[tuple[str, str], str]) -> list[Source]:
    """Return a `Source` with its content id for each path.

    Files with a (path, version) in `known` are not read. The others are hashed in threads, because hashing releases the GIL.
    """
    with ThreadPoolExecutor(max_workers=max(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: _identify(path, known), paths))


def _identify(path: str, known: Mapping[tuple[str, str], str]) -> Source:
    try:
        path.encode()
    except UnicodeEncodeError:  # neither Arrow nor Parquet supports such names
        return Source(os.fsencode(path).decode(errors="backslashreplace"), problem="file name is not UTF-8")
    try:
        filesystem, local_path = storage.locate(path)
        # Reading a pipe or a device could block forever.
        if not storage.is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
            return Source(path, problem="not a regular file")
        info = filesystem.get_file_info(local_path)
        if info.type != pafs.FileType.File:
            return Source(path, problem="no such file")
        if info.size == 0:
            return Source(path, problem="empty file")
        version = f"{info.size}-{info.mtime_ns}"
        if (path, version) in known:
            return Source(path, known[path, version], version)
        digest = hashlib.sha256()
        with filesystem.open_input_stream(local_path) as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except FileNotFoundError:
        return Source(path, problem="broken symbolic link" if os.path.islink(path) else "no such file")
    except OSError as error:
        return Source(path, problem=f"cannot be read: {error.strerror or storage.one_line(error)}")
    return Source(path, digest.hexdigest()[:16], version)


def _walk(folder: str) -> Iterator[str]:
    """All files below a folder. Links to folders are followed, and each folder is visited once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(root, file) for file in files)


def _read_list(file: str) -> list[str]:
    try:
        # Programs on Windows write a byte order mark.
        lines = [line.strip() for line in storage.read_bytes(file).decode("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read as a list of paths: {storage.one_line(error)}; check that it is UTF-8 text"
        ) from None
    names = [line for line in lines if line and not line.startswith("#")]
    folder = posixpath.dirname(file)
    return [_resolve(folder, name) for name in names]


def _resolve(folder: str, name: str) -> str:
    if storage.is_remote(name) or name.startswith(("/", "~", "file://")):
        return storage.absolute(name)
    return f"{folder}/{name}" if storage.is_remote(folder) else os.path.abspath(os.path.join(folder, name))
