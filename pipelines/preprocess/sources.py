"""Stage 1, list: what the user names -> the files to preprocess, each with the id of its content."""

import glob
import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tcan.errors import UserError

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
)


@dataclass(frozen=True)
class Source:
    """A file: where it lies, and the id of its content or the reason why it could not be read."""

    path: str
    video_id: str | None = None
    problem: str | None = None


def list_sources(videos: str) -> list[str]:
    """Absolute paths, sorted, each once.

    videos: a folder (searched with all its subfolders for files named as videos), a text file (`.txt`) with a path a
    line (relative ones from the file's folder; empty lines and lines that begin with # don't count), any other file, or
    a glob pattern (`**` for any subfolders). What a list or a pattern names counts whatever its suffix.

    Raises:
        UserError: there is no such thing, or no video in it.
    """
    path = os.path.abspath(os.path.expanduser(videos))
    if os.path.isdir(path):
        found = [file for file in _walk(path) if os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES]
        if not found:
            raise UserError(f"{videos}: no videos in this folder (looked for {' '.join(VIDEO_SUFFIXES)})")
    elif os.path.lexists(path) and path.lower().endswith(".txt"):
        found = _read_list(Path(path))
        if not found:
            raise UserError(f"{videos}: this list names no videos; give it a path a line")
    elif os.path.lexists(path):
        found = [path]
    elif glob.has_magic(path):
        found = [file for file in glob.glob(path, recursive=True) if not os.path.isdir(file)]
        if not found:
            raise UserError(
                f"{videos}: no file matches this pattern; quote it, so that the shell leaves it alone"
            )
    else:
        raise UserError(
            f"{videos}: no such file or folder; give a folder of videos, a pattern, a video or a list (.txt)"
        )
    return sorted(set(found))


def identify(paths: list[str]) -> list[Source]:
    """The sources with their content's ids; the files are read in threads, since hashing gives the GIL away."""
    with ThreadPoolExecutor(max_workers=max(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(_identify, paths))


def _identify(path: str) -> Source:
    try:
        # A pipe or a device would be waited for without end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return Source(path, problem="not a regular file")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if file.tell() == 0:
                return Source(path, problem="empty file")
    except FileNotFoundError:
        return Source(path, problem="link to nowhere" if os.path.islink(path) else "no such file")
    except OSError as error:
        return Source(path, problem=f"cannot be read: {error.strerror}")
    return Source(path, video_id=digest[:16])


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


def _read_list(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a list of paths: {error}") from None
    names = [os.path.expanduser(line) for line in lines if line and not line.startswith("#")]
    return [os.path.abspath(os.path.join(file.parent, name)) for name in names]
