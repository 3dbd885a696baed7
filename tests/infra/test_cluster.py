"""Preprocessing and training on a Ray cluster of several machines without a shared folder; see `tests.infra.cluster`."""

import os
import subprocess
import sys

import pytest

from tests.infra.machines import ROOT, missing_requirement


@pytest.mark.cluster
def test_jobs_on_machines_that_share_only_a_bucket_survive_the_loss_of_a_machine() -> None:
    if reason := missing_requirement():
        pytest.skip(reason)
    result = subprocess.run(
        ["bash", "infra/try-cluster.sh", "--quick", "--faults", "machine"],
        cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "worker-2 switched off" in result.stdout
    assert "losses equal bit for bit" in result.stdout
