"""Parts of `make gpu`. On a GPU they run at SD1.5 size with random weights, on a CPU at mini size with few steps."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks import animation, sd15, training
from tests.benchmarks.timing import Row, peak_bytes, seconds, tensor_bytes
from tests.gpu.jobs import run_jobs
from tests.gpu.utilization import Utilization

PRETRAINED = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")


class Reporter:
    """Appends rows to the file of results, so that a part that is stopped keeps what it has measured."""

    def __init__(self, part: str, results: Path):
        self._part, self._results = part, results

    def add(self, what: str, value: str, note: str = "") -> None:
        row = {"part": self._part, "what": what, "value": value, "note": note}
        print(f"{self._part}: {what}: {value} {note}", flush=True)
        with self._results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, rows: list[Row]) -> None:
        for row in rows:
            self.add(row.what, row.value, row.note)


@dataclass(frozen=True)
class Part:
    run: Callable[[str, Reporter], None]
    share: float
    """Time limit as a fraction of all minutes."""


def load(device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Pretrained models: of SD1.5 size with random weights on a GPU, mini in float32 on a CPU."""
    from tcan.weights import load_pretrained

    if device == "cuda":
        torch.manual_seed(0)
        return sd15.random_pretrained("cuda", dtype)
    return load_pretrained(**dict.fromkeys(PRETRAINED, "mini"))


