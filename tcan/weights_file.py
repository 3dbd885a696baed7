"""Files that were saved in the place of weights: Git LFS pointers, HTML pages, JSON messages."""

from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
HTML = (b"<!doctype html", b"<html")


def impostor(path: Path) -> str | None:
    """What a file is instead of weights, and what to do, for an error message; None: neither of the known cases."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if start.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the file itself; run git lfs pull, or download the file"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(HTML):
        return "an HTML page, not a weights file; download the file itself, not its web page"
    # A safetensors file may begin with this byte, too: that of a number of 8 bytes, of which the last ones are 0.
    if path.suffix != ".json" and start.startswith(b"{") and b"\0" not in start:
        return "a JSON text, not a weights file, perhaps a server's error message; read it, and download the file again"
    return None
