"""InceptionV3 of FID (Heusel et al., 2017), with the weights of the original TensorFlow graph from a local file.

The blocks are torchvision's. They differ from the graph in the pooling branches only. Preprocessing is that of
torch-fidelity: bilinear resizing to 299 x 299 as in TensorFlow 1, then (x - 128) / 128.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from torchvision.models import Inception3

from tcan.metrics.networks.files import load_weights

FILE = "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
SIZE = 299  # pixels


class FIDInception(nn.Module):
    """Features of images for FID: the 2048 outputs of the last average pooling."""

    def __init__(self, path: Path) -> None:
        """Load the weights.

        Raises:
            UserError: see `load_weights`.
        """
        super().__init__()
        with init_empty_weights(include_buffers=False):
            self.network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        load_weights(self.network, path, FILE)
        self.network.fc = nn.Identity()
        for name, block in self.network.named_children():
            if hasattr(block, "branch_pool"):
                _replace_pooling(block, _max_pooling if name == "Mixed_7c" else _average_pooling)
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features `[N, 2048]` of uint8 RGB images `[N, 3, H, W]`."""
        pixels = resize_tensorflow1(images.float(), SIZE)
        return self.network((pixels - 128) / 128)


def resize_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Resize `[N, C, H, W]` to `[N, C, size, size]` like `tf.image.resize_bilinear` of TensorFlow 1.

    Output pixel i samples the input at i H / size, without an offset of half a pixel and without antialiasing.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        positions = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
        low = positions.long()
        first, second = (
            images.index_select(dim, low),
            images.index_select(dim, (low + 1).clamp_max(length - 1)),
        )
        fraction = (positions - low).reshape([-1, 1] if dim == 2 else [-1])
        images = first + (second - first) * fraction
    return images


def _average_pooling(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pooling(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _replace_pooling(block: nn.Module, pooling: Callable[[Tensor], Tensor]) -> None:
    """Make the convolution after a block's pooling use another pooling of the block's input."""
    inputs: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    block.branch_pool.register_forward_pre_hook(lambda _, arguments: (pooling(inputs.pop()),))
