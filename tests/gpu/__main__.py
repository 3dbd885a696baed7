"""`make gpu`: acceptance of the GPU path on an NVIDIA GPU, within a time limit.

python -m tests.gpu --minutes 8
python -m tests.gpu --minutes 8 --device cpu     # every part at mini size, as a test of this program

Each part runs in a process of its own with its own time limit, the most valuable part first. Results are appended to
--results as they come (one JSON object per line) and, on a GPU, to tests/benchmarks/GPU.md.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.gpu.parts import PARTS, Reporter

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "tests" / "benchmarks" / "GPU.md"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--part", choices=PARTS, help="Run one part in this process.")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no NVIDIA GPU available, nothing to run; --device cpu runs every part at mini size")
        return 0
    if arguments.part:
        PARTS[arguments.part].run(arguments.device, Reporter(arguments.part, arguments.results))
        return 0
    return run_parts(arguments.device, arguments.minutes * 60, arguments.results)


def run_parts(device: str, seconds: float, results: Path) -> int:
    """Run all parts one after the other; returns the exit status, 1 if a part has failed or ran out of time."""
    end, failures = time.monotonic() + seconds, 0
    for name, part in PARTS.items():
        limit = min(part.share * seconds, end - time.monotonic())
        status = "no time left" if limit < 5 else run_part(name, device, limit, results)
        Reporter(name, results).add("status", status)
        failures += status != "finished"
        if device == "cuda":
            write_report(results)
    return int(failures > 0)


def run_part(name: str, device: str, limit: float, results: Path) -> str:
    """Run a part in a process group of its own; returns "finished", or what went wrong."""
    command = [
        sys.executable,
        "-m",
        "tests.gpu",
        "--part",
        name,
        "--device",
        device,
        "--results",
        str(results),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "finished" if code == 0 else f"failed with status {code}"


def read_results(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def write_report(results: Path) -> None:
    lines = [
        "# make gpu",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, SD1.5 size with random weights.",
        "",
        "| part | metric | value | details |",
        "|---|---|---|---|",
        *(
            f"| {row['part']} | {row['what']} | {row['value']} | {row['note']} |"
            for row in read_results(results)
        ),
    ]
    REPORT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
