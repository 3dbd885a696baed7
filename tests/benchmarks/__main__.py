"""`make bench`: ratios to named baselines, measured side by side in one run, written to RESULTS.md in this folder.

python -m tests.benchmarks [animation] [training] [sd15] [dataset]    # default: all
"""

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging

from tcan.weights import load_pretrained
from tests.benchmarks import animation, dataset, sd15, training
from tests.benchmarks.timing import Row

RESULTS = Path(__file__).parent / "RESULTS.md"
PRETRAINED = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")
NO_GPU = [Row("everything at SD1.5 size on a GPU, in bfloat16", "not run", "no NVIDIA GPU available")]


def main(names: list[str]) -> None:
    sections: dict[str, Callable[[], list[Row]]] = {
        "animation": _animation,
        "training": _training,
        "sd15": _sd15,
        "dataset": lambda: dataset.bucket(clips=100_000),
    }
    if unknown := set(names) - sections.keys():
        raise SystemExit(f"unknown section: {', '.join(unknown)}; use {', '.join(sections)}")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # migration between cores would add noise
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # no warnings about intended casts
    text = ""
    for name in names or sections:
        rows = sections[name]()
        text += "\n".join(["", f"## {name}", "", "| metric | value | details |", "|---|---|---|"])
        text += "".join(f"\n| {row.what} | {row.value} | {row.note} |" for row in rows) + "\n"
        print(text.rpartition("\n## ")[2], flush=True)
    if not names:
        RESULTS.write_text(f"# make bench\n\n{_machine()}\n{text}")


def _animation() -> list[Row]:
    pretrained = load_pretrained(**dict.fromkeys(PRETRAINED, "mini"))
    return [*animation.temperature(pretrained, rounds=30), *animation.clip(pretrained, rounds=5)]


def _training() -> list[Row]:
    pretrained = load_pretrained(**dict.fromkeys(PRETRAINED, "mini"))
    rows = []
    for stage, batch, frames in ((1, 16, 1), (2, 1, 16)):
        rows += training.against_baseline(pretrained, stage, batch, frames, rounds=5)
        rows += training.estimated_memory(pretrained, stage, batch, frames)
    return rows


def _sd15() -> list[Row]:
    rows = sd15.operation_ratio()
    if not torch.cuda.is_available():
        return rows + sd15.cpu_benchmarks() + NO_GPU
    pretrained = sd15.random_pretrained("cuda", torch.bfloat16)
    rows += sd15.gpu_benchmarks(pretrained, sd15.openpose())
    rows += [*animation.temperature(pretrained, rounds=10), *animation.clip(pretrained, rounds=3)]
    for stage, batch, frames in ((1, 2, 1), (2, 1, 16)):
        rows += training.against_baseline(pretrained, stage, batch, frames, rounds=5)
    return rows


def _machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{platform.node()}: {platform.machine()}, {os.cpu_count()} cores, {gpu}, torch {torch.__version__}. `mini` on "
        "one core, in float32, in CPU time of the process; SD1.5 size with random weights, in bfloat16. "
        "Medians of ratios measured side by side."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
