from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tcan.errors import UserError
from tcan.pose.network import BodyPoseNetwork
from tcan.pose.openpose import OpenPose
from tcan.pose.targets import pose_targets
from tests.tcan.pose.bodies import body, cut


@pytest.fixture(scope="module")
def weights(open_pose, tmp_path_factory) -> Path:
    """`body_pose_model.pth` with random weights; its keys lack the network's block names."""
    path = tmp_path_factory.mktemp("openpose") / "body_pose_model.pth"
    torch.manual_seed(0)
    state = open_pose.body.bodypose_model().state_dict()
    torch.save({name.split(".", 1)[1]: value for name, value in state.items()}, path)
    return path


class Maps(nn.Module):
    """Network that returns fixed maps for any input, to test the decoding."""

    def __init__(self, paf: torch.Tensor, heatmap: torch.Tensor):
        super().__init__()
        self.maps = paf, heatmap
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        assert x.shape[-2:] == tuple(8 * n for n in self.maps[0].shape[-2:])
        return self.maps


def maps_of(people, height: int, width: int, sigma: float = 7.0):
    """Ground-truth maps of a frame with people (keypoints in frame pixels), at OpenPose's default scale."""
    scale = 184 / height
    h, w = int(height * scale), int(width * scale)
    h8, w8 = -(-h // 8) * 8, -(-w // 8) * 8
    keypoints = torch.zeros(max(1, len(people)), 18, 3)
    for i, person in enumerate(people):
        keypoints[i] = torch.from_numpy(cut(person, height, width)) * torch.tensor([scale, scale, 1.0])
    paf, heatmap, _ = pose_targets(keypoints, h8, w8, sigma=sigma)
    strongest = paf.abs().argmax(0, keepdim=True)  # at crossings, one of the limbs
    heatmap = torch.cat([heatmap[:, :18].amax(0, keepdim=True), heatmap[:, 18:].amin(0, keepdim=True)], 1)
    return paf.gather(0, strongest), heatmap


def detect_with_controlnet_aux(detector, maps, height: int, width: int) -> np.ndarray:
    """People `[P, 18, 3]` found by controlnet_aux."""
    detector.model = Maps(*maps)
    candidate, subset = detector(np.zeros((height, width, 3), np.uint8))
    people = np.zeros((len(subset), 18, 3))
    for person, row in zip(people, subset, strict=True):
        for joint in range(18):
            if row[joint] >= 0:
                person[joint] = candidate[int(row[joint]), :3]
    return people


def scenes(height: int, width: int):
    """Maps (paf, heatmap) by name of the scene."""
    size, x, y = 0.7 * height, width / 2, 0.25 * height

    def of(*people, sigma=7.0):
        return maps_of(people, height, width, sigma)

    def noisy(maps, amount, seed):
        generator = torch.Generator().manual_seed(seed)
        return [m + amount * torch.randn(m.shape, generator=generator) for m in maps]

    one = body(x, y, size)
    twins = of(body(x - 0.2 * width, y, size), body(x + 0.2 * width, y, size))
    spikes = torch.where(of(one)[1] > 0.8, 0.9, 0.0)
    return {
        "no people": of(),
        "one person": of(one),
        "turned": of(body(x, 0.45 * height, 0.5 * height, 1.2)),
        "three people": of(*(body(x + d * width, y, 0.45 * height) for d in (-0.3, 0, 0.3))),
        "overlapping": of(one, body(x + 0.12 * width, y + 0.04 * height, size)),
        "cropped by the left border": of(body(0.1 * width, y, size)),
        "cropped by the lower border": of(body(x, 0.6 * height, size)),
        "upside down in a corner": of(body(0.95 * width, 0.9 * height, size, 2.5)),
        "small": of(body(x, y, 0.25 * height), sigma=5),
        "two equal people: scores differ by rounding": twins,
        "mirrored: neighbors differ by rounding": [twins[0], (twins[1] + twins[1].flip(-1)) / 2],
        "faint": [0.3 * m for m in of(one)],
        "at the threshold": [0.13 * m for m in of(one)],
        "clipped peaks": [m.clamp(-0.6, 0.6) for m in of(one)],
        "peaks of one or few cells": [of(one)[0], spikes],
        "quantized": [of(one)[0], (8 * of(one)[1]).round() / 8],
        "noise": noisy(of(one, body(x, 0.4 * height, size)), 0.03, 0),
        "more noise": noisy(of(one, body(x, 0.4 * height, size)), 0.06, 1),
        "only noise": noisy(of(), 0.12, 2),
    }


FEW = ("no people", "overlapping", "upside down in a corner", "mirrored: neighbors differ by rounding")


@pytest.mark.parametrize(
    "height, width, scene_names",
    [(128, 96, None), (184, 184, FEW), (185, 300, FEW[1:2]), (300, 225, FEW), (512, 512, FEW[:2])],
)
def test_decoding_equals_controlnet_aux(body_detector, height, width, scene_names):
    maps_by_scene = scenes(height, width)
    names = scene_names or tuple(maps_by_scene)
    network = Maps(*(torch.cat([maps_by_scene[name][i] for name in names]) for i in (0, 1)))
    all_detected = OpenPose(network).detect(
        np.zeros((len(names), height, width, 3), np.uint8), batch_size=len(names)
    )
    for name, detected in zip(names, all_detected, strict=True):
        expected = detect_with_controlnet_aux(body_detector, maps_by_scene[name], height, width)
        assert detected.shape == expected.shape, name
        np.testing.assert_array_equal(detected[..., 2] > 0, expected[..., 2] > 0, err_msg=name)
        assert np.abs(detected[..., :2] - expected[..., :2]).max(initial=0) <= 1, name
        np.testing.assert_allclose(detected[..., 2], expected[..., 2].clip(max=1), atol=1e-4, err_msg=name)
        if name in PEOPLE:
            assert len(detected) == PEOPLE[name], name


PEOPLE = {
    "no people": 0,
    "one person": 1,
    "turned": 1,
    "overlapping": 2,
    "cropped by the left border": 1,
    "at the threshold": 0,
}


@pytest.fixture(scope="module")
def body_detector(open_pose, weights):
    return open_pose.body.Body(weights)


def test_openpose_file_loads_into_network_of_controlnet_aux(body_detector, weights):
    loaded = OpenPose.from_pretrained(weights)
    torch.manual_seed(1)
    x = torch.rand(1, 3, 32, 24) - 0.5
    with torch.no_grad():
        reference = type(body_detector)(weights).model(x)
        for got, expected in zip(loaded.network(x), reference, strict=True):
            torch.testing.assert_close(got, expected)
    assert (loaded.input_height, loaded.blur_sigma) == (184, 3)
    assert loaded.fingerprint == OpenPose.from_pretrained(weights.parent).fingerprint


class RecordingNetwork(nn.Module):
    """Network that records its inputs and finds no people."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))
        self.inputs: list[torch.Tensor] = []

    def forward(self, x):
        self.inputs.append(x)
        b, _, h, w = x.shape
        return x.new_zeros(b, 38, h // 8, w // 8), x.new_zeros(b, 19, h // 8, w // 8)


@pytest.mark.parametrize("height, width", [(512, 512), (300, 225), (100, 77)])
def test_network_input_equals_controlnet_aux(body_detector, height, width):
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    actual, reference = RecordingNetwork(), RecordingNetwork()
    OpenPose(actual).detect(frames)
    body_detector.model = reference
    for frame in frames:
        body_detector(frame[..., ::-1].copy())
    torch.testing.assert_close(torch.cat(actual.inputs), torch.cat(reference.inputs), rtol=0, atol=0)


def test_saved_settings_are_loaded_and_batch_size_does_not_change_results(tmp_path):
    torch.manual_seed(0)
    network = BodyPoseNetwork(input_height=64, blur_sigma=1.5)
    nn.init.normal_(network.stage2.heatmap[-1].weight, std=0.5)  # many peaks
    nn.init.normal_(network.stage2.paf[-1].weight, std=0.5)
    network.save_pretrained(tmp_path)
    detector = OpenPose.from_pretrained(str(tmp_path))
    assert (detector.input_height, detector.blur_sigma) == (64, 1.5)
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 48, 3), dtype=np.uint8)
    single_batch, small_batches = detector.detect(frames), detector.detect(frames, batch_size=2)
    assert len(single_batch) == 5 and any(len(people) for people in single_batch)
    for a, b in zip(single_batch, small_batches, strict=True):
        assert a.shape == b.shape and a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert ((a[..., 2] >= 0) & (a[..., 2] <= 1)).all() and not a[a[..., 2] == 0].any()
    assert detector.detect(frames[:0]) == []


def test_fingerprint_depends_on_weights_and_settings():
    torch.manual_seed(0)
    network = BodyPoseNetwork()
    prints = {OpenPose(network).fingerprint, OpenPose(network, blur_sigma=2).fingerprint}
    assert OpenPose(network).fingerprint in prints
    with torch.no_grad():
        network.stem[0][0].weight[0, 0, 0, 0] += 1e-3
    assert len(prints | {OpenPose(network).fingerprint}) == 3


def test_invalid_pose_network_raises_user_error(tmp_path):
    with pytest.raises(UserError, match=r"neither config\.json nor"):
        OpenPose.from_pretrained(tmp_path)
    text = tmp_path / "text.pth"
    text.write_text("not weights")
    with pytest.raises(UserError, match="not a weights file"):
        OpenPose.from_pretrained(text)
    other = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(2)}, other)
    with pytest.raises(UserError, match=r"unexpected.*conv"):
        OpenPose.from_pretrained(other)
    BodyPoseNetwork().save_pretrained(tmp_path / "cut")
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        OpenPose.from_pretrained(tmp_path / "cut")
    with pytest.raises(UserError, match="too narrow"):
        OpenPose(RecordingNetwork()).detect(np.zeros((1, 400, 1, 3), np.uint8))
