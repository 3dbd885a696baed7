"""Estimate the memory of a training stage, of an animation and of the preprocessing with fake tensors, on the real
modules at their real size.

The estimate allocates no tensor memory:

    memory = training_memory(fake_tcan(networks, torch.bfloat16), stage=2, batch=1, frames=16, height=512, width=512)
    memory.per_device(zero_stage=2, devices=8)
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tcan.model import TCAN, diffusion_loss
from tcan.pixels import from_vae_output, to_vae_input


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one training stage. Sizes are in bytes."""

    weights: int
    """Weights of all networks, including frozen ones."""
    trained: int
    """Trainable weights of the stage. Their gradients have the same size."""
    trained_parameters: int
    """Number of trainable parameters."""
    mixed: bool
    """Whether the weights have fewer than 32 bits, so that the optimizer stores a 32-bit copy."""
    activations: int
    """Peak of forward and backward for the requested batch, excluding weights and gradients."""

    def per_device(self, zero_stage: int, devices: int, batches: int = 1) -> dict[str, int]:
        """Return the bytes per device with DeepSpeed ZeRO (arXiv 1910.02054, section 3), by category.

        ZeRO 1 partitions the optimizer state: AdamW's two moments and the 32-bit weights, which DeepSpeed stores from
        ZeRO 1 on for every precision. ZeRO 2 also partitions the gradients. ZeRO 3 also partitions the weights,
        including frozen ones. The estimate excludes DeepSpeed's communication buffers, at ZeRO 3 the gathered weights
        of the active layers, allocator fragmentation, and the CUDA context.

        Args:
            zero_stage: 0 to 3.
            devices: number of devices.
            batches: micro-batch per device, as a multiple of the batch in `training_memory`. Activations scale with it.

        Returns:
            "weights", "gradients", "optimizer", "activations" and their "sum".
        """
        fp32_weights = self.mixed or zero_stage >= 1
        bytes_of = {
            "weights": self.weights // (devices if zero_stage >= 3 else 1),
            "gradients": self.trained // (devices if zero_stage >= 2 else 1),
            "optimizer": self.trained_parameters
            * (12 if fp32_weights else 8)
            // (devices if zero_stage >= 1 else 1),
            "activations": self.activations * batches,
        }
        return bytes_of | {"sum": sum(bytes_of.values())}


def training_memory(
    tcan: TCAN, stage: int, batch: int, frames: int, height: int, width: int
) -> TrainingMemory:
    """Return the memory of one training step. With a `fake_tcan`, nothing is computed.

    Args:
        tcan: a TCAN or a `fake_tcan`. This function sets its stage.
        stage: 1 or 2.
        batch: micro-batch per device.
        frames: frames per clip; ignored in stage 1, which trains on images.
        height, width: in pixels.
    """
    tcan.set_stage(stage)
    tcan.train()
    trained = [parameter for parameter in tcan.parameters() if parameter.requires_grad]
    with getattr(tcan.empty_prompt, "fake_mode", nullcontext()):
        activations = _step_peak(
            tcan, trained, *_inputs(tcan, batch, frames if stage == 2 else 1, height, width)
        )
    return TrainingMemory(
        weights=_weights(tcan),
        trained=sum(map(_bytes, trained)),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        mixed=tcan.dtype.itemsize < 4,
        activations=activations,
    )


def fake_tcan(build: Callable[[], dict[str, Any]], dtype: torch.dtype) -> TCAN:
    """Return a TCAN with fake tensors, which allocate no memory.

    It is built on the meta device; then its tensors report the CPU as their device. On meta tensors torch would select
    the unfused attention, which training does not use.

    Args:
        build: returns the arguments of TCAN. It runs on the meta device; the values of the weights are ignored.
        dtype: dtype of the weights.
    """
    with torch.device("meta"):
        tcan = TCAN(**build()).to(dtype)
    return to_fake(tcan, torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True))


@dataclass(frozen=True)
class InferenceMemory:
    """Memory of a job without a backward pass, by phase. Sizes are in bytes."""

    weights: dict[str, int]
    """Weights of the networks of each phase."""
    activations: dict[str, int]
    """Peak of each phase, excluding weights. A phase without a value is not estimated."""

    def __or__(self, other: "InferenceMemory") -> "InferenceMemory":
        """Memory of a job with the phases of both."""
        return InferenceMemory(self.weights | other.weights, self.activations | other.activations)

    def peak(self, offload: str = "none") -> int:
        """Bytes on the device.

        offload: "none": the weights of all phases are on the device; "model": of one phase at a time; "sequential": of
        one layer at a time, whose size is neglected.
        """
        resident = {
            "none": dict.fromkeys(self.weights, sum(self.weights.values())),
            "model": self.weights,
            "sequential": dict.fromkeys(self.weights, 0),
        }[offload]
        return max(peak + resident[phase] for phase, peak in self.activations.items())


