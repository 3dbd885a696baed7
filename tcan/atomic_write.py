"""Files and folders that appear under their name only when they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path in the same folder to write a file or a folder to; it is renamed to `path` at the end of the block.

    If the block raises, what it wrote is deleted and `path` is unchanged. An existing file or model folder at `path` is
    replaced. The suffix stays the same, because some writers choose the format by it.

    Raises:
        OSError: the rename failed, or the parent folder does not exist.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    try:
        yield partial
        if partial.is_dir() and path.is_dir():  # rename() replaces only empty folders
            os.replace(path, replaced)
        os.replace(partial, path)
    finally:
        for leftover in (partial, replaced):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
