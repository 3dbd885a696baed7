import logging

import numpy as np
import pytest

from pipelines.puppets.world import sample_clip
from tcan.errors import UserError
from tcan.pose.retarget import retarget
from tcan.pose.skeleton import PARENTS
from tests.tcan.pose.bodies import body

LEGS = [9, 10, 12, 13]


METHODS = pytest.mark.parametrize("method", ["robust", "paper"])


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


@METHODS
def test_equal_proportions_leave_driving_unchanged(method):
    driving = dance()
    driving[..., 2] = 0.7
    np.testing.assert_allclose(retarget(driving, driving[0], method), driving, atol=1e-3)


@METHODS
def test_result_has_size_and_position_of_character(method):
    driving = dance()
    character = body(350, 90, 600)  # twice as large
    expected = driving.copy()
    expected[..., :2] = (driving[..., :2] - driving[0, 1, :2]) * 2 + character[1, :2]
    np.testing.assert_allclose(retarget(driving, character, method), expected, atol=1e-3)


@METHODS
def test_short_arms_stay_short_and_move_the_hands(method):
    driving = dance()
    character = driving[0].copy()
    for shoulder, elbow, wrist in ((2, 3, 4), (5, 6, 7)):
        upper, lower = character[elbow] - character[shoulder], character[wrist] - character[elbow]
        character[elbow] = character[shoulder] + 0.5 * upper
        character[wrist] = character[elbow] + 0.6 * lower
    character[:, 2] = 1
    result = retarget(driving, character, method)
    expected = driving[..., :2].copy()
    for shoulder, elbow, wrist in ((2, 3, 4), (5, 6, 7)):
        upper, lower = (driving[:, b, :2] - driving[:, a, :2] for a, b in ((shoulder, elbow), (elbow, wrist)))
        expected[:, elbow] = driving[:, shoulder, :2] + 0.5 * upper
        expected[:, wrist] = expected[:, elbow] + 0.6 * lower
    np.testing.assert_allclose(result[..., :2], expected, atol=1e-3)


@METHODS
def test_longer_of_left_and_right_bone_is_used_for_both(method):
    driving = dance(1)
    character = driving[0].copy()
    character[3, :2] = character[2, :2] + 0.4 * (character[3, :2] - character[2, :2])  # foreshortened
    character[4, :2] = character[3, :2] + (driving[0, 4, :2] - driving[0, 3, :2])
    np.testing.assert_allclose(retarget(driving, character, method), driving, atol=1e-3)


def test_paper_foreshortening_is_relative_to_the_first_frame_and_stretch_is_limited():
    driving = np.repeat(dance(1), 4, axis=0)
    for f, factor in enumerate((1.0, 0.4, 1.05, 1.8)):
        driving[f, 4, :2] = driving[0, 3, :2] + factor * (driving[0, 4, :2] - driving[0, 3, :2])
    character = body(100, 60, 150)  # 50% of the size
    result = retarget(driving, character, "paper")
    np.testing.assert_allclose(
        length(result, 3, 4), length(character, 3, 4) * np.array([1, 0.4, 1.05, 1.1]), rtol=1e-4
    )


@METHODS
def test_nodding_moves_only_the_head(method):
    driving = dance()
    nodding = driving.copy()
    head = [0, 14, 15, 16, 17]
    shift = 0.5 * (driving[4, 1, :2] - driving[4, 0, :2])
    nodding[4, head, :2] += shift
    character = body(300, 100, 600)
    still, moved = retarget(driving, character, method), retarget(nodding, character, method)
    np.testing.assert_allclose(moved[4, head, :2], still[4, head, :2] + 2 * shift, atol=1e-3)
    moved[4, head] = still[4, head]
    np.testing.assert_allclose(moved, still, atol=1e-3)


@METHODS
def test_missing_bones_of_character_use_driver_lengths_at_its_scale(method):
    driving = dance()
    character = body(300, 100, 600)
    character[LEGS] = 0  # reference image ends at the hips
    complete = retarget(driving, body(300, 100, 600), method)
    np.testing.assert_allclose(retarget(driving, character, method), complete, atol=1e-3)


@METHODS
def test_missing_driver_joints_stay_missing(method):
    driving = dance()
    complete = retarget(driving, body(300, 100, 600), method)
    driving[2, 4] = 0  # a wrist
    driving[5, 3] = 0  # an elbow: the wrist attaches to the shoulder
    driving[6] = 0  # the full body
    driving[0, 13] = 0  # missing in the first frame: the second one replaces it
    result = retarget(driving, body(300, 100, 600), method)
    np.testing.assert_array_equal(result[..., 2], driving[..., 2])
    assert not result[driving[..., 2] == 0].any()
    found = driving[..., 2] > 0
    np.testing.assert_allclose(result[found], complete[found], atol=1e-3)


