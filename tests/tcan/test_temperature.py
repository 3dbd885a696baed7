"""Temperature map compared with distances computed for each pixel."""

import math

import torch

from tcan.temperature import resize_temperature, temperature_map


def test_temperature_map_equals_brute_force_distances() -> None:
    height, width = 12, 20
    poses = torch.zeros(3, 3, height, width, dtype=torch.uint8)
    poses[0, 0, 2, 3] = 7  # each pixel is in one channel of one frame
    poses[2, 2, 9, 15] = 255
    poses[2, 1, 9, 16] = 1
    skeleton = [(2, 3), (9, 15), (9, 16)]
    tau = temperature_map(poses)
    for y in range(height):
        for x in range(width):
            distance = min(math.hypot(y - v, x - u) for v, u in skeleton)
            expected = 3 * distance / math.sqrt((height / 2) ** 2 + (width / 2) ** 2) + 1
            assert abs(tau[y, x].item() - expected) < 1e-6
    assert torch.equal(temperature_map(poses.float() / 255), tau)
    torch.testing.assert_close(temperature_map(poses, strength=0.5), 1 + (tau - 1) / 2)
    assert torch.equal(temperature_map(poses, strength=0), torch.ones(height, width))


def test_temperature_is_one_without_a_pose() -> None:
    assert torch.equal(temperature_map(torch.zeros(4, 3, 8, 6)), torch.ones(8, 6))


def test_resize_is_nearest_and_ordered_by_clip_row_column() -> None:
    tau = torch.arange(2 * 8 * 16.0).view(2, 8, 16)
    resized = resize_temperature(tau, 2, 2, 4)
    assert resized.tolist() == [
        tau[b, y * 4, x * 4].item() for b in range(2) for y in range(2) for x in range(4)
    ]
    assert torch.equal(resize_temperature(tau[0], 2, 2, 4), resized[:8].repeat(2))
