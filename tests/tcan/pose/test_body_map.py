"""Dense body maps: which part a pixel shows, from positions that follow from the joints alone."""

import numpy as np
import pytest

from tcan.pose.body_map import BONES, COLORS, HEAD_PART, TORSO_BACK, TORSO_FRONT
from tcan.pose.draw import draw_poses
from tcan.pose.skeleton import JOINTS
from tests.tcan.pose.bodies import body

POSE = body(64, 30, 80)


def drawn(pose: np.ndarray, size: int = 128) -> np.ndarray:
    return draw_poses(pose[None], size, size, style="body_map")[0].astype(int)


def direction(color: np.ndarray | list[int]) -> np.ndarray:
    """A color without its brightness."""
    return np.asarray(color) / np.linalg.norm(color)


def test_each_part_has_its_own_color_at_the_center_of_its_bone() -> None:
    image = drawn(POSE)
    for part, (start, end, _) in enumerate(BONES):
        x, y = ((POSE[start] + POSE[end]) / 2)[:2].round().astype(int)
        assert direction(image[y, x]) @ direction(COLORS[part]) > 0.999
    x, y = POSE[[2, 5, 8, 11], :2].mean(axis=0).round().astype(int)
    assert image[y, x].tolist() == COLORS[TORSO_FRONT]
    x, y = POSE[0, :2].round().astype(int)
    assert image[y, x].tolist() == COLORS[HEAD_PART]
    colors = np.array(COLORS)
    distances = np.abs(colors[:, None] - colors).max(axis=2) + 255 * np.eye(len(colors))
    assert distances.min() >= 6 and distances[0, 1] > 60  # right and left thigh


def test_limbs_become_darker_from_start_to_end() -> None:
    image = drawn(POSE)
    knee, ankle = (POSE[JOINTS.index(f"right_{name}"), :2] for name in ("knee", "ankle"))
    values = [
        image[tuple((knee + at * (ankle - knee)).round().astype(int)[::-1])].sum() for at in (0.2, 0.45, 0.6)
    ]
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


def test_the_back_of_the_torso_has_another_color() -> None:
    turned = POSE[
        [0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16]
    ]  # the right shoulder at the right of the image
    x, y = POSE[[2, 5, 8, 11], :2].mean(axis=0).round().astype(int)
    assert drawn(turned)[y, x].tolist() == COLORS[TORSO_BACK]


@pytest.mark.parametrize("missing", range(18))
def test_parts_without_a_joint_are_omitted(missing: int) -> None:
    pose = POSE.copy()
    pose[missing] = 0
    image = drawn(pose)
    assert image.any() and not image[:3, :3].any()  # nothing at the position (0, 0) of missing joints
    for part, (start, end, _) in enumerate(BONES):
        if missing in (start, end):
            assert not (image == COLORS[part]).all(axis=2).any()


def test_widths_follow_the_size_of_the_body_and_nobody_is_black() -> None:
    small, large = drawn(POSE).any(axis=2).sum(), drawn(body(128, 60, 160), 256).any(axis=2).sum()
    assert large / small == pytest.approx(4, rel=0.1)
    assert not drawn(np.zeros((18, 3), np.float32)).any()
