"""Stage 1, list: what the user names -> the files to preprocess, each with the id of its content."""

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
    """A file: where it lies, and the id of its content or the reason why it could not be read."""

    path: str
    """Absolute, or a URI; bytes that are not UTF-8 written as escapes."""
    video_id: str | None = None
    version: str | None = None
    """{bytes}-{modification time in ns}."""
    problem: str | None = None


def list_sources(videos: str) -> list[str]:
    """Absolute paths or URIs, sorted, each once.

    videos: a folder (searched with all its subfolders for files named as videos), a text file (`.txt`) with a path or URI
    a line (relative ones from the file's folder; empty lines and lines that begin with # don't count), any other file, or
    a glob pattern (`**` for any subfolders); each of them on this machine or in a bucket (`s3://`, `gs://`), where a
    pattern's `*` passes through subfolders too. What a list or a pattern names counts whatever its suffix.

    Raises:
        UserError: there is no such thing, or no video in it.
    """
    place = storage.absolute(videos)
    kind, found = _list_remote(place) if storage.is_remote(place) else _list_local(place)
    if not found:
        raise UserError(f"{videos}: {NOTHING[kind]}")
    return sorted(set(found))


NOTHING = {
    "folder": f"no videos in this folder (looked for {' '.join(VIDEO_SUFFIXES)})",
    "list": "this list names no videos; give it a path a line",
    "pattern": "no file matches this pattern; quote it, so that the shell leaves it alone",
    "nothing": "no such file or folder; give a folder of videos, a pattern, a video or a list (.txt)",
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
        there = filesystem.get_file_info(path).type
    except OSError as error:
        raise UserError(f"{uri}: cannot be read: {storage.one_line(error)}") from None
    if there == pafs.FileType.File:
        return ("list", _read_list(uri)) if uri.lower().endswith(".txt") else ("file", [uri])
    if there == pafs.FileType.Directory:
        return "folder", [file for file in storage.list_files(uri, recursive=True) if _is_video(file)]
    if glob.has_magic(uri):
        parts = uri.split("/")
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        files = storage.list_files("/".join(parts[:fixed]), recursive=True)
        return "pattern", [file for file in files if fnmatch.fnmatchcase(file, uri)]
    return "nothing", []


def _is_video(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES


def identify(paths: list[str], known: Mapping[tuple[str, str], str]) -> list[Source]:
    """The sources with their content's ids. Files are read in threads, since hashing gives the GIL away; those of the
    same (path, version) as in `known` are not read."""
    with ThreadPoolExecutor(max_workers=max(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: _identify(path, known), paths))


def _identify(path: str, known: Mapping[tuple[str, str], str]) -> Source:
    try:
        path.encode()
    except UnicodeEncodeError:  # neither Arrow nor Parquet take such a name
        return Source(os.fsencode(path).decode(errors="backslashreplace"), problem="its name is not UTF-8")
    try:
        filesystem, place = storage.locate(path)
        # A pipe or a device would be waited for without end.
        if not storage.is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
            return Source(path, problem="not a regular file")
        there = filesystem.get_file_info(place)
        if there.type != pafs.FileType.File:
            return Source(path, problem="no such file")
        if there.size == 0:
            return Source(path, problem="empty file")
        version = f"{there.size}-{there.mtime_ns}"
        if (path, version) in known:
            return Source(path, known[path, version], version)
        digest = hashlib.sha256()
        with filesystem.open_input_stream(place) as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except FileNotFoundError:
        return Source(path, problem="link to nowhere" if os.path.islink(path) else "no such file")
    except OSError as error:
        return Source(path, problem=f"cannot be read: {error.strerror or storage.one_line(error)}")
    return Source(path, digest.hexdigest()[:16], version)


def _walk(folder: str) -> Iterator[str]:
    """All files below a folder, through links to folders too, no folder twice."""
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
        lines = [line.strip() for line in storage.read_bytes(file).decode().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a list of paths: {storage.one_line(error)}") from None
    names = [line for line in lines if line and not line.startswith("#")]
    folder = posixpath.dirname(file)
    return [_named_in(folder, name) for name in names]


def _named_in(folder: str, name: str) -> str:
    if storage.is_remote(name) or name.startswith(("/", "~")):
        return storage.absolute(name)
    return f"{folder}/{name}" if storage.is_remote(folder) else os.path.abspath(os.path.join(folder, name))
