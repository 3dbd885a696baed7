"""Addresses of Ray clusters. Each connection is made in a new process, because this one may be connected already."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cluster import _probe
from tcan.errors import UserError
from tests.pipelines.test_tracking import free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("garbage", "RAY_ADDRESS = garbage: not an address; set HOST:6379"),
        ("http://head:8265/x", "RAY_ADDRESS = http://head:8265/x: not an address; set HOST:6379"),
        ("head:6379x", "RAY_ADDRESS = head:6379x: not an address; set HOST:6379"),
        ("127.0.0.1:99999", "RAY_ADDRESS = 127.0.0.1:99999: no Ray cluster responds"),
        (
            "127.0.0.1:{free}",
            "no Ray cluster responds ([Errno 111] Connection refused); set HOST:6379",
        ),
        (
            "ray://127.0.0.1:{free}",
            "no Ray cluster responds ([Errno 111] Connection refused); set HOST:6379",
        ),
        ("no-such-host.invalid:6379", "RAY_ADDRESS = no-such-host.invalid:6379: no Ray cluster responds"),
    ],
)
def test_address_without_a_cluster_is_a_user_error(address: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        _probe(address.replace("{free}", str(free_port())))
    assert message in str(error.value)


LOCAL = """
import json, os, ray, sys
from pipelines.cluster import connect, disconnect, is_local
os.environ.pop("RAY_ADDRESS", None)
connect()
@ray.remote
def address():
    from ray._private.services import canonicalize_bootstrap_address_or_die
    return canonicalize_bootstrap_address_or_die(None)  # as Ray's state API does in Ray Train's monitor
found = ray.get(address.remote())
print(json.dumps([is_local(), found, ray.get_runtime_context().gcs_address]), flush=True)
sys.stdin.read()
disconnect()
assert "RAY_ADDRESS" not in os.environ
"""


@pytest.mark.slow
def test_two_local_jobs_at_once_use_their_own_ray() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", LOCAL], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    found = []
    for job in jobs:
        assert job.stdout is not None
        found.append(json.loads(job.stdout.readline()))
    for job in jobs:
        job.communicate("", timeout=60)
        assert job.returncode == 0
    assert [is_local for is_local, _, _ in found] == [True, True]
    assert all(seen == own for _, seen, own in found)
    assert found[0][2] != found[1][2]
