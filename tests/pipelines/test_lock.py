"""Locks of output folders, locally and in buckets on local servers. Owners are killed processes."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines import lock, storage
from pipelines.lock import locked
from tcan.errors import UserError

OWNER = """
import sys, time
from pipelines import lock
lock.HEARTBEAT_SECONDS = 1.0
with lock.locked(sys.argv[1], "train"):
    print("locked", flush=True)
    time.sleep(600)
"""


def start_owner(folder: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", OWNER, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_second_job_is_refused_and_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    owner = start_owner(str(folder))
    with (
        pytest.raises(
            UserError, match=rf"{folder}: another train job is writing here \(process {owner.pid} on .*\); "
        ),
        locked(folder, "train"),
    ):
        pass
    owner.kill()
    owner.wait()
    with locked(folder, "train"), locked(folder, "other", ".other.lock"):
        pass
    assert not list(folder.iterdir())


def test_only_one_of_many_local_jobs_gets_the_lock(tmp_path: Path) -> None:
    """The lock file is deleted at each release, which must not let two jobs in."""
    inside, most, entered = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, entered
        for _ in range(100):
            try:
                with locked(tmp_path, "train"):
                    with guard:
                        inside, entered = inside + 1, entered + 1
                        most = max(most, inside)
                    time.sleep(0.0005)
                    with guard:
                        inside -= 1
            except UserError:
                continue

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and entered > 10


def test_bucket_lock_refuses_a_second_job_and_expires_after_a_kill(
    any_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 1.0)
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 4.0)
    folder = f"{any_bucket}/locked/run"
    owner = start_owner(folder)
    with (
        pytest.raises(UserError, match=f"another train job is writing here .process {owner.pid}"),
        locked(folder, "train"),
    ):
        pass
    owner.kill()
    owner.wait()
    assert storage.list_files(folder, recursive=True)  # its claim
    with locked(folder, "train"):
        assert len(storage.list_files(folder, recursive=True)) == 1
    assert not storage.list_files(folder, recursive=True)


def test_only_one_of_jobs_that_start_together_locks_a_bucket(
    any_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 1.0)
    outcomes: list[str] = []
    finish = threading.Event()

    def work() -> None:
        try:
            with locked(f"{any_bucket}/race", "train"):
                outcomes.append("locked")
                finish.wait(60)
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(outcomes) < len(threads):
        time.sleep(0.05)
    finish.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) in (["locked", "refused", "refused"], ["refused"] * 3)