def animation_memory(
    tcan: TCAN,
    vae: AutoencoderKL,
    frames: int,
    height: int,
    width: int,
    decode_batch: int,
    guidance: bool = True,
) -> InferenceMemory:
    """Return the memory of an animation: of a denoising step of a window, and of decoding.

    Args:
        tcan, vae: networks, or fake ones (`fake_tcan`, `fake_network`).
        frames: frames per window.
        height, width: in pixels.
        decode_batch: frames that the VAE decodes at once.
        guidance: whether each step has an unconditional row.
    """
    mask = [False, True] if guidance else None

    def denoise() -> None:
        options = {"device": tcan.device, "dtype": tcan.dtype}
        noisy = torch.zeros(1, frames, tcan.denoiser.config.in_channels, height // 8, width // 8, **options)
        timestep = torch.zeros(1, dtype=torch.int64, device=tcan.device)
        features = tcan.appearance(noisy[:, 0], timestep)
        pose = tcan.embed_pose(torch.zeros(1, frames, 3, height, width, device=tcan.device))
        residuals = tcan.pose_residuals(noisy, timestep, pose)
        temperature = torch.zeros(height, width, device=tcan.device)
        tcan.denoise(noisy, timestep, residuals, features, mask, temperature)

    def decode() -> None:
        shape = (decode_batch, vae.config.latent_channels, height // 8, width // 8)
        from_vae_output(vae.decode(torch.zeros(shape, device=vae.device, dtype=vae.dtype)).sample)

    return InferenceMemory(
        weights={"denoising": _weights(tcan), "decoding": _weights(vae)},
        activations={"denoising": _forward_peak(denoise, tcan), "decoding": _forward_peak(decode, vae)},
    )


def encoding_memory(vae: AutoencoderKL, batch_frames: int, height: int, width: int) -> InferenceMemory:
    """Return the memory of VAE encoding.

    Args:
        vae: a network, or a fake one.
        batch_frames: frames per batch.
        height, width: in pixels.
    """

    def encode() -> None:
        frames = torch.zeros(batch_frames, height, width, 3, dtype=torch.uint8, device=vae.device)
        vae.encode(to_vae_input(frames, vae.dtype))

    return InferenceMemory({"VAE": _weights(vae)}, {"VAE": _forward_peak(encode, vae)})


def detection_memory(
    name: str, network: nn.Module, batch: int, height: int, width: int, input_height: float
) -> InferenceMemory:
    """Return the memory of a pose network, without its decoding.

    Args:
        name: of the phase.
        network: a network, or a fake one.
        batch: images per batch.
        height, width: of the images in pixels.
        input_height: to which they are resized; see `tcan.pose.OpenPose`.
    """
    side = [-(-round(x * input_height / height) // 8) * 8 for x in (height, width)]

    def detect() -> None:
        network(torch.zeros(batch, 3, *side, device=next(network.parameters()).device))

    return InferenceMemory({name: _weights(network)}, {name: _forward_peak(detect, network)})


def _weights(network: nn.Module) -> int:
    return sum(map(_bytes, [*network.parameters(), *network.buffers()]))


@torch.no_grad()
def _forward_peak(run: Callable[[], None], network: nn.Module) -> int:
    """Peak bytes of tensors that `run` creates on the device of a network, fake or not."""
    with getattr(next(network.parameters()), "fake_mode", nullcontext()), PeakMemory() as memory:
        run()
    return memory.peak


def fake_network(build: Callable[[], nn.Module], dtype: torch.dtype) -> Any:
    """Return a network in eval mode with fake tensors, as `fake_tcan` does for a TCAN."""
    with torch.device("meta"):
        network = build().to(dtype).requires_grad_(False).eval()
    return to_fake(network, torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True))


def to_fake(module: nn.Module, device: torch.device, mode: FakeTensorMode) -> Any:
    """Replace the parameters and buffers of a module on the meta device by fake tensors on `device`, in place."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            child._parameters[name] = nn.Parameter(
                FakeTensor(mode, parameter.data, device), parameter.requires_grad
            )
        for name, buffer in child.named_buffers(recurse=False):
            child._buffers[name] = FakeTensor(mode, buffer, device)
    return module


def _inputs(tcan: TCAN, batch: int, frames: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Return latents, noise, timestep, pose and reference latent for `diffusion_loss`."""
    channels, device = tcan.denoiser.config.in_channels, tcan.device
    latents = torch.randn(batch, frames, channels, height // 8, width // 8, device=device)
    timestep = torch.zeros(batch, dtype=torch.int64, device=device)
    pose = torch.rand(batch, frames, 3, height, width, device=device)
    return latents, torch.randn_like(latents), timestep, pose, latents[:, 0].clone()


def _step_peak(tcan: TCAN, trained: list[nn.Parameter], *inputs: Tensor) -> int:
    """Return the peak bytes of forward and backward. Each gradient is freed once it is complete: gradients are counted
    separately.
    """

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(drop) for parameter in trained]
    try:
        with PeakMemory() as memory:
            diffusion_loss(tcan, DDIMScheduler(), *inputs).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return memory.peak


class PeakMemory(TorchDispatchMode):
    """Context manager that records the peak bytes of tensors created inside it, on any device, including fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in inputs | self._known.keys():
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def free(_: weakref.ref) -> None:
            del self._known[key]
            self.alive -= size

        self._known[key] = weakref.ref(storage, free)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
