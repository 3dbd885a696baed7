"""Crops around the person of an image."""

import numpy as np
import pytest

from tcan.crop import crop_box, fit_image, fit_keypoints
from tcan.person_box import describe_crop, person_box


def person(x: float, top: float, height: float) -> np.ndarray:
    """Keypoints `[18, 3]` of an upright person: eyes at `top`, ankles at `top + height`, 0.4 `height` wide."""
    joints = [
        (0, 0.03), (0, 0.17), (-0.1, 0.17), (-0.15, 0.33), (-0.2, 0.5), (0.1, 0.17), (0.15, 0.33), (0.2, 0.5),
        (-0.08, 0.5), (-0.08, 0.75), (-0.08, 1), (0.08, 0.5), (0.08, 0.75), (0.08, 1),
        (-0.02, 0), (0.02, 0), (-0.05, 0.01), (0.05, 0.01),
    ]  # fmt: skip
    return np.array([(x + dx * height, top + dy * height, 1) for dx, dy in joints], np.float32)


def inside(keypoints: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    return ((keypoints[:, :2] >= box[:2]) & (keypoints[:, :2] <= box[2:])).all(axis=1)


@pytest.mark.parametrize(
    ("keypoints", "source"),
    [
        (person(64, 20, 90), (128, 128)),
        (person(128, 20, 90), (128, 256)),
        (person(95, 20, 60), (100, 230)),
        (np.zeros((18, 3), np.float32), (128, 256)),
    ],
)
def test_crop_stays_centered_if_it_contains_all_joints(
    keypoints: np.ndarray, source: tuple[int, int]
) -> None:
    assert person_box(keypoints, *source, 64, 64) == crop_box(*source, 64, 64)


@pytest.mark.parametrize("x", [30, 130, 500, 570])
def test_person_at_the_side_of_a_wide_image_is_in_the_crop(x: float) -> None:
    keypoints = person(x, 30, 150)
    x0, y0, x1, y1 = person_box(keypoints, 200, 600, 64, 64)
    assert (x1 - x0, y0, y1) == (200, 0, 200)
    assert (
        inside(keypoints, (x0, y0, x1, y1)).sum() == ((keypoints[:, 0] >= 0) & (keypoints[:, 0] <= 600)).sum()
    )
    assert x0 == pytest.approx(
        np.clip(x - 100, 0, 400), abs=1
    )  # centered on the person, as far as the image allows


def test_head_and_legs_of_a_portrait_image_are_in_the_crop() -> None:
    """A phone photo of 9:16, the person in its lower part: the centered square ends at y = 1500."""
    keypoints = person(540, 850, 850)
    x0, y0, x1, y1 = person_box(keypoints, 1920, 1080, 512, 512)
    assert (x0, x1, y1 - y0) == (0, 1080, 1080)
    head, sole = 850 - 0.1 * 850, 1700 + 0.05 * 850
    assert y0 <= head and y1 >= sole
    assert (
        describe_crop(keypoints, (x0, y0, x1, y1)) == f"cropped to 0,{y0:.0f},1080,{y1:.0f} around the person"
    )


def test_crop_of_a_person_who_does_not_fit_contains_the_head() -> None:
    """Knees (y = 1350) and ankles (1700) are outside."""
    keypoints = person(540, 300, 1400)
    box = person_box(keypoints, 1920, 1080, 512, 512)
    assert box[3] - box[1] == 1080 and box[1] <= 300 - 0.1 * 1400
    assert inside(keypoints, box)[[0, 1, 14, 15, 16, 17]].all()
    assert "who does not fit: 4 of 18 joints are outside; use a size of" in describe_crop(keypoints, box)


def test_two_people_at_the_side_of_a_wide_image_are_in_the_crop() -> None:
    """The centered square ends at x = 400. Two people who do not fit have their heads in the crop."""
    people = np.stack([person(400, 30, 150), person(490, 60, 120)])
    x0, y0, x1, y1 = person_box(people, 200, 600, 64, 64)
    assert inside(people.reshape(-1, 3), (x0, y0, x1, y1)).all()
    assert describe_crop(people, (x0, y0, x1, y1)) == f"cropped to {x0:.0f},0,{x1:.0f},200 around the people"
    apart = np.stack([person(360, 10, 180), person(530, 10, 180)])
    box = person_box(apart, 200, 600, 64, 64)
    assert inside(apart[:, [0, 1, 14, 15, 16, 17]].reshape(-1, 3), box).all()
    assert "around the people, who do not fit: " in describe_crop(apart, box)


def test_undetected_joints_and_joints_outside_the_image_do_not_move_the_crop() -> None:
    keypoints = person(300, 30, 150)
    keypoints[10] = 0
    keypoints[13] = (-50, 180, 1)
    assert person_box(keypoints, 200, 600, 64, 64) == crop_box(200, 600, 64, 64)


def test_keypoints_and_image_are_cropped_alike_around_a_person() -> None:
    """A white dot and its keypoint are mapped to the same position."""
    image = np.zeros((200, 600, 3), np.uint8)
    keypoints = person(500, 30, 150)
    x, y = keypoints[4, :2].round().astype(int)
    image[y - 4 : y + 4, x - 4 : x + 4] = 255
    box = person_box(keypoints, 200, 600, 64, 64)
    found = np.argwhere(fit_image(image, 64, 64, box)[..., 0] > 127).mean(axis=0) + 0.5
    mapped = fit_keypoints(keypoints, 200, 600, 64, 64, box)
    np.testing.assert_allclose(mapped[4, :2], found[::-1], atol=0.6)
