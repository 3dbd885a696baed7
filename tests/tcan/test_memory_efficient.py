"""Memory-efficient modules: results and gradients equal to torch's modules, and the bytes saved for backward."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tcan.memory_efficient import make_memory_efficient


def run(module: nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """Return output and gradients, and the bytes saved for backward excluding parameters and the input."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    saved: dict[int, int] = {}
    excluded = {x.data_ptr(), *(parameter.data_ptr() for parameter in module.parameters())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in excluded:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in module.parameters() if parameter.requires_grad)]
    return [out, *gradients], sum(saved.values())


def saved_bytes(make: Callable[[], nn.Module], x: Tensor, trained: bool) -> tuple[int, int]:
    """Return the bytes saved by torch's module and by ours. Asserts that output and gradients are equal."""
    torch.manual_seed(0)
    baseline = make().double().requires_grad_(trained)
    ours = copy.deepcopy(baseline)
    make_memory_efficient(ours)
    (expected, before), (result, after) = run(baseline, x), run(ours, x)
    assert len(expected) == len(result)
    for a, b in zip(expected, result, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    return before, after


def test_frozen_convolutions_do_not_save_their_input() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.SiLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(4, 8, 1, groups=2)
        )

    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    first_input, second_input = x.nbytes, 8 * 2 * 4 * 5 * 4
    before, after = saved_bytes(make, x, trained=False)
    assert before - after == first_input + second_input
    before, after = saved_bytes(make, x, trained=True)
    assert before == after


def test_geglu_saves_only_the_projection() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    for trained in (False, True):
        before, after = saved_bytes(lambda: GEGLU(6, 24), x, trained)
        assert after == 8 * 2 * 5 * 48 and before - after == 8 * 2 * 5 * 24


def test_residual_blocks_do_not_save_normalized_inputs() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=6, groups=4)
            self.time = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, self.time)

    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    for trained in (False, True):
        before, after = saved_bytes(Block, x, trained)
        normalized = 8 * 2 * 5 * 4 * (8 + 12)  # outputs of norm1 and norm2
        assert before - after >= normalized


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_runs_like_the_torch_modules(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError(
            "autocast does not cast the inputs of custom functions; on GPUs, mixed types fail"
        )

    monkeypatch.setattr(torch.autograd.Function, "apply", fail)
    torch.manual_seed(0)
    baseline = nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1), ResnetBlock2D(in_channels=32, temb_channels=None, groups=8)
    ).requires_grad_(trained)
    ours = copy.deepcopy(baseline)
    make_memory_efficient(ours)
    results = []
    for network in (baseline, ours):
        x = torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = network[1](network[0](x), None)
        out.float().square().sum().backward()
        results.append((out, x.grad))
    for expected, result in zip(*results, strict=True):
        assert expected.dtype == result.dtype
        torch.testing.assert_close(result, expected)
