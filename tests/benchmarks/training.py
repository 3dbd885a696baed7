"""Training steps against the baseline: samples/s, peak memory, and the cost of gradient checkpointing."""

from collections.abc import Callable

import torch
from torch import Tensor

from tcan.memory import training_memory
from tcan.model import TCAN, diffusion_loss
from tcan.weights import PretrainedModels
from tests.benchmarks import baseline
from tests.benchmarks.timing import Row, peak_bytes, ratio, seconds, side_by_side, tensor_bytes


class Trainer:
    """Training step of one worker: batch -> loss -> gradients -> AdamW."""

    def __init__(
        self,
        pretrained: PretrainedModels,
        stage: int,
        *,
        checkpointing: bool = False,
        full_unet: bool = False,
    ):
        torch.manual_seed(0)
        self.pretrained = pretrained
        self.tcan = TCAN(
            pretrained.unet, pretrained.controlnet, pretrained.motion_adapter, pretrained.empty_prompt
        )
        if full_unet:
            baseline.with_full_appearance_unet(self.tcan, pretrained.unet)
        if checkpointing:
            self.tcan.enable_gradient_checkpointing()
        self.tcan.to(pretrained.empty_prompt).set_stage(stage)  # device and dtype
        self.tcan.train()
        self.device = self.tcan.device.type
        trained = [parameter for parameter in self.tcan.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def gradients(self, latents: Tensor, reference: Tensor, pose: Tensor) -> None:
        timestep = torch.full((len(latents),), 500, device=latents.device)
        noise = torch.randn_like(latents)
        diffusion_loss(
            self.tcan, self.pretrained.scheduler, latents, noise, timestep, pose, reference
        ).backward()

    def step(self, latents: Tensor, reference: Tensor, pose: Tensor) -> None:
        self.gradients(latents, reference, pose)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Batch:
    """Random images, and random latents (mean and standard deviation, as in a clip dataset) of the same shape."""

    def __init__(self, pretrained: PretrainedModels, batch: int, frames: int):
        size, device = 8 * pretrained.unet.config.sample_size, pretrained.unet.device
        self.clips, self.vae = (batch, frames), pretrained.vae
        self.pixels = (
            torch.rand(batch, frames, 3, size, size, device=device, dtype=pretrained.unet.dtype) * 2 - 1
        )
        self.pose = torch.rand(batch, frames, 3, size, size, device=device)
        self.mean = torch.randn(
            batch, frames, pretrained.unet.config.in_channels, size // 8, size // 8, device=device
        )
        self.deviation = torch.rand_like(self.mean)

    def latents(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `Trainer.step`: latents, reference, pose."""
        return self.mean + self.deviation * torch.randn_like(self.mean), self.mean[:, 0], self.pose

    @torch.no_grad()
    def encoded(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, encoded from the images: the VAE runs in the training loop."""
        latents = self.vae.encode(self.pixels.flatten(0, 1)).latent_dist.sample().unflatten(0, self.clips)
        reference = self.vae.encode(self.pixels[:, 0]).latent_dist.mean
        return latents.float(), reference.float(), self.pose


def steps(
    pretrained: PretrainedModels, stage: int, batch: int, frames: int
) -> dict[str, tuple[Trainer, Callable[[], None]]]:
    """Trainer and step function by name."""
    data = Batch(pretrained, batch, frames)

    def from_pixels(trainer: Trainer) -> None:
        with baseline.unfused_attention():
            trainer.step(*data.encoded())

    def from_latents(trainer: Trainer) -> None:
        trainer.step(*data.latents())

    trainers = {
        "baseline": Trainer(pretrained, stage, full_unet=True),
        "ours": Trainer(pretrained, stage),
        "checkpointing": Trainer(pretrained, stage, checkpointing=True),
    }
    return {
        name: (t, (lambda t=t: from_pixels(t)) if name == "baseline" else (lambda t=t: from_latents(t)))
        for name, t in trainers.items()
    }


def against_baseline(
    pretrained: PretrainedModels, stage: int, batch: int, frames: int, rounds: int
) -> list[Row]:
    """Speed and peak memory of a step with `batch` clips of `frames` frames."""
    sides = steps(pretrained, stage, batch, frames)
    device = sides["ours"][0].device
    times = side_by_side({name: run for name, (_, run) in sides.items()}, rounds, device)
    static, peak = {}, {}
    for name, (trainer, run) in sides.items():
        peak[name] = peak_bytes(run, device)
        static[name] = tensor_bytes(trainer.tcan, trainer.optimizer) + (name == "baseline") * tensor_bytes(
            pretrained.vae
        )
    total = {name: static[name] + peak[name] for name in sides}
    what = f"stage {stage}, {batch} x {frames} frames"
    speedup, cost = ratio(times, "baseline", "ours"), ratio(times, "checkpointing", "ours")

    def mebibytes(name: str) -> str:
        return f"{total[name] / 2**20:.0f} MiB, {peak[name] / 2**20:.0f} of them during the step"

    return [
        Row(f"{what}: samples/s relative to the baseline", str(speedup), speedup.spread),
        Row(f"{what}: peak memory relative to the baseline", f"{total['ours'] / total['baseline']:.2f}",
            f"{mebibytes('ours')}; baseline {mebibytes('baseline')}"),
        Row(f"{what}, gradient checkpointing: time relative to without", str(cost), cost.spread),
        Row(f"{what}, gradient checkpointing: peak memory relative to without",
            f"{total['checkpointing'] / total['ours']:.2f}", mebibytes("checkpointing")),
    ]  # fmt: skip


def sequential(pretrained: PretrainedModels, stage: int, batch: int, frames: int) -> list[Row]:
    """Loss and gradients of one step, one alternative after the other, for models that do not fit into memory together.
    The optimizer step, which is the same for both, is excluded."""
    data, time, total = Batch(pretrained, batch, frames), {}, {}
    for name in ("baseline", "ours"):
        trainer = Trainer(pretrained, stage, full_unet=name == "baseline")

        def run(trainer: Trainer = trainer, name: str = name) -> None:
            if name == "ours":
                trainer.gradients(*data.latents())
            else:
                with baseline.unfused_attention():
                    trainer.gradients(*data.encoded())

        total[name] = peak_bytes(run, trainer.device)
        for parameter in trainer.tcan.parameters():
            parameter.grad = None
        time[name] = seconds(run, trainer.device)
        total[name] += tensor_bytes(trainer.tcan) + (name == "baseline") * tensor_bytes(pretrained.vae)
    what = f"stage {stage}, {batch} x {frames} frames, without the optimizer"
    gibibytes = (
        f"{total['ours'] / 2**30:.1f} GiB, gradients included; baseline {total['baseline'] / 2**30:.1f} GiB"
    )
    return [
        Row(f"{what}: samples/s relative to the baseline", f"{time['baseline'] / time['ours']:.2f}", "one round"),
        Row(f"{what}: peak memory relative to the baseline", f"{total['ours'] / total['baseline']:.2f}", gibibytes),
    ]  # fmt: skip


def estimated_memory(pretrained: PretrainedModels, stage: int, batch: int, frames: int) -> list[Row]:
    """Activation memory estimated by `tcan memory`, relative to the measured peak."""
    trainer, data = Trainer(pretrained, stage), Batch(pretrained, batch, frames)
    size = 8 * pretrained.unet.config.sample_size
    estimate = training_memory(trainer.tcan, stage, batch, frames, size, size).activations
    for parameter in trainer.tcan.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    measured = peak_bytes(lambda: trainer.gradients(*data.latents()), trainer.device)
    what = f"stage {stage}: activations estimated by `tcan memory` relative to measured"
    return [Row(what, f"{estimate / measured:.3f}", f"measured {measured / 2**20:.1f} MiB")]
