import numpy as np
import pytest

from tcan.errors import UserError
from tcan.pose.retarget import retarget
from tests.tcan.pose.bodies import body

ARM = [2, 3, 4]
LEGS = [9, 10, 12, 13]


def dance(frames: int = 8, x: float = 200, y: float = 120, size: float = 300) -> np.ndarray:
    """A body that wanders and swings its forearms, all bones at their full length."""
    poses = np.stack([body(x + 6 * f, y + 3 * f, size, 0.05 * f) for f in range(frames)])
    for f, pose in enumerate(poses):
        for elbow, wrist in ((3, 4), (6, 7)):
            bone, angle = pose[wrist, :2] - pose[elbow, :2], 0.3 * f
            turned = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]] @ bone
            pose[wrist, :2] = pose[elbow, :2] + turned
    return poses


def length(poses: np.ndarray, a: int, b: int) -> np.ndarray:
    return np.linalg.norm(poses[..., a, :2] - poses[..., b, :2], axis=-1)


def test_a_driver_of_the_same_proportions_is_not_changed():
    driving = dance()
    driving[..., 2] = 0.7
    np.testing.assert_allclose(retarget(driving, driving[0]), driving, atol=1e-3)


def test_size_and_place_are_the_characters():
    driving = dance()
    character = body(350, 90, 600)  # twice as large
    expected = driving.copy()
    expected[..., :2] = (driving[..., :2] - driving[0, 1, :2]) * 2 + character[1, :2]
    np.testing.assert_allclose(retarget(driving, character), expected, atol=1e-3)


def test_short_arms_stay_short_and_carry_the_hand():
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


def test_the_larger_of_left_and_right_counts_for_both():
    driving = dance(1)
    character = driving[0].copy()
    character[3, :2] = character[2, :2] + 0.4 * (character[3, :2] - character[2, :2])  # points at the camera
    character[4, :2] = character[3, :2] + (driving[0, 4, :2] - driving[0, 3, :2])
    np.testing.assert_allclose(retarget(driving, character), driving, atol=1e-3)


def test_foreshortening_is_kept_and_stretching_limited():
    driving = np.repeat(dance(1), 4, axis=0)
    for f, share in enumerate((1.0, 0.4, 1.05, 1.8)):
        driving[f, 4, :2] = driving[0, 3, :2] + share * (driving[0, 4, :2] - driving[0, 3, :2])
    character = body(100, 60, 150)  # half as large
    result = retarget(driving, character)
    np.testing.assert_allclose(
        length(result, 3, 4), length(character, 3, 4) * np.array([1, 0.4, 1.05, 1.1]), rtol=1e-4
    )


def test_a_nodding_head_moves_only_the_head():
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


def test_what_the_character_lacks_follows_at_its_size():
    driving = dance()
    character = body(300, 100, 600)
    character[LEGS] = 0  # a image down to the hips
    whole = retarget(driving, body(300, 100, 600))
    np.testing.assert_allclose(retarget(driving, character), whole, atol=1e-3)


def test_what_the_driver_lacks_stays_missing():
    driving = dance()
    whole = retarget(driving, body(300, 100, 600))
    driving[2, 4] = 0  # a wrist
    driving[5, 3] = 0  # an elbow: the wrist hangs on the shoulder
    driving[6] = 0  # everybody
    driving[0, 13] = 0  # in the first frame: the second stands for it
    result = retarget(driving, body(300, 100, 600))
    np.testing.assert_array_equal(result[..., 2], driving[..., 2])
    assert not result[driving[..., 2] == 0].any()
    there = driving[..., 2] > 0
    np.testing.assert_allclose(result[there], whole[there], atol=1e-3)


def test_without_a_neck_it_comes_from_the_frames_around():
    driving = np.stack([body(200 + 10 * f, 120, 300) for f in range(5)])
    whole = retarget(driving, body(300, 100, 600))
    driving[2, 1] = 0
    result = retarget(driving, body(300, 100, 600))
    np.testing.assert_allclose(np.delete(result, 1, axis=1), np.delete(whole, 1, axis=1), atol=1e-3)


@pytest.mark.parametrize("joint", [0, 1])
def test_no_neck_or_nose_is_said(joint):
    driving, character = dance(), body(300, 100, 600)
    lacking = character.copy()
    lacking[joint] = 0
    with pytest.raises(UserError, match="character's neck and nose"):
        retarget(driving, lacking)
    driving[:, joint] = 0
    with pytest.raises(UserError, match="driver's neck and nose"):
        retarget(driving, character)
