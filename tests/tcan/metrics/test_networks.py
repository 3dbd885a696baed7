"""Metric networks compared with independent implementations on the same files, which have random weights."""

from pathlib import Path

import lpips as reference_lpips
import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import metric_fid
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models.video.resnet import VideoResNet
from transformers import AutoModel

from pipelines.puppets.world import sample_clip
from tcan.errors import UserError
from tcan.metrics import frechet_distance
from tcan.metrics.features import embeddings, fid_features, fid_vid_features, fvd_features, lpips
from tcan.metrics.networks import (
    FVDI3D,
    LPIPS,
    METRICS,
    FIDInception,
    FIDVIDResNet,
    ImageEmbedding,
    load_networks,
)
from tests.tcan.metrics import network_files as files


@pytest.fixture(scope="module")
def clips() -> tuple[np.ndarray, np.ndarray]:
    """Two puppet videos, uint8 `[18, 96, 96, 3]`."""
    return tuple(sample_clip("dance", seed, 18, 96).frames for seed in (1, 2))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    files.write_inception(path)
    return path


@pytest.fixture(scope="module")
def resnet3d(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VideoResNet]:
    path = tmp_path_factory.mktemp("resnet3d") / "resnet-50-kinetics.pth"
    network = files.torchvision_resnet3d()
    files.write_resnet3d(path, network)
    return path, network


@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_lpips_equals_the_reference_implementation(
    net: str, clips: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    trunk = files.write_torchvision_trunk(tmp_path / "trunk.pth", net)
    ours = LPIPS(net, tmp_path / "trunk.pth")
    reference = reference_lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    names = {name: f"features.{name.split('.', 1)[1]}" for name in reference.net.state_dict()}
    reference.net.load_state_dict({name: trunk[theirs] for name, theirs in names.items()})

    a, b = (torch.from_numpy(clip[:2]).movedim(-1, 1) / 255 for clip in clips)
    for unscaled in (False, True):
        expected = reference(a, b, normalize=not unscaled).flatten()
        found = ours(a, b, unscaled=unscaled)
        assert expected.min() > 0.01
        # The implementations differ in the epsilon of the normalization: 1e-10 added to the norm, 1e-8 to its square.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        mean = lpips(ours, clips[0][:2], clips[1][:2], unscaled=unscaled)
        assert mean == pytest.approx(expected.mean().item(), rel=1e-4)
    assert lpips(ours, clips[0][:2], clips[0][:2]) == 0


def test_fid_equals_torch_fidelity_on_the_same_weights(
    inception: Path, clips: tuple[np.ndarray, np.ndarray]
) -> None:
    clips = tuple(clip[::4] for clip in clips)
    network = FIDInception(inception)
    ours = [fid_features(network, clip) for clip in clips]
    extractor = FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(inception)
    )
    theirs = extractor(torch.from_numpy(clips[0][:2]).movedim(-1, 1))[0].numpy()
    assert theirs.std(axis=0).max() > 1e-3
    np.testing.assert_allclose(ours[0][:2], theirs, rtol=1e-4, atol=1e-5)

    # The eigenvalues of the product of two 2048 x 2048 covariances take 30 s, so the distance is that of 128 features.
    first, second = (torch.from_numpy(features[:, :128]).double() for features in ours)
    statistics = [metric_fid.fid_features_to_statistics(features) for features in (first, second)]
    expected = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(first.numpy(), second.numpy()) == pytest.approx(expected, rel=1e-5)


def test_fid_vid_features_equal_torchvisions_resnet(
    resnet3d: tuple[Path, VideoResNet], clips: tuple[np.ndarray, np.ndarray]
) -> None:
    path, reference = resnet3d
    network = FIDVIDResNet(path)
    frames = network.preprocess(clips[0])
    with torch.inference_mode():
        x = reference.stem(frames[None, 1:17].transpose(1, 2))
        for layer in (reference.layer1, reference.layer2, reference.layer3, reference.layer4):
            x = layer(x)
        expected = reference.avgpool(x).flatten(1).numpy()
    features = fid_vid_features(network, clips[0][:17])
    assert features.shape == (2, 2048)
    np.testing.assert_allclose(features[1:], expected, rtol=1e-3, atol=1e-5 * expected.max())
    assert fid_vid_features(network, clips[0][:15]).shape == (0, 2048)


