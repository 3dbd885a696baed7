"""Jobs on a Ray cluster that adds nodes on demand; see `tests.infra.autoscaling`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.machines import ROOT, missing_requirement


@pytest.mark.cluster
def test_preprocess_and_animate_request_nodes_from_an_empty_cluster(tmp_path: Path) -> None:
    if reason := missing_requirement():
        pytest.skip(reason)
    namespaces = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    start = f"ip link set lo up && exec {sys.executable} -m tests.infra.autoscaling {tmp_path}"
    # conftest hides GPUs, which Ray's simulated GPU node takes for an error.
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    result = subprocess.run(
        [*namespaces, "sh", "-c", start],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "a GPU node was added" in result.stdout