@METHODS
def test_missing_neck_is_interpolated_from_neighboring_frames(method):
    driving = np.stack([body(200 + 10 * f, 120, 300) for f in range(5)])
    complete = retarget(driving, body(300, 100, 600), method)
    driving[2, 1] = 0
    result = retarget(driving, body(300, 100, 600), method)
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


def shorten(poses: np.ndarray, joints: list[int], factor: float) -> np.ndarray:
    """Multiply the bones that end at the joints by a factor; everything below them moves along."""
    result = poses.copy()
    children = {j: [j] for j in range(18)}
    for joint, parent in reversed(PARENTS.items()):
        children[parent] += children[joint]
    for joint in joints:
        bone = poses[..., joint, :2] - poses[..., PARENTS[joint], :2]
        result[..., children[joint], :2] += (factor - 1) * bone[..., None, :]
    return result


@pytest.mark.parametrize("nose", [0.3, 0.08, 0.0])
def test_first_frame_with_a_bowed_head_does_not_change_the_movement_of_the_body(nose):
    """The neck travels 42 px in the driver; the character has 50% of the driver's neck-nose length: 21 px."""
    upright = dance()
    bowed = upright.copy()
    for f, factor in enumerate((nose, (1 + nose) / 2)):
        bowed[f] = shorten(upright[f], [0], factor)
    character = body(100, 60, 150)
    expected, result = retarget(upright, character), retarget(bowed, character)
    np.testing.assert_allclose(np.ptp(result[:, 1, 0]), 21, atol=1)
    body_joints = [j for j in range(18) if j not in (0, 14, 15, 16, 17)]
    np.testing.assert_allclose(result[:, body_joints], expected[:, body_joints], atol=1e-3)
    np.testing.assert_allclose(result[2:], expected[2:], atol=1e-3)


def test_paper_uses_the_first_frame_in_which_nose_and_neck_differ():
    upright, character = dance(), body(100, 60, 150)
    bowed = upright.copy()
    bowed[0] = shorten(upright[0], [0], 0.5)
    travel = np.ptp(retarget(bowed, character, "paper")[:, 1, 0])
    np.testing.assert_allclose(travel, 42, rtol=1e-4)  # twice the movement, see the test above
    bowed[0] = shorten(upright[0], [0], 0)
    result = retarget(bowed, character, "paper")
    np.testing.assert_allclose(result[1:], retarget(upright, character, "paper")[1:], atol=1e-3)


@pytest.mark.parametrize(
    "joints", [[4], [3, 4, 6, 7], [2, 5, 8, 11], [9, 12]], ids=["hand", "arms", "profile", "seated"]
)
def test_bones_that_point_at_the_camera_in_the_first_frames_have_full_length_later(joints):
    driving = dance(9)
    first = driving.copy()
    for f, factor in enumerate((0.1, 0.2, 0.4, 0.7)):
        first[f] = shorten(driving[f], joints, factor)
    character = body(300, 100, 600)
    result = retarget(first, character)
    np.testing.assert_allclose(result[4:], retarget(driving, character)[4:], atol=1e-3)
    for joint in joints:  # foreshortening is that of the driver, in the first frame as well
        ratio = length(result, PARENTS[joint], joint) / length(character, PARENTS[joint], joint)
        np.testing.assert_allclose(ratio, [0.1, 0.2, 0.4, 0.7, 1, 1, 1, 1, 1], rtol=1e-3)


def test_bone_foreshortened_in_all_frames_has_the_full_length_of_the_other_side():
    driving, character = dance(), body(300, 100, 600)
    result = retarget(shorten(driving, [4], 0.5), character)
    np.testing.assert_allclose(length(result, 3, 4), 0.5 * length(character, 3, 4), rtol=1e-3)


