"""Embeddings of aligned faces by a recognition network in an ONNX file, as InsightFace distributes them (ArcFace, Deng et al., CVPR 2019)."""

import mmap
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tcan.errors import UserError, first_line
from tcan.onnx_file import load_session, run_session

FILE = "a face recognition network in the format of InsightFace's ONNX files"
SIZE = 112  # pixels
MXNET_NODE = b"_minusscalar0"
"""First node of ArcFace networks that were exported from MXNet: they contain the normalization of the pixels."""


class FaceEmbedding(nn.Module):
    """Normalized embeddings of aligned faces."""

    def __init__(self, path: Path) -> None:
        """Load the network and run it on a gray image.

        Raises:
            UserError: onnxruntime is not installed; the file is no ONNX file; the network has other inputs than one
                `[N, 3, 112, 112]` with N free or 1, other outputs than one `[N, D]` with D >= 2, or normalizes the pixels itself.
        """
        super().__init__()
        self.path, self.device = path, torch.device("cpu")
        self.session = load_session(path, self.device)
        where = f"{path}: not {FILE}"
        inputs = [list(item.shape) for item in self.session.get_inputs()]
        if len(inputs) != 1 or not _is_accepted(inputs[0]):
            raise UserError(
                f"{where}: its inputs have shapes {inputs}, expected one input [N, 3, {SIZE}, {SIZE}] with N free or 1; use "
                "another file"
            )
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(MXNET_NODE) >= 0:
                raise UserError(
                    f"{where}: exported from MXNet, it normalizes the pixels itself; use a file exported from PyTorch"
                )
        try:
            outputs = run_session(self.session, np.zeros((1, 3, SIZE, SIZE), np.float32))
        except Exception as error:  # onnxruntime's exceptions have no common class
            raise UserError(
                f"{where}: fails on a gray image ({first_line(error)}); use another file"
            ) from error
        shapes = [list(output.shape) for output in outputs]
        if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] != 1 or shapes[0][1] < 2:
            raise UserError(
                f"{where}: its outputs for one image have shapes {shapes}, expected one output [1, D] with D >= 2; use another "
                "file"
            )
        self.dimensions = shapes[0][1]

    def to(self, device: torch.device | str) -> "FaceEmbedding":
        """Move the network to a device; onnxruntime loads it again for another one."""
        device = torch.device(device)
        if device != self.device:
            self.session, self.device = load_session(self.path, device), device
        return self

    def forward(self, faces: np.ndarray) -> np.ndarray:
        """Return the embeddings `[N, D]`, float64 of length 1, of aligned faces, uint8 RGB `[N, 112, 112, 3]`.

        The network runs on one face at a time: files differ in the batches that they accept, whatever their shapes say.
        """
        pixels = np.ascontiguousarray(np.moveaxis((faces.astype(np.float32) - 127.5) / 127.5, -1, 1))
        embeddings = np.concatenate([run_session(self.session, face[None])[0] for face in pixels]).astype(
            float
        )
        return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


def _is_accepted(shape: list) -> bool:
    """Whether an input is `[N, 3, 112, 112]` with N free or 1; onnxruntime returns a name or None for a free N."""
    return (
        len(shape) == 4 and shape[1:] == [3, SIZE, SIZE] and (shape[0] == 1 or not isinstance(shape[0], int))
    )
