"""How much memory a stage of training takes, without any: counted on fake tensors, of the real modules at their real size.

memory = training_memory(fake_tcan(networks, torch.bfloat16), stage=2, batch=1, frames=16, height=512, width=512)
memory.per_device(zero_stage=2, devices=8)
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tcan.model import TCAN, diffusion_loss


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one stage."""

    weights: int
    """Of all networks, frozen ones included."""
    trained: int
    """Of the weights those that the stage trains; their gradients take as much again."""
    trained_parameters: int
    """Their number."""
    mixed: bool
    """The weights have fewer than 32 bits, so the optimizer keeps a copy in 32."""
    activations: int
    """The most that forward and backward hold at a time beside weights and gradients, of the batch asked for."""

    def per_device(self, zero_stage: int, devices: int, batches: int = 1) -> dict[str, int]:
        """Bytes on each of `devices` by DeepSpeed's ZeRO (arXiv 1910.02054, section 3), by what they are for.

        batches: how many of the batch asked for a device takes at a time; activations grow with it.
        ZeRO 1 shares out the optimizer's state (AdamW's two moments, and the weights in 32 bits, which from ZeRO 1 on
        DeepSpeed keeps whatever the precision), 2 the gradients too, 3 the weights too, frozen ones included. What
        comes on top: DeepSpeed's buffers for its exchanges and, at 3, the weights of the layers at work; the
        allocator's gaps; the GPU's own context.
        """
        copy_of_weights = self.mixed or zero_stage >= 1
        bytes_of = {
            "weights": self.weights // (devices if zero_stage >= 3 else 1),
            "gradients": self.trained // (devices if zero_stage >= 2 else 1),
            "optimizer": self.trained_parameters
            * (12 if copy_of_weights else 8)
            // (devices if zero_stage >= 1 else 1),
            "activations": self.activations * batches,
        }
        return bytes_of | {"sum": sum(bytes_of.values())}


def training_memory(
    tcan: TCAN, stage: int, batch: int, frames: int, height: int, width: int
) -> TrainingMemory:
    """What training would take; nothing is computed where `tcan` is a `fake_tcan`.

    batch: of a device at a time. frames: of a clip (stage 1 takes images). height, width: in pixels.
    """
    tcan.set_stage(stage)
    tcan.train()
    trained = [parameter for parameter in tcan.parameters() if parameter.requires_grad]
    tensors = [*tcan.parameters(), *tcan.buffers()]
    with getattr(tcan.empty_prompt, "fake_mode", nullcontext()):
        activations = _step_peak(
            tcan, trained, *_inputs(tcan, batch, frames if stage == 2 else 1, height, width)
        )
    return TrainingMemory(
        weights=sum(map(_bytes, tensors)),
        trained=sum(map(_bytes, trained)),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        mixed=tcan.dtype.itemsize < 4,
        activations=activations,
    )


def fake_tcan(build: Callable[[], dict[str, Any]], dtype: torch.dtype) -> TCAN:
    """A TCAN that holds no memory, on what `build` makes (TCAN's arguments, their weights of no account).

    It is built on the meta device, then its tensors say that they are on the CPU: of meta tensors torch would compute
    attention's plain form, which no training uses.
    """
    with torch.device("meta"):
        tcan = TCAN(**build()).to(dtype)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in tcan.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(FakeTensor(mode, parameter.data, torch.device("cpu")))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = FakeTensor(mode, buffer, torch.device("cpu"))
    return tcan


def _inputs(tcan: TCAN, batch: int, frames: int, height: int, width: int) -> tuple[Tensor, ...]:
    """latents, noise, timestep, pose, reference: as `diffusion_loss` takes them."""
    channels, device = tcan.denoiser.config.in_channels, tcan.device
    latents = torch.randn(batch, frames, channels, height // 8, width // 8, device=device)
    timestep = torch.zeros(batch, dtype=torch.int64, device=device)
    pose = torch.rand(batch, frames, 3, height, width, device=device)
    return latents, torch.randn_like(latents), timestep, pose, latents[:, 0].clone()


def _step_peak(tcan: TCAN, trained: list[nn.Parameter], *inputs: Tensor) -> int:
    """Bytes at the peak of forward and backward; each gradient is dropped when it's whole, for it has its own line."""

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
    """The most bytes that tensors made within it have held at a time, on whatever device, fake ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given | self._known.keys():
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
