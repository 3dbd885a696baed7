"""The temperature map against distances measured pixel by pixel."""

import math

import torch

from tcan.temperature import temperature_map, temperature_of_places


def test_hand_made_image_against_brute_force() -> None:
    height, width = 12, 20
    poses = torch.zeros(3, 3, height, width, dtype=torch.uint8)
    poses[0, 0, 2, 3] = 7  # each in one channel of one frame alone
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


def test_no_pose_is_temperature_one() -> None:
    assert torch.equal(temperature_map(torch.zeros(4, 3, 8, 6)), torch.ones(8, 6))


def test_places_are_the_nearest_and_in_clip_row_column_order() -> None:
    tau = torch.arange(2 * 8 * 16.0).view(2, 8, 16)
    places = temperature_of_places(tau, 2, 2, 4)
    assert places.tolist() == [
        tau[b, y * 4, x * 4].item() for b in range(2) for y in range(2) for x in range(4)
    ]
    assert torch.equal(temperature_of_places(tau[0], 2, 2, 4), places[:8].repeat(2))
