"""Locks that keep two jobs from writing to the same folder, table or bucket at the same time.

Local and shared folders: `flock` on a lock file. The kernel (or the file server) releases it when its owner ends, however
that happens. Buckets: each job writes a claim object and renews it. Arrow's file systems have no conditional put, so a job
first writes its claim and then lists the claims of others: of two jobs that start at the same time, at least one sees the
other one.
"""

import fcntl
import json
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from pipelines import storage
from tcan.errors import UserError

LOCK_FILE = ".lock"
HEARTBEAT_SECONDS = 10.0  # between renewals of a claim in a bucket
EXPIRY_SECONDS = 45.0  # a claim that was not renewed for so long belongs to a job that was killed
START_ATTEMPTS = 3  # of jobs that start at the same time


@contextmanager
def locked(folder: str | Path, job: str, name: str = LOCK_FILE) -> Iterator[None]:
    """Create the folder and lock it for the duration of the block. A killed owner leaves no lock behind.

    Args:
        folder: a local path or the URI of a folder in a bucket.
        job: kind of the job, for the error message.
        name: name of the lock in the folder; jobs with different names do not exclude each other.

    Raises:
        UserError: another job has the lock, or the folder cannot be written.
    """
    lock = _bucket_lock if storage.is_remote(folder) else _local_lock
    with lock(str(folder).rstrip("/"), job, name):
        yield


def _busy(folder: str, job: str, owner: str) -> UserError:
    by = f" ({owner})" if owner else ""
    return UserError(f"{folder}: another {job} job is writing here{by}; wait for it or choose another OUT")


def _owner() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


# --- local folders ---------------------------------------------------------------------------------------------------


@contextmanager
def _local_lock(folder: str, job: str, name: str) -> Iterator[None]:
    path = Path(folder) / name
    with storage.user_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(path)
    if file is None:
        with suppress(OSError):
            raise _busy(folder, job, path.read_text())
        raise _busy(folder, job, "")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: no other job can have the lock of this file
        os.close(file)


def _acquire(path: Path) -> int | None:
    """Open and lock the file; None if another process has the lock."""
    while True:
        # Opened for writing, which exclusive locks on NFS require.
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_ino == os.stat(path).st_ino:
                os.truncate(file, 0)
                os.write(file, _owner().encode())
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its last owner has just deleted the file


# --- buckets ---------------------------------------------------------------------------------------------------------


@contextmanager
def _bucket_lock(folder: str, job: str, name: str) -> Iterator[None]:
    storage.check_bucket(folder)
    for attempt in range(1, START_ATTEMPTS + 1):
        claim = _Claim(f"{folder}/{name}/{uuid.uuid4().hex}", folder)
        try:
            if not (others := _live_claims(claim.name)):
                claim.set_held()
                yield
                return
        finally:
            claim.release()
        other = _read(others[0])
        if other.get("held") or attempt == START_ATTEMPTS:
            raise _busy(folder, job, other.get("owner", ""))
        time.sleep(
            random.uniform(0.1, 1)
        )  # both of two jobs that started together have seen the other's claim


class _Claim:
    """An object in the bucket that a thread renews until `release`."""

    def __init__(self, name: str, folder: str) -> None:
        self.name, self._folder, self._held = name, folder, False
        self._released, self._writing = threading.Event(), threading.Lock()
        self._write()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    def set_held(self) -> None:
        """Mark that its job has the lock."""
        self._held = True
        self._write()

    def release(self) -> None:
        self._released.set()
        self._thread.join()  # otherwise a renewal in progress would write the claim again
        with suppress(UserError, OSError):
            storage.delete(self.name)

    def _write(self) -> None:
        with self._writing:
            storage.write(self.name, json.dumps({"owner": _owner(), "held": self._held}).encode())

    def _renew(self) -> None:
        """End this process if no renewal reached the bucket for `EXPIRY_SECONDS` and another job has started there."""
        last = time.monotonic()
        while not self._released.wait(HEARTBEAT_SECONDS):
            with suppress(UserError, OSError):
                if time.monotonic() - last > EXPIRY_SECONDS and _times(self.name).keys() - {self.name}:
                    print(
                        f"{self._folder}: no access for {EXPIRY_SECONDS:g} s; another job has started here",
                        flush=True,
                    )
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._write()
                last = time.monotonic()


def _read(claim: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read_bytes(claim))
    except (OSError, ValueError):  # just released
        return {}


def _live_claims(claim: str) -> list[str]:
    """Claims of other jobs that are still running; the other claims are deleted.

    A claim's age is the difference of two times of the server, so clocks need not agree. A claim that seems alive is
    watched until it is renewed, or until it expires.
    """
    found = _times(claim)
    now = found.pop(claim)
    deadline = time.monotonic() + EXPIRY_SECONDS
    live = {name for name, renewed in found.items() if now - renewed < EXPIRY_SECONDS}
    for name in found.keys() - live:
        storage.delete(name)
    if not live:
        return []
    while True:
        again = _times(claim)
        if renewed := [name for name in live if name in again and again[name] != found[name]]:
            return renewed
        live &= again.keys()
        if not live:
            return []
        if time.monotonic() > deadline:
            for name in live:
                storage.delete(name)
            return []
        time.sleep(min(1.0, HEARTBEAT_SECONDS / 5))


def _times(claim: str) -> dict[str, float]:
    """Time of the last renewal of each claim, in seconds, by name."""
    filesystem, path = storage.locate(claim)
    scheme = claim.partition("://")[0]
    with storage.user_errors(claim):
        found = filesystem.get_file_info(pafs.FileSelector(os.path.dirname(path), allow_not_found=True))
    return {
        f"{scheme}://{item.path}": item.mtime_ns / 1e9 for item in found if item.type == pafs.FileType.File
    }
