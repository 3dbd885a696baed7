"""`make gpu` on a machine without a GPU, and its first part at mini size on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.__main__ import read_results, run_part

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires a machine without a GPU")
def test_without_a_gpu_it_says_so_and_succeeds() -> None:
    output = subprocess.run([sys.executable, "-m", "tests.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert output.returncode == 0 and output.stdout.startswith("no NVIDIA GPU available")


def test_part_that_exceeds_its_limit_is_stopped_and_the_failure_reported(tmp_path: Path) -> None:
    assert run_part("parity", "cpu", 0.5, tmp_path / "results.jsonl") == "stopped after 0 s"


@pytest.mark.slow
def test_training_and_denoising_steps_run_at_mini_size_on_the_cpu(tmp_path: Path) -> None:
    """The other parts have no test: they take minutes each on a CPU (`python -m tests.gpu --device cpu`)."""
    results = tmp_path / "results.jsonl"
    assert run_part("steps", "cpu", 500, results) == "finished"
    assert read_results(results)
