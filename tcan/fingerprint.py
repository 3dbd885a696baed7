"""Fingerprints that identify weights whatever the dtype and format they are stored in."""

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn


def fingerprint(module: nn.Module | Mapping[str, Tensor]) -> str:
    """16 hex digits of the names, shapes and values of a module's parameters and buffers (or of a dict of tensors).

    Values are converted to float32, so the same weights stored as fp16 and as fp32 have the same fingerprint.
    """
    tensors = module.state_dict() if isinstance(module, nn.Module) else module
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]
