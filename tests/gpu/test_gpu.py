"""`make gpu` on a machine without a GPU, and its parts at mini size on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.__main__ import read_results, run_part
from tests.gpu.parts import PARTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires a machine without a GPU")
def test_without_a_gpu_it_says_so_and_succeeds() -> None:
    output = subprocess.run([sys.executable, "-m", "tests.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert output.returncode == 0 and output.stdout.startswith("no NVIDIA GPU available")


def test_part_that_exceeds_its_limit_is_stopped_and_the_failure_reported(tmp_path: Path) -> None:
    assert run_part("parity", "cpu", 0.5, tmp_path / "results.jsonl") == "stopped after 0 s"


@pytest.mark.parametrize(
    "part",
    [pytest.param(name, marks=pytest.mark.cluster if name == "jobs" else pytest.mark.slow) for name in PARTS],
)
def test_every_part_runs_at_mini_size_on_the_cpu(part: str, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert run_part(part, "cpu", 900, results) == "finished"
    assert {row["part"] for row in read_results(results)} == {part}
