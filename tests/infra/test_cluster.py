"""All jobs on a Ray cluster of several machines without a shared folder."""

import os
import re
import subprocess
import sys

import pytest

from tests.infra.machines import ROOT, missing_requirement


@pytest.mark.slow
def test_jobs_on_machines_that_share_only_a_bucket_survive_the_loss_of_a_machine() -> None:
    if reason := missing_requirement():
        pytest.skip(reason)
    environment = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run(
        ["bash", "infra/try-cluster.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"worker-2 switched off after step \d+", result.stdout)
    assert result.stdout.count("losses equal bit for bit") == 2
