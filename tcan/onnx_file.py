"""Networks in ONNX files, run by onnxruntime."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from tcan.errors import UserError, first_line
from tcan.impostor import impostor

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

logger = logging.getLogger(__name__)


def load_session(file: Path, device: torch.device) -> "InferenceSession":
    """Load a network on a device; on the CPU, with a warning, if onnxruntime does not support the GPU.

    Raises:
        UserError: onnxruntime is not installed, or the file is no ONNX file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            f"{file}: ONNX files need onnxruntime; run pip install 'tcan[onnx]' (on GPUs: onnxruntime-gpu)"
        ) from None
    if problem := impostor(file):
        raise UserError(f"{file}: {problem}")
    providers: list[str | tuple[str, dict[str, int]]] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        else:
            logger.warning("%s: runs on the CPU; install onnxruntime-gpu instead of onnxruntime", file)
    options = onnxruntime.SessionOptions()
    # Like the other networks: as many threads as torch, which jobs limit to the CPUs of a process.
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common class
        raise UserError(f"{file}: no valid ONNX file ({first_line(error)}); download it again") from error


def run_session(session: "InferenceSession", images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Outputs of a network with one input for images `[B, 3, H, W]`, as float32 also for files in half precision."""
    item = session.get_inputs()[0]
    dtype = np.float16 if item.type == "tensor(float16)" else np.float32
    return [output.astype(np.float32) for output in session.run(None, {item.name: images.astype(dtype)})]
