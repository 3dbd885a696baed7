"""Hand and face detection compared with controlnet_aux, on OpenPose's networks with random weights."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from tcan.errors import UserError
from tcan.pose.hands import FaceDetector, HandDetector


def random_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Random weights (Kaiming initialization) that preserve the variance of activations."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network.state_dict()


@pytest.fixture(scope="module")
def folder(open_pose, tmp_path_factory) -> Path:
    """Folder with `hand_pose_model.pth`, whose keys lack the network's block names, and `facenet.pth`."""
    path = tmp_path_factory.mktemp("openpose")
    hand = random_weights(open_pose.hand.handpose_model())
    torch.save({name.split(".", 1)[1]: value for name, value in hand.items()}, path / "hand_pose_model.pth")
    torch.save(random_weights(open_pose.face.FaceNet()), path / "facenet.pth")
    return path


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (2, 200, 240, 3), dtype=np.uint8)
    return np.stack(
        [cv2.normalize(cv2.GaussianBlur(f, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX) for f in noise]
    )


def people() -> list[np.ndarray]:
    """Body keypoints of two frames.

    Frame 0: one person with a left hand. Frame 1: one person with a smaller right hand and a face at the border, and
    one without hands or face.
    """
    left, right, none = np.zeros((3, 18, 3), np.float32)
    left[[5, 6, 7]] = [(120, 80, 1), (150, 90, 1), (180, 110, 0.5)]
    left[[0, 14, 15]] = [(105, 50, 1), (98, 45, 1), (113, 44, 1)]
    right[[2, 3, 4]] = [(200, 60, 1), (190, 90, 1), (170, 100, 1)]
    right[[0, 15]] = [(225, 30, 1), (212, 24, 1)]
    none[[1, 8, 11]] = [(50, 50, 1), (40, 90, 1), (60, 90, 1)]
    return [left[None], np.stack([right, none])]


def bodies(open_pose, keypoints: np.ndarray):
    joints = [open_pose.body.Keypoint(float(x), float(y)) if score else None for x, y, score in keypoints]
    return open_pose.body.BodyResult(joints, 1.0, 18)


@pytest.mark.slow
def test_hands_equal_controlnet_aux(open_pose, folder: Path, frames: np.ndarray) -> None:
    found = HandDetector.from_pretrained(folder).detect(frames, people())
    assert [hands.shape for hands in found] == [(1, 2, 21, 3), (2, 2, 21, 3)]
    reference = open_pose.hand.Hand(folder / "hand_pose_model.pth")
    seen = []
    for frame, keypoints, hands in zip(frames, people(), found, strict=True):
        expected = np.zeros((len(keypoints), 2, 21, 2))
        for i, body in enumerate(keypoints):
            for x, y, side, is_left in open_pose.util.handDetect(bodies(open_pose, body), frame):
                points = reference(frame[y : y + side, x : x + side, ::-1])
                expected[i, 0 if is_left else 1] = np.where(
                    points.any(1, keepdims=True), points + np.array([x, y]), 0
                )
                seen.append((i, is_left, side))
        assert np.abs(hands[..., :2] - expected).max() <= 1
        # controlnet_aux returns (0, 0) both for missing points and for peaks at (0, 0).
        assert ((hands[..., 2] > 0) == expected.any(-1)).mean() > 0.99
    assert len({side for _, _, side in seen}) == len(seen) == 2
    assert (found[0][0, 0, :, 2] > 0).mean() > 0.5
    assert not found[0][0, 1].any() and not found[1][0, 0].any() and not found[1][1].any()


def test_faces_equal_controlnet_aux(open_pose, folder: Path, frames: np.ndarray) -> None:
    found = FaceDetector.from_pretrained(folder).detect(frames, people())
    assert [faces.shape for faces in found] == [(1, 70, 3), (2, 70, 3)]
    reference = open_pose.face.Face(folder / "facenet.pth")
    for frame, keypoints, faces in zip(frames, people(), found, strict=True):
        x, y, side = open_pose.util.faceDetect(bodies(open_pose, keypoints[0]), frame)
        heatmaps = reference(np.ascontiguousarray(frame[y : y + side, x : x + side, ::-1]))
        # controlnet_aux drops missing points, which shifts the indices; one heatmap per call keeps them.
        for point, heatmap in zip(faces[0], heatmaps[:70], strict=True):
            expected = reference.compute_peaks_from_heatmaps(heatmap[None])
            assert len(expected) == (point[2] > 0)
            assert len(expected) == 0 or np.abs(point[:2] - (expected[0] + np.array([x, y]))).max() <= 1
    assert (found[0][0, :, 2] > 0).mean() > 0.5
    assert not found[1][1].any()


def test_missing_or_mismatched_weights_raise_user_error(folder: Path, tmp_path: Path) -> None:
    for source in ("mini", str(Path(__file__).parents[3] / "tcan" / "mini" / "pose")):
        with pytest.raises(UserError, match="detects only bodies"):
            HandDetector.from_pretrained(source)
    with pytest.raises(UserError, match=r"no facenet\.pth"):
        FaceDetector.from_pretrained(tmp_path)
    (tmp_path / "facenet.pth").write_bytes((folder / "hand_pose_model.pth").read_bytes())
    with pytest.raises(UserError, match=r"facenet\.pth: shapes do not match"):
        FaceDetector.from_pretrained(tmp_path)


def test_fingerprint_depends_on_weights(folder: Path) -> None:
    detector = FaceDetector.from_pretrained(folder)
    before = detector.fingerprint
    assert before == FaceDetector.from_pretrained(folder).fingerprint
    next(detector.network.parameters()).data += 1
    assert detector.fingerprint != before
