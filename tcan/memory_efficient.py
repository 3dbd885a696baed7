"""Modules that save fewer activations for the backward pass than the torch modules and compute the same results."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


def make_memory_efficient(network: nn.Module) -> None:
    """Convert a network's convolutions, GEGLU layers and residual blocks, in place.

    The converted modules save only the activations that their gradients require. Under `torch.autocast` they run as the
    torch modules do, because autocast does not cast the inputs of custom autograd functions; under `torch.compile` too,
    because the compiler chooses itself what to save and what to recompute.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            module.__class__ = Convolution
        elif type(module) is GEGLU:
            module.__class__ = GatedLinear
        elif type(module) is ResnetBlock2D and type(module.nonlinearity) is nn.SiLU:
            # Fuse each SiLU of the block into its adjacent module.
            module.norm1.__class__ = module.norm2.__class__ = NormSiLU
            if module.time_emb_proj is not None and not module.skip_time_act:
                module.time_emb_proj.__class__ = SiLULinear
            module.nonlinearity = nn.Identity()


class Convolution(nn.Conv2d):
    """Conv2d that does not save its input when the weight is frozen; torch saves it in any case."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        saves_input = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
        if saves_input and not _uses_torch_module(x):
            return _FrozenConvolution.apply(
                x, weight, bias, self.stride, self.padding, self.dilation, self.groups
            )
        return super()._conv_forward(x, weight, bias)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, options
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return torch.nn.grad.conv2d_input(ctx.shape, weight, gradient, *ctx.options), *[None] * 6


class GatedLinear(GEGLU):
    """GEGLU, a * gelu(b) for the two chunks a, b of one projection. gelu(b) is recomputed in the backward pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if _uses_torch_module(hidden_states):
            return super().forward(hidden_states)
        return _Gate.apply(self.proj(hidden_states))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        a, b = projected.chunk(2, dim=-1)
        return F.gelu(b).mul_(a)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        a, b = projected.chunk(2, dim=-1)
        grad_projected = torch.empty_like(projected)
        grad_a, grad_b = grad_projected.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(b), out=grad_a)
        grad_b.copy_(torch.ops.aten.gelu_backward(gradient * a, b))
        return grad_projected


class SiLULinear(nn.Linear):
    """Linear layer applied to the SiLU of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.silu(x))


class NormSiLU(nn.GroupNorm):
    """GroupNorm followed by SiLU. The output of the GroupNorm is recomputed in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if _uses_torch_module(x):
            return F.silu(super().forward(x))
        return _NormSiLU.apply(x, self.weight, self.bias, self.num_groups, self.eps)


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.options = groups, eps
        return F.silu(F.group_norm(x, groups, weight, bias, eps), inplace=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        groups, eps = ctx.options
        sizes = len(x), x.shape[1], x[0, 0].numel(), groups
        x = x.contiguous()
        normed, mean, inverse_std = torch.ops.aten.native_group_norm(x, weight, bias, *sizes, eps)
        gradient = torch.ops.aten.silu_backward(gradient, normed).contiguous()
        needed = list(ctx.needs_input_grad[:3])
        return (
            *torch.ops.aten.native_group_norm_backward(
                gradient, x, mean, inverse_std, weight, *sizes, needed
            ),
            None,
            None,
        )


def _uses_torch_module(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
