"""PSNR of the face and the hands: squares at known positions, values by the formula."""

import numpy as np
import pytest

from pipelines.puppets.world import sample_clip
from tcan.metrics import region_metrics
from tcan.pose.skeleton import JOINTS


def pose(**joints: tuple[float, float]) -> np.ndarray:
    """Keypoints `[18, 3]` with the given joints only."""
    keypoints = np.zeros((18, 3), np.float32)
    for name, (x, y) in joints.items():
        keypoints[JOINTS.index(name)] = x, y, 1
    return keypoints


POSES = np.stack([pose(nose=(50, 40), neck=(50, 60), left_elbow=(60, 80), left_wrist=(80, 80)), pose()])
# The face: 24 pixels around the nose. The hand: 16 pixels around (86, 80).
FACE, HAND = (slice(28, 52), slice(38, 62)), (slice(72, 88), slice(78, 94))


@pytest.mark.parametrize(("name", "box", "other"), [("face", FACE, "hands"), ("hands", HAND, "face")])
def test_errors_count_inside_the_square_only(name: str, box: tuple[slice, slice], other: str) -> None:
    truth = np.full((2, 100, 100, 3), 100, np.uint8)
    inside, outside = truth.copy(), truth.copy()
    inside[0][box] += 10
    outside += 10
    outside[0][box] -= 10
    found = region_metrics(inside, truth, POSES)
    assert found[f"psnr_{name}"] == pytest.approx(20 * np.log10(255 / 10))
    assert found[f"psnr_{other}"] == np.inf
    assert region_metrics(outside, truth, POSES)[f"psnr_{name}"] == np.inf


def test_nobody_has_no_value_and_a_face_at_the_border_is_cut() -> None:
    truth = np.zeros((1, 40, 40, 3), np.uint8)
    assert all(np.isnan(value) for value in region_metrics(truth, truth, POSES[1:]).values())
    corner = pose(nose=(1, 2), neck=(1, 22))[None]
    assert region_metrics(truth + 20, truth, corner)["psnr_face"] == pytest.approx(20 * np.log10(255 / 20))


def test_squares_hold_the_faces_of_puppets() -> None:
    """Black eyes lower the PSNR of the face and not that of the hands."""
    clip = sample_clip("dance", 20_000_000, 4)
    eyes = [JOINTS.index(f"{side}_eye") for side in ("right", "left")]
    blank = clip.frames.copy()
    for frame, keypoints in zip(blank, clip.keypoints, strict=True):
        for x, y, _ in keypoints[eyes].astype(int):
            frame[y - 2 : y + 3, x - 2 : x + 3] = 0
    found = region_metrics(blank, clip.frames, clip.keypoints)
    assert found["psnr_face"] < 20 < found["psnr_hands"]
