"""Records for MLflow wait in a local append-only file until they are delivered, so that no job waits for MLflow.

One thread delivers the records in order. It retries a record until it is accepted, or rejected for good. The file is emptied
whenever all records are delivered. After a crash all records of the file are delivered again, so delivering a record twice
must have the same effect as delivering it once.
"""

import fcntl
import itertools
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tcan.errors import UserError

SUFFIX = ".spool"
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.5, 10.0
MAX_BATCH = 50  # records per delivery
JOIN_SECONDS = 5  # for a delivery in progress

Record = dict[str, Any]


class Rejected(Exception):
    """The store will never accept this record."""


class InUse(UserError):
    """Another process uses a spool file."""


class Spool:
    """The spool file of one run.

    The file starts with a header, which `read_header` returns; then there is one JSON object per line.
    """

    def __init__(self, path: Path, header: Record, deliver: Callable[[Sequence[Record]], int]) -> None:
        """Open or create the file, and start to deliver its records.

        Args:
            deliver: delivers the first records of the sequence and returns their number (>= 1). Raises `Rejected`, or any
                other exception if the delivery should be retried; the exceptions concern the first record only.

        Raises:
            InUse: another process uses the file.
            OSError: the file cannot be written.
        """
        self.path = path
        self._deliver = deliver
        self._file = _open(path)
        self._changed = threading.Condition()
        self._pending = self._recover(header)  # lengths of the records that are not delivered
        self._closing = self._closed = self._retry_now = False
        self._failures = 0
        self.error: str | None = None
        """Reason of the last failed delivery; None after a successful one."""
        self.rejections: list[str] = []
        """Reasons of the rejected records."""
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def _recover(self, header: Record) -> deque[int]:
        """Write the header of a new file, or drop an incomplete last line; returns the lengths of the records."""
        with open(self.path, "rb") as file:
            complete = [len(line) for line in file if line.endswith(b"\n")]
        self._end = sum(complete)
        os.truncate(self._file, self._end)
        if not complete:
            complete = [self._write(json.dumps(header).encode() + b"\n")]
        self._start = self._position = complete[0]  # position: of the first record that is not delivered
        return deque(complete[1:])

    def _write(self, line: bytes) -> int:
        written = 0
        try:
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
        except OSError:
            os.truncate(self._file, self._end)  # no partial line on a full disk
            raise
        self._end += len(line)
        return len(line)

    def append(self, record: Record) -> None:
        """Store a record.

        Raises:
            OSError: the disk is full.
        """
        with self._changed:
            self._pending.append(self._write(json.dumps(record).encode() + b"\n"))
            self._changed.notify_all()

    def sync(self) -> None:
        """Wait until all stored records are on the disk."""
        os.fsync(self._file)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if self._closing:
                    return
                lengths = list(itertools.islice(self._pending, MAX_BATCH))
                lines = os.pread(self._file, sum(lengths), self._position).splitlines()
            rejection = None
            try:
                done = self._deliver([json.loads(line) for line in lines])
            except Rejected as error:
                done, rejection = 1, str(error)
            except Exception as error:  # of MLflow, its database driver, its artifact store, the network
                self._wait_after(error)
                continue
            with self._changed:
                if self._closed:
                    return
                self.error, self._failures = None, 0
                if rejection:
                    self.rejections.append(rejection)
                self._position += sum(self._pending.popleft() for _ in range(done))
                if not self._pending:
                    os.truncate(self._file, self._start)
                    self._position = self._end = self._start
                self._changed.notify_all()

    def _wait_after(self, error: Exception) -> None:
        with self._changed:
            self.error = " ".join(str(error).split())[:300] or type(error).__name__
            self._failures += 1
            self._changed.notify_all()
            seconds = min(MAX_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** (self._failures - 1))
            self._changed.wait_for(lambda: self._closing or self._retry_now, seconds)
            self._retry_now = False

    def drain(self, failures: int, seconds: float = 0) -> int:
        """Wait until all records are delivered, or until a record has failed this often in a row after this time.

        Returns:
            the number of records that are not delivered.
        """
        with self._changed:
            self._failures, self._retry_now = 0, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._pending, seconds)
            self._changed.wait_for(lambda: not self._pending or self._failures >= failures)
            self._retry_now = False
            return len(self._pending)

    def close(self) -> None:
        """Stop to deliver. The file is deleted if it has no records."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(JOIN_SECONDS)
        with self._changed:
            self._closed = True
            if not self._pending:
                self.path.unlink(missing_ok=True)
            os.close(self._file)


def read_header(path: Path) -> Record:
    """The header of a spool file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return json.loads(file.readline())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete the file to discard its records") from None


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise InUse(f"{path}: a running job delivers these records; wait for its end") from None
    return file
