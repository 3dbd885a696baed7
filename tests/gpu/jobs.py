"""(b) The jobs as a user runs them: preprocess, train with a kill and a resume, animate, evaluate."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

CLIPS = {"cuda": 12, "cpu": 2}
HELD_OUT_SEED = 20_000_000


def run_jobs(device: str, report: Any) -> None:
    """Raises RuntimeError if a job fails, with the end of its output."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = 512 if device == "cuda" else 64
        render(folder / "videos", 0, CLIPS[device], 96 if device == "cuda" else 20, size)
        render(folder / "held-out", HELD_OUT_SEED, 1, 20, size)
        options = ["--tracking.folder", str(folder / "mlflow"), "--size", str(size)]
        if device == "cuda":
            write_pretrained(folder / "pretrained")
            options += ["--config", "sd15", "--pretrained.pose", "mini"]
            for part in ("vae", "unet", "controlnet", "motion_adapter", "text_encoder"):
                options += [f"--pretrained.{part}", str(folder / "pretrained")]
        job = Job(folder, options, report)
        dataset, run = str(folder / "dataset"), str(folder / "run")
        job("preprocess", [str(folder / "videos"), dataset, "--preprocess.validation_fraction", "0"])
        train = [dataset, "--out", run, "--train.workers", "1"]
        for stage, steps in ((1, 6), (2, 2)):
            train += [
                f"--train.stage{stage}.{key}"
                for key in (
                    f"steps={steps}",
                    "batch_size=2",
                    "micro_batch=1",
                    "checkpoint_every=1",
                    "sample_every=0",
                    "validate_every=0",
                )
            ]
        job(
            "train, killed after its first checkpoint", ["train", *train], kill_when=folder / "run" / "stage1"
        )
        job("train", train)
        animated = str(folder / "animated.mp4")
        image, driving = str(folder / "held-out" / "00.png"), str(folder / "held-out" / "00.mp4")
        model = ["--model", str(folder / "run" / "model"), "--animate.steps", "2"]
        job(
            "animate",
            [
                "--image",
                image,
                "--driving",
                driving,
                "--out",
                animated,
                "--character",
                str(folder / "held-out" / "00.json"),
                *model,
            ],
        )
        job(
            "evaluate",
            [str(folder / "held-out"), "--out", str(folder / "evaluation"), "--evaluate.frames", "8", *model],
        )
        metrics = json.loads((folder / "evaluation" / "evaluation.json").read_text())["metrics"]
        report.add("evaluate", f"{len(metrics)} metrics")


class Job:
    def __init__(self, folder: Path, options: list[str], report: Any):
        self._folder, self._options, self._report = folder, options, report

    def __call__(self, name: str, arguments: list[str], kill_when: Path | None = None) -> None:
        """Run `tcan NAME ARGUMENTS`; kill_when: kill the job as soon as this folder contains a checkpoint, name first."""
        command = arguments if kill_when else [name, *arguments]
        log = self._folder / "log"
        began = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.cli", *command, *self._options],
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            if kill_when:
                while process.poll() is None and not list(kill_when.glob("step_*/state.json")):
                    time.sleep(0.05)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if code != (-signal.SIGKILL if kill_when else 0):
            raise RuntimeError(f"{name}: status {code}\n{log.read_text()[-3000:]}")
        self._report.add(name, f"{time.perf_counter() - began:.0f} s", "killed" if kill_when else "")


def render(folder: Path, first_seed: int, clips: int, frames: int, size: int) -> None:
    from pipelines.demo import render

    render(folder, "dance", first_seed, clips, frames, size)


def write_pretrained(folder: Path) -> None:
    """Random networks of SD1.5 size in diffusers' layout."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests.benchmarks.sd15 import random_pretrained

    torch.manual_seed(0)
    models = random_pretrained("cuda", torch.float16)
    for name in ("vae", "unet", "controlnet", "motion_adapter"):
        getattr(models, name).save_pretrained(folder / name)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407, pad_token_id=1,
    )  # fmt: skip
    CLIPTextModel(config).half().save_pretrained(folder / "text_encoder")
