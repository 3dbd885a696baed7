"""Speed settings of a device: `torch.compile`, memory format, TF32.

Each network is one graph: a graph break raises. Timesteps, reference masks of training and temperatures are tensors, so a
network is compiled once per shape of its inputs and kind of pass (training, inference), not per timestep or window.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tcan.model import TCAN

MAX_COMPILATIONS = 64
"""Per network; beyond torch's limit of 8 a complete graph raises. A service that animates at many sizes needs more."""

TCAN_NETWORKS = {"appearance": "appearance UNet", "pose_residuals": "ControlNet", "denoise": "denoiser"}
"""Methods of `TCAN` that are compiled, and the network that each runs."""


def compile_tcan(tcan: TCAN, backend: Any = "inductor", cuda_graphs: bool = False) -> None:
    """Compile the appearance UNet, the ControlNet and the denoiser, in place, with the operations around them.

    Weights, their names and hooks of single modules stay as they are. In stage 1, a reference mask is then applied as a
    tensor (see `tcan.attention.Appearance`).

    Args:
        backend: a backend of `torch.compile`; a dict of one backend per method in `TCAN_NETWORKS`.
        cuda_graphs: record and replay CUDA graphs. Only for inference: DeepSpeed keeps references to gradients, which a
            replay would overwrite.
    """
    for method in TCAN_NETWORKS:
        chosen = backend[method] if isinstance(backend, dict) else backend
        # In a checkpointed block, the appearance UNet stores a feature. The recomputation must not store it again.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        setattr(tcan, method, _compiled(getattr(tcan, method), chosen, cuda_graphs))
    tcan.compiled = True


def compile_vae(vae: AutoencoderKL, backend: Any = "inductor", cuda_graphs: bool = False) -> None:
    """Compile the encoder and the decoder of a VAE, in place; for `backend`, see `compile_tcan` ("encoder", "decoder")."""
    for name in ("encoder", "decoder"):
        chosen = backend[name] if isinstance(backend, dict) else backend
        network = getattr(vae, name)
        network.forward = _compiled(network.forward, chosen, cuda_graphs)


def compile_for_frames(network: nn.Module, backend: Any = "inductor") -> None:
    """Compile a network of single frames, in place, once for all sizes: those of videos differ.

    torch specializes batches of one frame: a second compilation. On CPUs, its convolutions add one for 16 frames or more.
    """
    network.forward = torch.compile(network.forward, fullgraph=True, dynamic=True, backend=backend)


def _compiled(function: Callable[..., Any], backend: Any, cuda_graphs: bool) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILATIONS)
    mode = "reduce-overhead" if cuda_graphs else None
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, mode=mode)
    if not cuda_graphs:
        return compiled

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # The next replay of any graph overwrites the outputs. Copies of them take about 1 % of a denoising step and can
        # be kept: the features for all windows of a timestep, the residuals for the denoiser.
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, Tensor.clone, compiled(*args, **kwargs))

    return call


def use_fast_formats(device: torch.device, *networks: nn.Module) -> None:
    """On a GPU: channels_last for the networks, in place, and TF32 for what is computed in float32. Else: no effect.

    cuDNN's half-precision convolutions use channels_last; for other formats it converts inputs and outputs.
    """
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    for network in networks:
        network.to(memory_format=torch.channels_last)


def is_compiled(choice: bool | str, device: torch.device) -> bool:
    """Resolve a `compile` key: True, False, or "auto", which is True on a GPU."""
    return device.type == "cuda" if choice == "auto" else bool(choice)