def parity(device: str, report: Reporter) -> None:
    """(a) A mini clip on the device in each precision against float32 on the CPU."""
    from tcan.weights import load_pretrained

    frames, steps = (20, 3) if device == "cuda" else (4, 1)

    def clip(device: str, dtype: torch.dtype) -> torch.Tensor:
        models = load_pretrained(**dict.fromkeys(PRETRAINED, "mini"), device=device, dtype=dtype)
        return animation.Clip(models, frames, steps).denoise()

    expected = clip("cpu", torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        difference = (clip(device, dtype) - expected).abs()
        report.add(
            f"mini, latents on {device} in {dtype} against float32 on the CPU",
            f"max {difference.max():.1e}, mean {difference.mean():.1e}",
            f"finite: {bool(difference.isfinite().all())}",
        )


def steps(device: str, report: Reporter) -> None:
    """(c) Step times, MFU and peak memory against the estimate, against the baseline, eager against compiled."""
    from tcan.acceleration import compile_tcan, use_fast_formats
    from tcan.memory import training_memory

    models, gpu = load(device), device == "cuda"
    size = 8 * models.unet.config.sample_size
    peak = sd15.peak_matmul_flops(torch.device(device), models.unet.dtype)
    report.add("peak matmul", f"{peak / 1e12:.2f} TFLOP/s")
    for stage, batch, frames in ((1, 16, 1), (2, 1, 16)) if gpu else ((1, 1, 1),):
        what = f"stage {stage}, {batch} x {frames} frames"
        trainer, data = training.Trainer(models, stage), training.Batch(models, batch, frames)
        use_fast_formats(torch.device(device), trainer.tcan)
        operations = sd15.flops(lambda t=trainer, d=data: t.step(*d.latents()))
        used = peak_bytes(lambda t=trainer, d=data: t.gradients(*d.latents()), device)
        estimate = training_memory(trainer.tcan, stage, batch, frames, size, size).activations
        report.add(
            f"{what}: memory of the step, measured",
            f"{used / 2**30:.2f} GiB",
            f"activations estimated {estimate / 2**30:.2f} GiB",
        )
        for name in ("eager", "compiled"):
            if name == "compiled":
                compile_tcan(trainer.tcan, "inductor" if gpu else "eager")
            first = seconds(lambda t=trainer, d=data: t.step(*d.latents()), device)
            best = min(
                seconds(lambda t=trainer, d=data: t.step(*d.latents()), device)
                for _ in range(5 if gpu else 1)
            )
            report.add(
                f"{what}, {name}",
                f"{best:.3f} s per step",
                f"MFU {operations / best / peak:.0%}, first step {first:.1f} s",
            )
        del trainer, data
        if gpu:
            report.rows(training.against_baseline(models, stage, batch, frames, rounds=3))
    with torch.no_grad():
        window(device, report, models, peak)


def window(device: str, report: Reporter, models: Any, peak: float) -> None:
    """A guided denoising step of one window, eager and compiled, with and without CUDA graphs."""
    from tcan.acceleration import compile_tcan, use_fast_formats
    from tcan.temperature import temperature_map

    gpu, size = device == "cuda", 8 * models.unet.config.sample_size
    for name, options in (
        ("eager", None),
        ("compiled", {"cuda_graphs": False}),
        ("compiled, CUDA graphs", {"cuda_graphs": True}),
    ):
        if not gpu and options is not None:
            continue  # the parts of a test run together in one minute
        tcan = animation.trained_like(models)
        use_fast_formats(torch.device(device), tcan)
        pipe = animation.pipeline(models, tcan)
        frames = animation.WINDOW if gpu else 2
        poses = (
            torch.from_numpy(pipe.draw(animation.walk(frames, size), size, size)).movedim(-1, 1).to(device)
        )
        reference, timestep = pipe.encode(animation.image(size)), torch.tensor([500], device=device)
        noisy = torch.randn(1, frames, *reference.shape[1:], device=device, dtype=tcan.dtype)
        embedding, temperature = tcan.embed_pose(poses[None] / 255), temperature_map(poses)
        if options is not None:
            compile_tcan(tcan, **options)
        features = tcan.appearance(reference, timestep)

        def step() -> None:
            pipe.predict_noise(noisy, timestep, embedding, features, 7.5, temperature)  # noqa: B023

        first = seconds(step, device)
        if name == "eager":
            operations = sd15.flops(step)
        best = min(seconds(step, device) for _ in range(10 if gpu else 1))
        report.add(
            f"denoising step of a window, {name}",
            f"{1000 * best:.0f} ms",
            f"MFU {operations / best / peak:.0%}, first step {first:.1f} s",
        )


def frames(device: str, report: Reporter) -> None:
    """(d) Frames/s of decoding a video, of the pose network and of the VAE, and the time in which the GPU is idle."""
    from pipelines.preprocess.latents import EncodedFrames
    from tcan.pose import OpenPose
    from tcan.weights import load_pose_detector

    gpu = device == "cuda"
    models, size, count = load(device), 512 if gpu else 128, 64 if gpu else 4
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    detector = OpenPose(sd15.openpose(), device=device) if gpu else load_pose_detector("mini", device)
    pipe = animation.pipeline(models, animation.trained_like(models))
    latents = torch.randn(count, models.vae.config.latent_channels, size // 8, size // 8)
    for what, run in (
        ("pose detection", lambda: detector.detect(images)),
        ("VAE encoding", lambda: EncodedFrames(models.vae, images, 16).numpy()),
        ("VAE decoding", lambda: list(pipe.decode(latents))),
    ):
        run()
        with Utilization(device) as utilization:
            began = time.perf_counter()
            run()
            elapsed = time.perf_counter() - began
        report.add(what, f"{count / elapsed:.1f} frames/s", f"GPU idle {utilization.idle}")


def small_card(device: str, report: Reporter) -> None:
    """(e) Training and animation in 24 GB, with the options that `tcan memory` lists for such a card."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * 2**30 / total))
    models = load(device)
    for stage, batch, frames in ((1, 8, 1), (2, 1, 16)) if device == "cuda" else ((2, 1, 2),):
        trainer, data = (
            training.Trainer(models, stage, checkpointing=True),
            training.Batch(models, batch, frames),
        )
        trainer.step(*data.latents())
        used = peak_bytes(lambda t=trainer, d=data: t.step(*d.latents()), trainer.device)
        static = tensor_bytes(trainer.tcan, trainer.optimizer)
        report.add(
            f"24 GB: stage {stage}, {batch} x {frames} frames, gradient checkpointing",
            f"{(used + static) / 2**30:.1f} GiB",
        )
        del trainer, data
    clip = animation.Clip(models, 16 if device == "cuda" else 2, 1)
    list(clip.ours.decode(clip.denoise(), 1))
    report.add("24 GB: animation", "finished")


PARTS = {
    "steps": Part(steps, 0.4),
    "parity": Part(parity, 0.15),
    "jobs": Part(lambda device, report: run_jobs(device, report), 0.6),
    "small_card": Part(small_card, 0.2),
    "frames": Part(frames, 0.2),
}
"""The most valuable first. The limits add up to more than 1: a part that ends early leaves its time to the others."""
