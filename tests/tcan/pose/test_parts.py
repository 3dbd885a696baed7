"""Hands and faces: drawing, and how they follow the joints of the body."""

import json
from pathlib import Path

import numpy as np
import pytest

from tcan.errors import UserError
from tcan.pose import (
    PoseErrors,
    corrupt_poses,
    draw_poses,
    main_person_poses,
    read_poses,
    retarget,
    write_poses,
)
from tests.tcan.pose.bodies import body

LEFT, RIGHT, FACE = slice(18, 39), slice(39, 60), slice(60, 130)
WRISTS = {"left": (LEFT, 7), "right": (RIGHT, 4)}
FINGERS = np.array([(0, 0), *((5 * finger - 10, 4 * joint) for finger in range(5) for joint in range(1, 5))])
"""Points of a hand relative to its wrist, in pixels."""
OVAL = np.array([(9 * np.cos(a), 12 * np.sin(a)) for a in np.linspace(0, 6, 70)])


def with_parts(keypoints: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Keypoints `[18, 3]` with hands and a face: `[130, 3]`."""
    points = np.ones((130, 3), np.float32)
    points[:18] = keypoints
    for part, anchor, shape in ((LEFT, 7, FINGERS), (RIGHT, 4, -FINGERS), (FACE, 0, OVAL)):
        points[part, :2] = keypoints[anchor, :2] + scale * shape
    return points


@pytest.mark.parametrize("height, width", [(512, 512), (256, 1024)])
def test_drawing_equals_controlnet_aux(open_pose, height: int, width: int) -> None:
    """controlnet_aux accepts no missing point of a hand or face, and omits those in the first row or column."""
    rng = np.random.default_rng(0)
    poses = np.stack([with_parts(body(width / 2, height / 4, 0.6 * height, turn), 1.5) for turn in (0, 0.4)])
    scattered = rng.uniform(2, height - 2, (3, 130, 3)).astype(np.float32)
    scattered[..., 2] = 1
    scattered[2, 39:60] = 0  # without the right hand
    for points in (*poses, *scattered):
        util, point = open_pose.util, open_pose.body.Keypoint
        joints = [point(float(x) / width, float(y) / height) for x, y, _ in points]
        expected = util.draw_bodypose(np.zeros((height, width, 3), np.uint8), joints[:18])
        for part in (LEFT, RIGHT):
            if points[part].any():
                expected = util.draw_handpose(expected, joints[part])
        expected = util.draw_facepose(expected, joints[FACE])
        np.testing.assert_array_equal(draw_poses(points[None], height, width)[0], expected)


def test_known_points_have_known_colors() -> None:
    points = np.zeros((130, 3), np.float32)
    points[[0, 7]] = [(30, 20, 1), (100, 100, 1)]
    points[[18, 19]] = [(100, 100, 1), (140, 100, 1)]  # left wrist, first joint of the thumb
    points[60] = (60, 20, 1)
    image = draw_poses(points[None], 128, 160, 4)[0]
    assert image[100, 120].tolist() == [255, 0, 0]  # first edge: red
    assert image[100, 140].tolist() == image[96, 140].tolist() == [0, 0, 255] and not image[95, 140].any()
    assert image[20, 60].tolist() == image[17, 60].tolist() == [255, 255, 255] and not image[16, 60].any()
    thin = draw_poses(points[None], 128, 160, 2)[0]
    assert (
        thin[98, 140].any() and not thin[97, 140].any() and thin[100, 120].any() and not thin[102, 120].any()
    )

    points[7] = 0
    without_wrist = draw_poses(points[None], 128, 160, 4)[0]
    assert not without_wrist[90:].any() and without_wrist[20, 60].all()
    points[0] = 0
    assert not draw_poses(points[None], 128, 160, 4).any()


@pytest.mark.parametrize("method", ["robust", "paper"])
def test_hands_and_face_follow_the_retargeted_wrists_and_nose(method) -> None:
    """The character has a forearm three times, and a neck twice as long as the driver; other bones are equal."""
    driver = np.stack([with_parts(body(100 + 5 * frame, 80, 100)) for frame in range(4)])
    driver[2, 39:130:7] = 0  # single points that were not found
    character = body(300, 200, 100)
    for elbow, wrist in ((3, 4), (6, 7)):
        character[wrist, :2] = character[elbow, :2] + 3 * (character[wrist, :2] - character[elbow, :2])
    neck_to_nose = character[0, :2] - character[1, :2]
    character[[0, 14, 15, 16, 17], :2] += neck_to_nose

    result = retarget(driver, character, method)
    np.testing.assert_array_equal(result[:, :18], retarget(driver[:, :18], character, method))
    for frame in range(4):
        shift = 2 * 5 * frame  # of the neck: as large as the head
        for part, anchor, shape, factor in (
            (LEFT, 7, FINGERS, 3), (RIGHT, 4, -FINGERS, 3), (FACE, 0, OVAL, 2),
        ):  # fmt: skip
            found = driver[frame, part, 2] > 0
            expected = character[anchor, :2] + (shift, 0) + factor * shape
            np.testing.assert_allclose(result[frame, part, :2][found], expected[found], atol=2e-3)
            assert not result[frame, part][~found].any()


def test_hands_and_face_without_wrist_and_nose_are_dropped() -> None:
    driver = np.stack([with_parts(body(100, 80, 100))] * 3)
    driver[1, [0, 7]] = 0
    result = retarget(driver, body(90, 70, 80))
    assert not result[1, LEFT].any() and not result[1, FACE].any() and result[1, RIGHT].all(axis=0)[2]
    assert (result[[0, 2], 18:, 2] == 1).all()


def test_training_errors_move_hands_with_their_wrists() -> None:
    """The joints get the same errors as without hands, so that the random numbers of both trainings are equal."""
    poses = np.stack([with_parts(body(60 + frame, 30, 80)) for frame in range(200)])
    errors = PoseErrors(dropout=0.2, jitter=0.02, outliers=0.3)
    result = errors.apply(poses, 128, np.random.default_rng(1))
    bodies = errors.apply(poses[:, :18], 128, np.random.default_rng(1))
    np.testing.assert_array_equal(result[:, :18], bodies)
    people = errors.apply(np.stack([poses, poses], axis=1), 128, np.random.default_rng(1))
    assert people.shape == (200, 2, 130, 3)
    for part, anchor in (*WRISTS.values(), (FACE, 0)):
        found = bodies[:, anchor, 2] > 0
        assert 0.2 < found.mean() < 0.8 and not result[~found, part].any()
        relative = result[found, part, :2] - result[found, anchor, None, :2]
        np.testing.assert_allclose(
            relative, poses[found, part, :2] - poses[found, anchor, None, :2], atol=1e-4
        )


def test_points_at_integer_positions_stay_there_without_errors() -> None:
    """Drawing rounds positions down, so 36.999 instead of 37 would move a point by a pixel."""
    poses = np.stack([with_parts(body(60.3 + 0.7 * frame, 30, 80)) for frame in range(50)])
    poses[:, 18:, :2] = poses[:, 18:, :2].round()
    np.testing.assert_array_equal(PoseErrors().apply(poses, 128, np.random.default_rng(0)), poses)
    np.testing.assert_array_equal(corrupt_poses(poses, "none", 0.1, 0.1, 128, 0), poses)


def test_errors_of_animations_move_hands() -> None:
    poses = np.stack([with_parts(body(60 + frame, 30, 80)) for frame in range(10)])
    moved = corrupt_poses(poses, "offset", 1.0, 0.1, 128, 0)
    shift = moved[0, 1, :2] - poses[0, 1, :2]
    assert np.linalg.norm(shift) == pytest.approx(12.8, rel=1e-3)
    np.testing.assert_allclose(moved[..., :2], poses[..., :2] + shift, atol=1e-4)
    swapped = corrupt_poses(poses, "swaps", 1.0, 0.1, 128, 0)
    expected = poses[:, LEFT, :2] - poses[:, 7, None, :2] + poses[:, 4, None, :2]
    np.testing.assert_allclose(swapped[:, LEFT, :2], expected, atol=1e-4)


def test_the_hands_of_the_tracked_person_are_cleaned_with_its_joints() -> None:
    """A hand that is missing in two frames is interpolated, and hands are exchanged back with their arms."""
    walk = np.stack([with_parts(body(40 + 2 * frame, 30, 80)) for frame in range(20)])
    small = np.stack([with_parts(body(200, 60, 40))] * 20)
    seen = walk.copy()
    seen[5:7, LEFT] = 0
    arms = [2, 3, 4, 5, 6, 7, *range(18, 60)]
    other = [5, 6, 7, 2, 3, 4, *range(39, 60), *range(18, 39)]
    seen[12:14, arms] = walk[12:14][:, other]
    people = [
        np.stack(pair[:: 1 if frame % 2 else -1]) for frame, pair in enumerate(zip(seen, small, strict=True))
    ]
    found = main_person_poses(people, 200, 300, "walk.mp4", smoothing_window=5)
    np.testing.assert_allclose(found, walk, atol=1e-3)


def test_pose_files_keep_hands_and_faces(tmp_path: Path) -> None:
    poses = np.stack([with_parts(body(60 + frame, 30, 80)) for frame in range(3)]).round(2)
    poses[1, LEFT] = 0
    write_poses(poses, tmp_path / "poses.json", 128, 128, 24)
    np.testing.assert_allclose(np.stack(read_poses(tmp_path / "poses.json").people)[:, 0], poses, atol=0.006)
    write_poses(poses[:, :18], tmp_path / "bodies.json", 128, 128, 24)
    assert "hand" not in (tmp_path / "bodies.json").read_text()
    assert read_poses(tmp_path / "bodies.json").people[0].shape == (1, 18, 3)


def test_openpose_folder_with_hands(tmp_path: Path) -> None:
    """Files as OpenPose writes them, with BODY_25; a person's empty lists mean that nothing was found."""
    points = with_parts(body(60, 30, 80))
    body_25 = np.zeros((25, 3))
    body_25[[*range(8), *range(9, 19)]] = points[:18]
    person = {
        "person_id": [-1], "pose_keypoints_2d": body_25.ravel().tolist(), "face_keypoints_2d": [],
        "hand_left_keypoints_2d": points[LEFT].ravel().tolist(), "hand_right_keypoints_2d": [0] * 63,
    }  # fmt: skip
    (tmp_path / "a_000_keypoints.json").write_text(json.dumps({"version": 1.3, "people": [person]}))
    (tmp_path / "a_001_keypoints.json").write_text(json.dumps({"version": 1.3, "people": []}))
    first, second = read_poses(tmp_path).people
    assert first.shape == (1, 130, 3) and second.shape == (0, 130, 3)
    np.testing.assert_allclose(first[0, :39], points[:39], atol=1e-4)
    assert not first[0, 39:].any()
    person["hand_left_keypoints_2d"] = [1, 2, 3]
    (tmp_path / "a_001_keypoints.json").write_text(json.dumps({"people": [person]}))
    with pytest.raises(UserError, match=r"frame 1: invalid hand_left_keypoints_2d; give x, y, score of 21"):
        read_poses(tmp_path)