@pytest.mark.parametrize(
    ("joints", "factor", "warning"),
    [
        ([3, 4, 6, 7], 0.05, "right_elbow, right_wrist, left_elbow, left_wrist; bone lengths are estimated"),
        ([9, 12], 0.2, "right_knee, left_knee; bone lengths are estimated from the body proportions"),
        ([2, 5], 0.1, "right_shoulder, left_shoulder; bone lengths are estimated"),
        ([0], 0.1, "nose; bone lengths are estimated"),
        ([7], 0.2, "left_wrist; bone lengths are those of the other side"),
    ],
    ids=["both arms at the camera", "seated", "profile", "bowed head", "one hand"],
)
def test_foreshortened_bones_of_the_image_get_plausible_lengths(joints, factor, warning, caplog):
    """The character is the dancer of the driving video: its true lengths are the driver's."""
    driving = dance()
    with caplog.at_level(logging.WARNING, "tcan"):
        result = retarget(driving, shorten(driving[0], joints, factor))
    (message,) = caplog.messages
    assert message.startswith("retargeting: foreshortened in the image: " + warning)
    np.testing.assert_allclose(result, driving, atol=1e-2)


def test_joints_that_are_never_in_sight_are_named(caplog):
    legs = "right_knee, right_ankle, left_knee, left_ankle"
    driving, character = dance(), dance(1)[0]
    character[LEGS] = 0
    with caplog.at_level(logging.WARNING, "tcan"):
        retarget(driving, character)
    assert caplog.messages == [
        f"retargeting: not found in the image: {legs}; bone lengths are estimated from the body proportions"
    ]
    caplog.clear()
    driving[:, LEGS] = 0
    with caplog.at_level(logging.WARNING, "tcan"):
        result = retarget(driving, dance(1)[0])
        retarget(driving[:, :], character)  # the lengths of legs that are not drawn do not matter
    assert caplog.messages == [f"retargeting: not found in any driving pose: {legs}; not drawn"] * 2
    assert not result[:, LEGS].any()


@METHODS
def test_complete_poses_of_other_proportions_log_no_warning(method, caplog):
    character = shorten(shorten(body(300, 100, 600), [3, 4, 6, 7, 9, 12], 0.5), [0], 1.8)  # large head
    with caplog.at_level(logging.WARNING, "tcan"):
        retarget(dance(), character, method)
    assert not caplog.messages


def test_robust_method_is_closer_to_the_true_movement_of_another_character():
    """Ground truth: the same dance, rendered with the other character. The dances bow, turn and raise arms."""
    errors = {"robust": [], "paper": []}
    for motion in range(4):
        driving = sample_clip("dance", motion, 16, every=3).keypoints
        for other in range(10, 13):
            character = sample_clip("dance", other, 1).keypoints[0]
            truth = sample_clip("dance", motion, 16, every=3, character_seed=other).keypoints
            for method, values in errors.items():
                result = retarget(driving, character, method)
                difference = (result - result[:1, 1:2])[..., :2] - (truth - truth[:1, 1:2])[..., :2]
                values.append(np.linalg.norm(difference, axis=-1)[result[..., 2] > 0].mean())
    assert np.mean(errors["robust"]) < 0.95 * np.mean(errors["paper"])


@METHODS
def test_nose_on_the_neck_raises_user_error(method):
    with pytest.raises(UserError, match="nose and neck of the driver are at the same position; "):
        retarget(shorten(dance(), [0], 0), body(300, 100, 600), method)
    with pytest.raises(UserError, match="nose and neck of the character are at the same position; "):
        retarget(dance(), shorten(body(300, 100, 600), [0], 0), "paper")


def test_unknown_method_raises_user_error():
    with pytest.raises(UserError, match="retargeting = other: unknown method; use robust or paper"):
        retarget(dance(), body(300, 100, 600), "other")


@pytest.mark.parametrize("shape", [(3, 17, 3), (3, 25, 3), (18, 3), (0, 18, 3), (3, 18, 2)])
def test_driving_poses_of_another_shape_raise_one_line_user_error(shape):
    with pytest.raises(
        UserError, match=r"the driving poses: shape \[.*\]; pass keypoints \[F, 18, 3\]"
    ) as error:
        retarget(np.ones(shape, np.float32), body(300, 100, 600))
    assert "\n" not in str(error.value)


def test_invalid_values_raise_one_line_user_error():
    driving, character = dance(), body(300, 100, 600)
    for value in (np.nan, np.inf):
        invalid = driving.copy()
        invalid[2, 4, 0] = value
        with pytest.raises(UserError, match="the driving poses: NaN or inf in the keypoints; "):
            retarget(invalid, character)
    with pytest.raises(UserError, match=r"the character: shape \[1, 18, 3\]; pass keypoints \[18, 3\]"):
        retarget(driving, character[None])
    with pytest.raises(UserError, match="the driving poses: not a numeric array; "):
        retarget([["a"]], character)
    with pytest.raises(UserError, match="the character: keypoints from 0 to 1; "):
        retarget(driving, body(0.5, 0.1, 0.8))
