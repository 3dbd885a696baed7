import numpy as np
import pytest

from tcan.errors import UserError
from tcan.pose.retarget import retarget
from tests.tcan.pose.bodies import body

ARM = [2, 3, 4]
LEGS = [9, 10, 12, 13]


def dance(frames: int = 8, x: float = 200, y: float = 120, size: float = 300) -> np.ndarray:
    """A moving body that swings its forearms; all bones keep their length."""
    poses = np.stack([body(x + 6 * f, y + 3 * f, size, 0.05 * f) for f in range(frames)])
    for f, pose in enumerate(poses):
        for elbow, wrist in ((3, 4), (6, 7)):
            bone, angle = pose[wrist, :2] - pose[elbow, :2], 0.3 * f
            turned = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]] @ bone
            pose[wrist, :2] = pose[elbow, :2] + turned
    return poses


def length(poses: np.ndarray, a: int, b: int) -> np.ndarray:
    return np.linalg.norm(poses[..., a, :2] - poses[..., b, :2], axis=-1)


def test_equal_proportions_leave_driving_unchanged():
    driving = dance()
    driving[..., 2] = 0.7
    np.testing.assert_allclose(retarget(driving, driving[0]), driving, atol=1e-3)


def test_result_has_size_and_position_of_character():
    driving = dance()
    character = body(350, 90, 600)  # twice as large
    expected = driving.copy()
    expected[..., :2] = (driving[..., :2] - driving[0, 1, :2]) * 2 + character[1, :2]
    np.testing.assert_allclose(retarget(driving, character), expected, atol=1e-3)


def test_short_arms_stay_short_and_move_the_hands():
    driving = dance()
    character = driving[0].copy()
    for shoulder, elbow, wrist in ((2, 3, 4), (5, 6, 7)):
        upper, lower = character[elbow] - character[shoulder], character[wrist] - character[elbow]
        character[elbow] = character[shoulder] + 0.5 * upper
        character[wrist] = character[elbow] + 0.6 * lower
    character[:, 2] = 1
    result = retarget(driving, character)
    expected = driving[..., :2].copy()
    for shoulder, elbow, wrist in ((2, 3, 4), (5, 6, 7)):
        upper, lower = (driving[:, b, :2] - driving[:, a, :2] for a, b in ((shoulder, elbow), (elbow, wrist)))
        expected[:, elbow] = driving[:, shoulder, :2] + 0.5 * upper
        expected[:, wrist] = expected[:, elbow] + 0.6 * lower
    np.testing.assert_allclose(result[..., :2], expected, atol=1e-3)


def test_longer_of_left_and_right_bone_is_used_for_both():
    driving = dance(1)
    character = driving[0].copy()
    character[3, :2] = character[2, :2] + 0.4 * (character[3, :2] - character[2, :2])  # foreshortened
    character[4, :2] = character[3, :2] + (driving[0, 4, :2] - driving[0, 3, :2])
    np.testing.assert_allclose(retarget(driving, character), driving, atol=1e-3)


def test_foreshortening_is_preserved_and_stretch_is_limited():
    driving = np.repeat(dance(1), 4, axis=0)
    for f, factor in enumerate((1.0, 0.4, 1.05, 1.8)):
        driving[f, 4, :2] = driving[0, 3, :2] + factor * (driving[0, 4, :2] - driving[0, 3, :2])
    character = body(100, 60, 150)  # 50% of the size
    result = retarget(driving, character)
    np.testing.assert_allclose(
        length(result, 3, 4), length(character, 3, 4) * np.array([1, 0.4, 1.05, 1.1]), rtol=1e-4
    )


def test_nodding_moves_only_the_head():
    driving = dance()
    nodding = driving.copy()
    head = [0, 14, 15, 16, 17]
    shift = 0.5 * (driving[4, 1, :2] - driving[4, 0, :2])
    nodding[4, head, :2] += shift
    character = body(300, 100, 600)
    still, moved = retarget(driving, character), retarget(nodding, character)
    np.testing.assert_allclose(moved[4, head, :2], still[4, head, :2] + 2 * shift, atol=1e-3)
    moved[4, head] = still[4, head]
    np.testing.assert_allclose(moved, still, atol=1e-3)


def test_missing_bones_of_character_use_driver_lengths_at_its_scale():
    driving = dance()
    character = body(300, 100, 600)
    character[LEGS] = 0  # reference image ends at the hips
    complete = retarget(driving, body(300, 100, 600))
    np.testing.assert_allclose(retarget(driving, character), complete, atol=1e-3)


def test_missing_driver_joints_stay_missing():
    driving = dance()
    complete = retarget(driving, body(300, 100, 600))
    driving[2, 4] = 0  # a wrist
    driving[5, 3] = 0  # an elbow: the wrist attaches to the shoulder
    driving[6] = 0  # the full body
    driving[0, 13] = 0  # missing in the first frame: the second one replaces it
    result = retarget(driving, body(300, 100, 600))
    np.testing.assert_array_equal(result[..., 2], driving[..., 2])
    assert not result[driving[..., 2] == 0].any()
    found = driving[..., 2] > 0
    np.testing.assert_allclose(result[found], complete[found], atol=1e-3)


def test_missing_neck_is_interpolated_from_neighboring_frames():
    driving = np.stack([body(200 + 10 * f, 120, 300) for f in range(5)])
    complete = retarget(driving, body(300, 100, 600))
    driving[2, 1] = 0
    result = retarget(driving, body(300, 100, 600))
    np.testing.assert_allclose(np.delete(result, 1, axis=1), np.delete(complete, 1, axis=1), atol=1e-3)


@pytest.mark.parametrize("joint", [0, 1])
def test_missing_neck_or_nose_raises_user_error(joint):
    driving, character = dance(), body(300, 100, 600)
    incomplete = character.copy()
    incomplete[joint] = 0
    with pytest.raises(UserError, match="character's neck and nose"):
        retarget(driving, incomplete)
    driving[:, joint] = 0
    with pytest.raises(UserError, match="driver's neck and nose"):
        retarget(driving, character)
