"""CUDA on a machine without a GPU: tensors on `cuda` have a device, a dtype and a shape, but no data; others are real."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten


class FakeCuda(FakeTensorMode):
    """Context manager in which code for CUDA runs as on a GPU, except that values copied from `cuda` are 0.

    Mixing devices raises, and so do `.item()`, `.tolist()`, `nonzero` and `bool(tensor)` of a tensor on `cuda`. The other host
    synchronizations, copies for which the host waits, are recorded.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._is_inside = False
        self.uploads: list[tuple[int, ...]] = []
        """Shapes of the tensors copied to `cuda` while the host waited."""
        self.downloads: list[tuple[int, ...]] = []
        """Shapes of the tensors copied from `cuda`, which need a synchronization before their values are used."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._is_inside:  # an operator that torch uses to infer the result of another one
            return super().__torch_dispatch__(func, types, args, kwargs)
        if not any(_is_on_cuda(value) for value in tree_leaves((args, kwargs))):
            kwargs.pop("pin_memory", None)  # needs a GPU
            return args[0] if func is aten._pin_memory.default else func(*args, **kwargs)
        self._is_inside = True
        try:
            fake = tree_map_only(Tensor, self._fake, (args, kwargs))
            result = super().__torch_dispatch__(func, types, *fake)
        finally:
            self._is_inside = False
        if func.overloadpacket in (aten.to, aten._to_copy, aten.copy_):
            self._record(args[func.overloadpacket is aten.copy_].device, result, kwargs)
        if func.overloadpacket is aten.copy_ and not _is_on_cuda(args[0]):
            return args[0].zero_()
        return tree_map_only(FakeTensor, _real_if_on_cpu, result)

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)

    def _record(self, source: torch.device, result: Tensor, kwargs: Any) -> None:
        if (source.type, result.device.type) == ("cpu", "cuda") and not kwargs.get("non_blocking"):
            self.uploads.append(tuple(result.shape))
        elif (source.type, result.device.type) == ("cuda", "cpu"):
            self.downloads.append(tuple(result.shape))


def _is_on_cuda(value: Any) -> bool:
    return isinstance(value, FakeTensor) or (isinstance(value, torch.device) and value.type == "cuda")


def _real_if_on_cpu(tensor: FakeTensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.device.type == "cpu" else tensor
