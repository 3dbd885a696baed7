import numpy as np
import torch

from tcan.pose.network import BodyPoseNetwork
from tcan.pose.openpose import OpenPose
from tcan.pose.skeleton import LIMBS, PAF_CHANNELS
from tcan.pose.targets import pose_targets
from tests.tcan.pose.bodies import body


def test_output_shapes_and_parameter_count():
    network = BodyPoseNetwork()
    assert 0.6e6 < sum(parameter.numel() for parameter in network.parameters()) < 0.9e6
    stages = network.stages(torch.zeros(2, 3, 64, 48))
    assert [tuple(m.shape) for stage in stages for m in stage] == [(2, 38, 8, 6), (2, 19, 8, 6)] * 2
    x = torch.randn(1, 3, 64, 64)
    for got, expected in zip(network(x), network.stages(x)[-1], strict=True):
        torch.testing.assert_close(got, expected)


def test_targets_follow_the_formulas():
    keypoints = np.stack([body(60, 30, 80), body(70, 28, 85, 0.3)])
    keypoints[1, 4] = 0
    paf, heatmap, weight = (
        m.numpy() for m in pose_targets(torch.from_numpy(keypoints), 128, 112, 8, 7.0, 6.0)
    )
    assert paf.shape == weight.shape == (2, 38, 16, 14) and heatmap.shape == (2, 19, 16, 14)
    for b, i, j in np.ndindex(2, 16, 14):
        cell = np.array([8 * j + 3.5, 8 * i + 3.5])
        peaks = [
            np.exp(-np.sum((cell - p[:2]) ** 2) / (2 * 7.0**2)) if p[2] else 0.0
            for p in keypoints[b].astype(float)
        ]
        np.testing.assert_allclose(heatmap[b, :18, i, j], peaks, atol=1e-5)
        np.testing.assert_allclose(heatmap[b, 18, i, j], 1 - max(peaks), atol=1e-5)
        for (start, end), channel in zip(LIMBS, PAF_CHANNELS, strict=True):
            p, q = keypoints[b, start].astype(float), keypoints[b, end].astype(float)
            expected = np.zeros(2)
            if p[2] and q[2]:
                unit = (q - p)[:2] / np.linalg.norm((q - p)[:2])
                along, across = (cell - p[:2]) @ unit, abs(np.cross(unit, cell - p[:2]))
                if across <= 6 and -6 <= along <= np.linalg.norm((q - p)[:2]) + 6:
                    expected = unit
            np.testing.assert_allclose(paf[b, channel : channel + 2, i, j], expected, atol=1e-5)
    assert (weight[(paf != 0)] > weight[paf == 0].min()).all() and weight.min() == 1


def test_decoded_targets_equal_keypoints():
    rng = np.random.default_rng(0)
    poses = [
        body(rng.uniform(45, 80), rng.uniform(25, 40), rng.uniform(55, 100), 0.3 * rng.normal())
        for _ in range(30)
    ]
    keypoints = np.stack(poses)
    inside = ((keypoints[..., :2] >= 4) & (keypoints[..., :2] < 124)).all(-1)
    keypoints[~inside] = 0
    keypoints[3, 4] = 0  # a missing wrist
    paf, heatmap, _ = pose_targets(torch.from_numpy(keypoints), 128, 128)
    network = BodyPoseNetwork()
    detector = OpenPose(network, network.config.input_height, network.config.blur_sigma)
    people = detector.decode(paf, heatmap, (128, 128), (128, 128))
    assert [len(found) for found in people] == [1] * 30
    found = np.concatenate(people)
    np.testing.assert_array_equal(found[..., 2] > 0, keypoints[..., 2] > 0)
    error = np.linalg.norm(found[..., :2] - keypoints[..., :2], axis=-1)
    assert error.max() < 1.6 and error[inside].mean() < 0.6  # in pixels; peaks have integer coordinates
