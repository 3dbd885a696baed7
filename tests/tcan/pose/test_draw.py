import numpy as np
import pytest

from tcan.pose.draw import draw_poses
from tests.tcan.pose.bodies import body


def draw_with_controlnet_aux(open_pose, keypoints: np.ndarray, height: int, width: int) -> np.ndarray:
    """One pose drawn by controlnet_aux."""
    point = open_pose.body.Keypoint
    joints = [point(float(x) / width, float(y) / height) if score > 0 else None for x, y, score in keypoints]
    return open_pose.util.draw_bodypose(np.zeros((height, width, 3), np.uint8), joints)


@pytest.mark.parametrize("height, width", [(512, 512), (256, 1024)])
def test_drawing_equals_controlnet_aux(open_pose, height, width):
    rng = np.random.default_rng(0)
    poses = [body(width / 2, height / 4, 0.7 * height, turn) for turn in (0, 0.4, 3)]
    poses += [body(0.02 * width, 0.8 * height, height)]  # cropped by two image edges
    for _ in range(20):  # random joints, 20% missing, two at the same position
        pose = rng.uniform(-20, 530, (18, 3)).astype(np.float32)
        pose[:, 2] = rng.random(18) > 0.2
        pose[3, :2] = pose[2, :2]
        poses.append(pose)
    drawn = draw_poses(np.array(poses, np.float32), height, width)
    assert drawn.shape == (len(poses), height, width, 3) and drawn.dtype == np.uint8
    for pose, image in zip(poses, drawn, strict=True):
        np.testing.assert_array_equal(image, draw_with_controlnet_aux(open_pose, pose, height, width))


def test_stick_width_scales_the_drawing_and_missing_people_are_black():
    pose = body(64, 40, 80)[None]
    thick, thin = (draw_poses(pose, 128, 128, stick_width).any(-1).sum() for stick_width in (4, 2))
    assert 0 < thin < thick
    assert not draw_poses(np.zeros((2, 18, 3), np.float32), 128, 128).any()
    assert draw_poses(np.zeros((0, 18, 3), np.float32), 64, 32).shape == (0, 64, 32, 3)


def test_several_people_are_drawn_on_one_image() -> None:
    first, second = body(20, 20, 40)[None], body(90, 20, 40)[None]
    both = draw_poses(np.stack([first, second], axis=1), 64, 128)
    np.testing.assert_array_equal(both, draw_poses(first, 64, 128) | draw_poses(second, 64, 128))
