"""Cache of a worker on its local disk, for clips that are read from a bucket."""

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress


class DiskCache:
    """Values in a temporary file without a name, which disappears with the process. Thread-safe.

    The file is a ring buffer: when it is full, the oldest values are overwritten.

    max_bytes: maximum size of the file.
    """

    def __init__(self, max_bytes: int):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the cache)
        self._max_bytes = max_bytes
        self._end = 0  # position of the next value
        self._values: OrderedDict[Hashable, tuple[int, int]] = (
            OrderedDict()
        )  # position and size, oldest first
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> bytes | None:
        with self._lock:
            if key not in self._values:
                return None
            position, size = self._values[key]
            return os.pread(self._file.fileno(), size, position)

    def put(self, key: Hashable, value: bytes) -> None:
        """Store a value, if it fits. A full disk is no error: the value is read from the bucket again."""
        with self._lock, suppress(OSError):
            if key in self._values or len(value) > self._max_bytes:
                return
            if self._end + len(value) > self._max_bytes:
                self._drop(self._end, self._max_bytes)
                self._end = 0
            self._drop(self._end, self._end + len(value))
            if os.pwrite(self._file.fileno(), value, self._end) == len(value):
                self._values[key] = self._end, len(value)
                self._end += len(value)

    def _drop(self, start: int, end: int) -> None:
        """Drop the values in this range of the file: the oldest ones."""
        while self._values:
            key, (position, size) = next(iter(self._values.items()))
            if position >= end or position + size <= start:
                return
            del self._values[key]
