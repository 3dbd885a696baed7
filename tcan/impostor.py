"""Files that were saved in the place of others: Git LFS pointers, HTML pages, JSON messages."""

from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
HTML = (b"<!doctype html", b"<html")


def impostor(path: Path, expected: str = "a weights file") -> str | None:
    """What a file is instead of the expected kind, and what to do, for an error message; None: neither of the known cases."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if start.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the file itself; run git lfs pull, or download the file"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(HTML):
        return f"an HTML page, not {expected}; download the file itself, not its web page"
    # A safetensors file may begin with this byte, too: that of a number of 8 bytes, of which the last ones are 0.
    if path.suffix != ".json" and start.startswith(b"{") and b"\0" not in start:
        return f"a JSON text, not {expected}, perhaps a server's error message; read it, and download the file again"
    return None
