"""The detector of coordinates: what its losses prefer, and its ONNX files in `OnnxPose`."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.puppets import mini_coordinates
from pipelines.puppets.corpus import SIZE, image_corpus
from pipelines.puppets.mini_coordinates import (
    BINS,
    BOX_MARGIN,
    JOINTS,
    PEAK,
    Coordinates,
    PersonBox,
    box_batch,
    box_loss,
    coordinate_loss,
    crop_batch,
    export,
    images_at,
    person_box,
)
from tcan.pose.onnx import OnnxPose
from tests.tcan.pose.bodies import body

POSE = body(64, 30, 80)
FRAME = np.full((SIZE, SIZE, 3), 60, np.uint8)


class Known(Coordinates):
    """Certain of one bin of each joint, whatever the image."""

    def __init__(self, bins: np.ndarray):
        super().__init__()
        self.bins = torch.from_numpy(bins)

    def logits(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        nothing = 0 * rgb.mean((1, 2, 3))[:, None, None]  # exported networks need an input
        x, y = (nn.functional.one_hot(self.bins[:, axis], BINS) * 20.0 for axis in (0, 1))
        return x + nothing, y + nothing


def bins_in_crop(seed: int) -> np.ndarray:
    """Positions of the joints in the crop of `crop_batch`, from images with a bright spot at one joint."""
    bins = []
    for joint in JOINTS:
        frame = FRAME.copy()
        cv2.circle(frame, tuple(POSE[joint, :2].round().astype(int).tolist()), 1, (255, 255, 255), -1)
        bright = crop_batch(frame[None], POSE[None], np.random.default_rng(seed))["rgb"][0].mean(0)
        rows, columns = torch.nonzero(bright > bright.max() - 0.3, as_tuple=True)
        bins.append([2 * columns.float().mean(), 2 * rows.float().mean()])
    return np.array(bins).round().astype(int)


def test_coordinate_loss_is_lowest_at_the_joints_of_the_crop() -> None:
    bins = bins_in_crop(0)
    batch = crop_batch(FRAME[None], POSE[None], np.random.default_rng(0))
    losses = [
        float(coordinate_loss(Known((bins + shift).clip(0, BINS - 1)), batch)) for shift in (0, 12, -12)
    ]
    assert losses[0] < min(losses[1:])


def test_certain_network_has_scores_above_one_and_uniform_one_near_zero() -> None:
    x, y = Known(np.full((17, 2), 100))(torch.zeros(1, 3, SIZE, SIZE))
    assert (x.argmax(2) == 100).all() and x.max() == pytest.approx(1 / PEAK, rel=1e-3)
    assert x.sum() == pytest.approx(17 / PEAK, rel=1e-3) and y.shape == (1, 17, BINS)


def test_box_loss_is_lowest_for_the_box_with_margin_and_for_empty_images_without_a_person() -> None:
    class Fixed(PersonBox):
        def __init__(self, box: np.ndarray, logits: tuple[float, float]):
            super().__init__()
            self.box, self.logits = torch.from_numpy(box), torch.tensor(logits)

        def raw(self, bgr: Tensor) -> tuple[Tensor, Tensor]:
            return self.box.expand(len(bgr), 4), self.logits

    found = POSE[:, :2]
    extent = np.ptp(found, axis=0)
    box = np.concatenate([found.min(0) - BOX_MARGIN * extent, found.max(0) + BOX_MARGIN * extent]).astype(
        np.float32
    )
    np.testing.assert_allclose(person_box(POSE), box, atol=1e-4)
    batch = box_batch(np.stack([FRAME, FRAME]), np.stack([np.zeros_like(POSE), POSE]))
    right = float(box_loss(Fixed(box, (-9.0, 9.0)), batch))
    assert right < 1e-3
    assert float(box_loss(Fixed(box + 10, (-9.0, 9.0)), batch)) == pytest.approx(10 * 10 / SIZE, abs=1e-3)
    assert float(box_loss(Fixed(box, (9.0, 9.0)), batch)) > 4


def test_exported_files_are_a_pose_detector_that_maps_crops_back_to_the_frame(tmp_path: Path) -> None:
    class Center(PersonBox):
        def raw(self, bgr: Tensor) -> tuple[Tensor, Tensor]:
            brightness = bgr.mean((1, 2, 3))
            return brightness[:, None] * 0 + torch.tensor([[32.0, 32.0, 96.0, 96.0]]), brightness * 0 + 3

    export(Center(), tmp_path / "boxes.onnx", ["boxes"])
    export(Known(np.full((17, 2), BINS // 4)), tmp_path / "coordinates.onnx", ["simcc_x", "simcc_y"])
    detector = OnnxPose.from_folder(tmp_path)
    (people,) = detector.detect(FRAME[None])
    # The crop shows the box with 1.25 times its side: 80 pixels from 24 on; a quarter of them is 20.
    assert people.shape == (1, 18, 3)
    np.testing.assert_allclose(people[0, [0, 4, 10], :2], 24 + 20, atol=0.5)
    assert (people[0, :, 2] > 0.9).all()


def test_training_images_are_a_function_of_the_step(tmp_path: Path) -> None:
    images = image_corpus(tmp_path, characters=20)
    first, again, other = (images_at(images, step) for step in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])
    assert not first[1][: mini_coordinates.EMPTY_IMAGES].any() and first[1][2:, :, 2].any()
