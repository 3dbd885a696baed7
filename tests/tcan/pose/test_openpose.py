import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import cv2
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
def open_pose(tmp_path_factory):
    """controlnet_aux.open_pose. Its parent package's own import takes 10 s for detectors that aren't used."""
    before = set(sys.modules)
    parent = types.ModuleType("controlnet_aux")
    parent.__path__ = list(find_spec("controlnet_aux").submodule_search_locations)
    sys.modules["controlnet_aux"] = parent
    yield importlib.import_module("controlnet_aux.open_pose")
    for name in set(sys.modules) - before:
        if name.startswith("controlnet_aux"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def weights(open_pose, tmp_path_factory) -> Path:
    """A `body_pose_model.pth` of random weights: the network's own names without those of its blocks."""
    path = tmp_path_factory.mktemp("openpose") / "body_pose_model.pth"
    torch.manual_seed(0)
    state = open_pose.body.bodypose_model().state_dict()
    torch.save({name.split(".", 1)[1]: value for name, value in state.items()}, path)
    return path


class Maps(nn.Module):
    """A network that answers with given maps, whatever it is shown: the decoding is under test."""

    def __init__(self, paf: torch.Tensor, heatmap: torch.Tensor):
        super().__init__()
        self.maps = paf, heatmap
        self.place = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        assert x.shape[-2:] == tuple(8 * n for n in self.maps[0].shape[-2:])
        return self.maps


def maps_of(people, height: int, width: int, sigma: float = 7.0):
    """The network's maps of a frame with people (keypoints in the frame's pixels), at OpenPose's own scale."""
    scale = 184 / height
    h, w = int(height * scale), int(width * scale)
    h8, w8 = -(-h // 8) * 8, -(-w // 8) * 8
    keypoints = torch.zeros(max(1, len(people)), 18, 3)
    for i, person in enumerate(people):
        keypoints[i] = torch.from_numpy(cut(person, height, width)) * torch.tensor([scale, scale, 1.0])
    paf, heatmap, _ = pose_targets(keypoints, h8, w8, sigma=sigma)
    strongest = paf.abs().argmax(0, keepdim=True)  # where limbs cross, one of them
    heatmap = torch.cat([heatmap[:, :18].amax(0, keepdim=True), heatmap[:, 18:].amin(0, keepdim=True)], 1)
    return paf.gather(0, strongest), heatmap


def people_of(open_pose, weights, maps, height: int, width: int) -> list[np.ndarray]:
    """What controlnet_aux's own code finds, as [P, 18, 3]."""
    detector = open_pose.body.Body(weights)
    return _people_of(detector, maps, height, width)


def _people_of(detector, maps, height: int, width: int) -> np.ndarray:
    detector.model = Maps(*maps)
    candidate, subset = detector(np.zeros((height, width, 3), np.uint8))
    people = np.zeros((len(subset), 18, 3))
    for person, row in zip(people, subset, strict=True):
        for joint in range(18):
            if row[joint] >= 0:
                person[joint] = candidate[int(row[joint]), :3]
    return people


def noisy(maps, amount: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return [m + amount * torch.randn(m.shape, generator=generator) for m in maps]


def scenes(height: int, width: int):
    """name -> maps."""
    size, cx, cy = 0.7 * height, width / 2, 0.25 * height
    one = body(cx, cy, size)
    yield "nobody", maps_of([], height, width)
    yield "one", maps_of([one], height, width)
    yield "turned", maps_of([body(cx, 0.45 * height, 0.5 * height, 1.2)], height, width)
    yield "three", maps_of([body(cx + d * width, cy, 0.45 * height) for d in (-0.3, 0, 0.3)], height, width)
    yield "overlapping", maps_of([one, body(cx + 0.12 * width, cy + 0.04 * height, size)], height, width)
    yield "cut left", maps_of([body(0.1 * width, cy, size)], height, width)
    yield "cut below", maps_of([body(cx, 0.6 * height, size)], height, width)
    yield "corner", maps_of([body(0.95 * width, 0.9 * height, size, 2.5)], height, width)
    yield "small", maps_of([body(cx, cy, 0.25 * height)], height, width, sigma=5)
    near_tie = maps_of([body(cx - 0.2 * width, cy, size), body(cx + 0.2 * width, cy, size)], height, width)
    yield "twins", near_tie
    yield "faint", [0.3 * m for m in maps_of([one], height, width)]
    yield "at the threshold", [0.13 * m for m in maps_of([one], height, width)]
    yield "flat tops", [m.clamp(-0.6, 0.6) for m in maps_of([one], height, width)]
    for seed in range(3):
        yield f"noise {seed}", noisy(maps_of([one, body(cx, 0.4 * height, size)], height, width), 0.03, seed)
    yield "only noise", noisy(maps_of([], height, width), 0.15, 9)


@pytest.mark.parametrize("height, width", [(512, 512), (184, 184), (300, 401), (128, 96), (185, 333)])
def test_finds_the_people_that_controlnet_aux_finds(open_pose, body_detector, height, width):
    names, maps = zip(*scenes(height, width), strict=True)
    network = Maps(*(torch.cat(m) for m in zip(*maps, strict=True)))
    frames = np.zeros((len(names), height, width, 3), np.uint8)
    found = OpenPose(network).detect(frames, batch_size=len(names))
    counts = {}
    for name, m, ours in zip(names, maps, found, strict=True):
        theirs = _people_of(body_detector, m, height, width)
        counts[name] = len(theirs)
        assert ours.shape == theirs.shape, name
        np.testing.assert_array_equal(ours[..., 2] > 0, theirs[..., 2] > 0, err_msg=name)
        assert np.abs(ours[..., :2] - theirs[..., :2]).max(initial=0) <= 1, name
        np.testing.assert_allclose(ours[..., 2], theirs[..., 2].clip(max=1), atol=1e-5, err_msg=name)
    assert counts["nobody"] == 0 and counts["one"] == 1 and counts["three"] == 3


@pytest.fixture(scope="module")
def body_detector(open_pose, weights):
    return open_pose.body.Body(weights)
