"""Pose files in each supported layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tcan.errors import UserError
from tcan.pose import read_poses, write_poses
from tests.tcan.pose.bodies import body

# Names of OpenPose's points, from its documentation: BODY_25, and COCO in the order of tcan.pose.skeleton.
BODY_25 = (
    *("Nose", "Neck", "RShoulder", "RElbow", "RWrist", "LShoulder", "LElbow", "LWrist", "MidHip"),
    *("RHip", "RKnee", "RAnkle", "LHip", "LKnee", "LAnkle", "REye", "LEye", "REar", "LEar"),
    *("LBigToe", "LSmallToe", "LHeel", "RBigToe", "RSmallToe", "RHeel"),
)
COCO = (
    *("Nose", "Neck", "RShoulder", "RElbow", "RWrist", "LShoulder", "LElbow", "LWrist"),
    *("RHip", "RKnee", "RAnkle", "LHip", "LKnee", "LAnkle", "REye", "LEye", "REar", "LEar"),
)


def frame(*people: np.ndarray, **fields: Any) -> dict[str, Any]:
    return fields | {
        "people": [{"person_id": [-1], "pose_keypoints_2d": person.tolist()} for person in people]
    }


def test_written_poses_are_read_back_and_file_has_one_line_per_frame(tmp_path: Path) -> None:
    poses = np.stack([body(50 + f, 40, 90.123, 0.1 * f) for f in range(3)])
    poses[1, 4] = 0
    write_poses(poses, tmp_path / "poses.json", height=128, width=96, fps=29.97)
    read = read_poses(tmp_path / "poses.json")
    assert (read.height, read.width, read.fps) == (128, 96, 29.97)
    np.testing.assert_allclose(np.concatenate(read.people), poses, atol=0.006)
    assert [file.name for file in tmp_path.iterdir()] == ["poses.json"]
    assert len((tmp_path / "poses.json").read_text().splitlines()) == 3 + 2


def test_reads_openpose_folder(tmp_path: Path) -> None:
    """BODY_25, one file per frame; no people in frame 1; one person with only hand keypoints in frame 2."""
    points = np.random.default_rng(0).uniform(1, 100, (2, 25, 3)).astype(np.float32)
    points[..., 2] /= 100
    points[0, 3, 2] = 0  # not found, despite its coordinates
    hand = {"pose_keypoints_2d": [], "hand_left_keypoints_2d": [1.0, 2.0, 0.5]}
    frames = [frame(*points.reshape(2, 75)), frame(), frame(points[0].ravel())]
    frames[2]["people"].append(hand)
    for number, content in enumerate(frames):
        name = f"dance_{number:012}_keypoints.json"
        (tmp_path / name).write_text(json.dumps(content | {"version": 1.3}))
    read = read_poses(tmp_path)
    assert [people.shape for people in read.people] == [(2, 18, 3), (0, 18, 3), (1, 18, 3)]
    assert (read.height, read.width, read.fps) == (None, None, None)
    for joint, name in enumerate(COCO):
        expected = points[:, BODY_25.index(name)] * (points[:, BODY_25.index(name), 2:] > 0)
        np.testing.assert_allclose(read.people[0][:, joint], expected)


def test_files_of_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        content = frame(body(30 + number, 20, 40).ravel())
        (tmp_path / f"dance{number}_keypoints.json").write_text(json.dumps(content), encoding="utf-8-sig")
    read = read_poses(tmp_path)
    np.testing.assert_allclose(
        np.concatenate(read.people), [body(30 + number, 20, 40) for number in range(12)]
    )


def test_reads_list_of_frames_and_single_frame(tmp_path: Path) -> None:
    one = frame(body(30, 20, 40).ravel(), canvas_height=64, canvas_width=48)
    for content, count in (([one, one], 2), (one, 1)):
        (tmp_path / "poses.json").write_text(json.dumps(content))
        read = read_poses(tmp_path / "poses.json")
        assert (len(read.people), read.height, read.width) == (count, 64, 48)
        np.testing.assert_allclose(read.people[-1][0], body(30, 20, 40))


def test_missing_neck_is_the_midpoint_of_the_shoulders(tmp_path: Path) -> None:
    person = body(30, 20, 40)
    person[[2, 5], 2] = 0.5, 0.25
    expected = person.copy()
    expected[1] = *(person[[2, 5], :2].mean(axis=0)), 0.25
    person[1] = 0
    one_shoulder = person.copy()
    one_shoulder[5] = 0
    (tmp_path / "poses.json").write_text(json.dumps([frame(person.ravel(), one_shoulder.ravel())]))
    read = read_poses(tmp_path / "poses.json").people[0]
    np.testing.assert_allclose(read[0], expected, rtol=1e-6)
    assert not read[1, 1].any()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "no frames with poses"),
        ("{}", "no frames with poses"),
        ('{"frames": [{"people": []}, 3]}', 'frame 1: no list of "people"'),
        ('{"frames": [{"people": [{"pose_keypoints_2d": [1, 2, 3]}]}]}', r"frame 0: .*\(54 numbers\)"),
        (f'[{{"people": [{{"pose_keypoints_2d": {[None] * 54}}}]}}]'.replace("None", "null"), "frame 0"),
        (f'[{{"people": [{{"pose_keypoints_2d": {[1.0] * 51}}}]}}]', r"frame 0: 17 points \(COCO-17\); "),
        (f'[{{"people": [{{"pose_keypoints_2d": {[0.5] * 54}}}]}}]', "keypoints from 0 to 1; multiply"),
        (f'[{{"people": [{{"pose_keypoints_2d": [NaN, {str([9.0] * 53)[1:]}}}]}}]', "frame 0: invalid"),
        ('{"frames": [{"people": []}], "fps": 1e-6}', "fps = 1e-06: must be from 0.1 to 1000; "),
        ('{"frames": [{"people": []}], "fps": 1001}', "fps = 1001: must be from 0.1 to 1000; "),
        ('{"frames": [{"people": []}], "fps": Infinity}', "fps = inf: must be a number > 0; "),
        ('{"frames": [{"people": []}], "fps": NaN}', "fps = nan: must be a number > 0; "),
        ('{"frames": [{"people": []}], "height": Infinity}', "height = inf: must be a number > 0; "),
        ('{"frames": [{"people": []}], "fps": "fast"}', "fps = fast: must be a number > 0; "),
    ],
)
def test_invalid_pose_file_raises_one_line_error(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "poses.json").write_text(content)
    with pytest.raises(UserError, match=reason) as error:
        read_poses(tmp_path / "poses.json")
    assert "poses.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_paths_and_foreign_folders_raise_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check the path"):
        read_poses(tmp_path / "missing.json")
    with pytest.raises(UserError, match=r"no \.json files in this folder"):
        read_poses(tmp_path)
    (tmp_path / "clips.json").write_text('{"frames": []}')
    with pytest.raises(UserError, match=r"not every \.json file is one frame"):
        read_poses(tmp_path)
    with pytest.raises(UserError, match="cannot write the poses"):
        write_poses(body(1, 1, 1)[None], tmp_path / "no" / "folder.json", 64, 64)
