"""Files in the layouts of the metric networks, with random weights: no test has the real ones.

They check the layouts, the preprocessing and the arithmetic, not the values that published weights give.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import Inception3, alexnet, vgg16
from torchvision.models.video.resnet import Bottleneck, Conv3DSimple, VideoResNet
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)


def write_torchvision_trunk(path: Path, net: str) -> dict[str, Tensor]:
    """AlexNet or VGG16 as torchvision's files, with one key of the unused classifier."""
    with torch.device("meta"):
        shapes = (alexnet if net == "alex" else vgg16)().features.state_dict()
    generator = torch.Generator().manual_seed(0)
    features = {
        f"features.{name}": torch.randn(tensor.shape, generator=generator)
        * (2 / tensor[0].numel() if tensor.ndim > 1 else 0.01) ** 0.5
        for name, tensor in shapes.items()
    }
    torch.save(features | {"classifier.6.bias": torch.zeros(1000)}, path)
    return features


def write_inception(path: Path) -> None:
    """The Inception network of FID. torch-fidelity loads the same file strictly."""
    torch.manual_seed(0)
    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    _random_statistics(network)
    torch.save(network.state_dict(), path)


def torchvision_resnet3d() -> VideoResNet:
    """torchvision's video ResNet as a 3D ResNet-50 with the stem of Hara et al., with random weights."""
    torch.manual_seed(0)

    def stem() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv3d(3, 64, 7, stride=(1, 2, 2), padding=3, bias=False),
            nn.BatchNorm3d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool3d(3, stride=2, padding=1),
        )

    network = VideoResNet(Bottleneck, [Conv3DSimple] * 4, [3, 4, 6, 3], stem, num_classes=400)
    _random_statistics(network)
    return network.eval()


def write_resnet3d(path: Path, network: VideoResNet) -> None:
    """`resnet-50-kinetics.pth`: names of Hara et al., wrapped in `DataParallel` and in a dictionary, without counters."""
    weights = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        for theirs, ours in (
            ("stem.0.", "conv1."),
            ("stem.1.", "bn1."),
            *((f".conv{i}.0.", f".conv{i}.") for i in (1, 2, 3)),
            *((f".conv{i}.1.", f".bn{i}.") for i in (1, 2, 3)),
        ):
            name = name.replace(theirs, ours)
        weights[f"module.{name}"] = tensor
    torch.save({"arch": "resnet-50", "epoch": 200, "state_dict": weights}, path)


class RandomI3D(nn.Module):
    """A program with the options of `i3d_torchscript.pt`: a random linear map of a coarse video."""

    def __init__(self, features: int = 400) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 8 * 8, features)

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        if resize:
            x = nn.functional.interpolate(x, size=(x.shape[2], 224, 224), mode="trilinear")
        if rescale:
            x = 2 * x / 255 - 1
        x = self.linear(nn.functional.adaptive_avg_pool3d(x, (4, 8, 8)).flatten(1))
        return x if return_features else x.softmax(dim=1)


def write_i3d(path: Path, features: int = 400) -> None:
    torch.manual_seed(0)
    torch.jit.script(RandomI3D(features)).save(path)


def write_clip(folder: Path) -> None:
    """A small CLIP image encoder in transformers' layout."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )


def write_dino(folder: Path) -> None:
    """A small DINOv2 in transformers' layout."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )


class LinearFaces(nn.Module):
    """A linear map of the means of 8 x 8 pixels."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 14 * 14, dimensions)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.avg_pool2d(x, 8).flatten(1))


def write_face(path: Path, batch: int | None = None, dimensions: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """A small face recognition network; returns its matrix `[D, 588]` and vector `[D]`. batch None: a free batch dimension."""
    torch.manual_seed(0)
    network = LinearFaces(dimensions)
    write_onnx(path, network, [batch or 2, 3, 112, 112], free_batch=batch is None)
    return network.linear.weight.detach().numpy(), network.linear.bias.detach().numpy()


def write_onnx(path: Path, network: nn.Module, shape: Sequence[int], free_batch: bool = False) -> None:
    """Any network with one input of this shape."""
    axes = {"input": {0: "batch"}} if free_batch else None
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            network.eval(),
            (torch.zeros(*shape),),
            path,
            input_names=["input"],
            dynamic_axes=axes,
            dynamo=False,
        )


def _random_statistics(network: nn.Module) -> None:
    """Random weights that keep the differences of the inputs, and statistics that are not the neutral 0 and 1."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