def test_fid_vid_resizes_with_pil_and_subtracts_the_mean_of_kinetics(
    clips: tuple[np.ndarray, np.ndarray],
) -> None:
    frames = FIDVIDResNet.preprocess(clips[0][:1])
    resized = np.asarray(Image.fromarray(clips[0][0]).resize((112, 112), Image.Resampling.BICUBIC)).astype(
        float
    )
    expected = resized - (114.7748, 107.7354, 99.4750)
    difference = np.abs(frames[0].permute(1, 2, 0).numpy() - expected)
    assert difference.mean() < 0.5  # PIL rounds uint8 images, and clips the overshoot of the bicubic filter


def test_fvd_windows_reach_the_program_with_its_options(
    clips: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    files.write_i3d(tmp_path / "i3d.pt")
    network = FVDI3D(tmp_path / "i3d.pt")
    features = fvd_features(network, clips[0])
    program = torch.jit.load(tmp_path / "i3d.pt")
    assert features.shape == (3, 400)
    for start in range(3):
        window = torch.from_numpy(clips[0][start : start + 16]).permute(3, 0, 1, 2)[None].float()
        expected = program(window, rescale=True, resize=True, return_features=True)
        np.testing.assert_allclose(features[start], expected[0].detach().numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_image_embeddings_are_those_of_transformers(
    kind: str, clips: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    {"clip": files.write_clip, "dino": files.write_dino}[kind](tmp_path / kind)
    network = ImageEmbedding(tmp_path / kind)
    found = embeddings(network, clips[0])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    pixels = network.processor(Image.fromarray(clips[0][5]), return_tensors="pt")["pixel_values"]
    if kind == "clip":
        expected = network.model(pixels).image_embeds[0]
    else:
        expected = AutoModel.from_pretrained(tmp_path / kind).eval()(pixels).last_hidden_state[0, 0]
    expected = expected.detach().numpy() / np.linalg.norm(expected.detach().numpy())
    np.testing.assert_allclose(found[5], expected, rtol=1e-3, atol=1e-5)


def test_networks_without_a_file_make_their_metrics_unavailable(tmp_path: Path) -> None:
    networks = load_networks({"vgg16": None, "i3d": f"{tmp_path}/i3d.pt"}, prefix="evaluate.networks.")
    assert networks.loaded == {}
    assert networks.unavailable.keys() == {metric for metrics in METRICS.values() for metric in metrics}
    assert networks.unavailable["lpips_vgg"] == "evaluate.networks.vgg16 is not set"
    assert networks.unavailable["fvd"] == f"evaluate.networks.i3d = {tmp_path}/i3d.pt: no such file or folder"


def test_wrong_files_raise_user_error(tmp_path: Path) -> None:
    files.write_torchvision_trunk(tmp_path / "alex.pth", "alex")
    weights = torch.load(tmp_path / "alex.pth")
    torch.save(weights | {"features.0.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "shape.pth")
    torch.save(weights | {"features.99.weight": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html></html>")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    torch.jit.script(torch.nn.ReLU()).save(tmp_path / "relu.pt")
    files.write_i3d(tmp_path / "few.pt", features=10)
    files.write_clip(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    files.write_dino(tmp_path / "bert")
    config = tmp_path / "bert" / "config.json"
    config.write_text(config.read_text().replace("dinov2", "bert"))
    (tmp_path / "empty").mkdir()
    for network, file, reason in (
        ("vgg16", "alex.pth", r"not torchvision's vgg16.*: missing keys: features\.12\.bias"),
        (
            "alexnet",
            "shape.pth",
            r"features\.0\.weight has shape \[64, 3, 7, 7\], expected \[64, 3, 11, 11\]",
        ),
        ("alexnet", "more.pth", r"unexpected keys: features\.99\.weight"),
        ("alexnet", "list.pth", "does not contain named tensors"),
        ("inception", "text.pth", "unreadable"),
        ("resnet3d", "page.pth", "an HTML page"),
        ("i3d", "pointer.pt", "a Git LFS pointer"),
        ("i3d", "text.pth", "unreadable"),
        ("i3d", "relu.pt", "failed on a black video"),
        ("i3d", "few.pt", r"its features have shape \[1, 10\]"),
        ("image", "clip", "unreadable"),
        ("image", "bert", "a model of type bert"),
        ("image", "empty", r"config\.json is missing"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            load_networks({network: str(tmp_path / file)})
        assert str(tmp_path / file) in str(error.value) and "\n" not in str(error.value)
