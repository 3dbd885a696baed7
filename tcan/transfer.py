"""Copies between host and device that do not make the host wait."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(array: NDArray[np.uint8], device: torch.device | str) -> Tensor:
    """Copy uint8 frames to a device; to a GPU from pinned memory, so that the host does not wait for the copy."""
    if torch.device(device).type != "cuda":
        return torch.tensor(array, device=device)
    pinned = torch.empty(array.shape, dtype=torch.uint8, pin_memory=True)
    np.copyto(pinned.numpy(), array)
    return pinned.to(device, non_blocking=True)


def upload_tensor(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Convert a tensor in host memory to `dtype` and copy it to a device, to a GPU from pinned memory."""
    tensor = tensor.to(dtype)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor to the host that starts at once; `numpy` waits for it."""

    def __init__(self, tensor: Tensor):
        self._event = None
        # From a GPU to pinned memory.
        self._host = tensor.to("cpu", non_blocking=True)
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def numpy(self) -> np.ndarray:
        if self._event:
            self._event.synchronize()
        return self._host.numpy()


def copied_to_host(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield copies of tensors in host memory, each after the next tensor has been requested, so that a GPU does not wait for
    the host in between."""
    last: HostCopy | None = None
    for tensor in tensors:
        copy = HostCopy(tensor)
        if last is not None:
            yield torch.from_numpy(last.numpy())
        last = copy
    if last is not None:
        yield torch.from_numpy(last.numpy())
