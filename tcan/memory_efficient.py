"""Modules that keep less for the backward pass than torch's own, and compute the same."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


def make_memory_efficient(network: nn.Module) -> None:
    """In place: the network's convolutions, gated feed-forwards and residual blocks keep no more than their gradients
    need."""
    for module in network.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            module.__class__ = Convolution
        elif type(module) is GEGLU:
            module.__class__ = GatedLinear
        elif type(module) is ResnetBlock2D and type(module.nonlinearity) is nn.SiLU:
            # Each of the block's activations moves into the module beside it.
            module.norm1.__class__ = module.norm2.__class__ = NormSiLU
            if module.time_emb_proj is not None and not module.skip_time_act:
                module.time_emb_proj.__class__ = SiLULinear
            module.nonlinearity = nn.Identity()


class Convolution(nn.Conv2d):
    """torch keeps a convolution's input also where its weight is frozen and nothing asks for it."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad:
            return _FrozenConvolution.apply(
                x, weight, bias, self.stride, self.padding, self.dilation, self.groups
            )
        return super()._conv_forward(x, weight, bias)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, how
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return torch.nn.grad.conv2d_input(ctx.shape, weight, gradient, *ctx.how), *[None] * 6


class GatedLinear(GEGLU):
    """a * gelu(b) of the halves of one projection: gelu(b) is computed again rather than kept."""

    def forward(self, hidden_states: Tensor) -> Tensor:
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
        of_both = torch.empty_like(projected)
        of_a, of_b = of_both.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(b), out=of_a)
        of_b.copy_(torch.ops.aten.gelu_backward(gradient * a, b))
        return of_both


class SiLULinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.silu(x))


class NormSiLU(nn.GroupNorm):
    """SiLU of a group norm: what lies between both is computed again rather than kept."""

    def forward(self, x: Tensor) -> Tensor:
        return _NormSiLU.apply(x, self.weight, self.bias, self.num_groups, self.eps)


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.how = groups, eps
        return F.silu(F.group_norm(x, groups, weight, bias, eps), inplace=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        groups, eps = ctx.how
        sizes = len(x), x.shape[1], x[0, 0].numel(), groups
        x = x.contiguous()
        normed, mean, deviation = torch.ops.aten.native_group_norm(x, weight, bias, *sizes, eps)
        gradient = torch.ops.aten.silu_backward(gradient, normed).contiguous()
        needed = list(ctx.needs_input_grad[:3])
        return (
            *torch.ops.aten.native_group_norm_backward(gradient, x, mean, deviation, weight, *sizes, needed),
            None,
            None,
        )
