"""Pose detectors in ONNX files: hand-made networks that find coloured spots at known positions in a frame."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines import cli
from tcan.errors import UserError
from tcan.pose import PoseDetector, read_poses
from tcan.pose.onnx import OnnxPose
from tcan.video import write_image
from tcan.weights import load_pose_detector
from tcan.weights.check import describe

BOX = 128.0, 256.0  # width and height of every box in pixels of the person detector's input
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


class YellowPeople(nn.Module):
    """YOLOX's raw outputs for images whose people have a yellow center: a box in each yellow cell of stride 8."""

    def forward(self, bgr: Tensor) -> Tensor:
        blue, green, red = bgr[:, 0:1], bgr[:, 1:2], bgr[:, 2:3]
        yellow = functional.avg_pool2d((torch.minimum(red, green) - blue).relu() / 255, 8).flatten(1)
        outputs = []
        for cells, stride in ((yellow, 8), (torch.zeros(1, 1600), 16), (torch.zeros(1, 400), 32)):
            center, size = torch.tensor([0.5, 0.5]), torch.log(torch.tensor(BOX) / stride)
            constant = torch.cat([center, size]).expand(1, cells.shape[1], 4)
            outputs.append(torch.cat([constant, cells[..., None], torch.ones_like(cells)[..., None]], dim=2))
        return torch.cat(outputs, dim=1)


class SelectedPeople(YellowPeople):
    """The same with the selection inside: boxes, scores and classes; the second best cell is of another class."""

    def forward(self, bgr: Tensor) -> tuple[Tensor, Tensor]:
        score, cell = super().forward(bgr)[:, :6400, 4].topk(2)
        x, y = (cell % 80 + 0.5) * 8, (cell // 80 + 0.5) * 8
        w, h = BOX
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2, score], dim=2)
        return boxes, torch.tensor([[0, 1]])


class ColouredJoints(nn.Module):
    """SimCC's outputs: nose at the reddest pixel, left shoulder at the greenest, right shoulder at the bluest."""

    def __init__(self, points: int):
        super().__init__()
        self.points = points

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
        rgb = (x * std[:, None, None] + mean[:, None, None]) / 255
        others = torch.stack([rgb[:, [1, 2]].amax(1), rgb[:, [0, 2]].amax(1), rgb[:, [0, 1]].amax(1)], dim=1)
        joints = (rgb - others).relu()  # [B, 3, h, w]
        empty = torch.zeros_like(joints[:, :1])
        order = [joints[:, :1], *[empty] * 4, joints[:, 1:2], joints[:, 2:3], *[empty] * (self.points - 7)]
        maps = torch.cat(order, dim=1)
        return maps.amax(2).repeat_interleave(2, dim=2), maps.amax(3).repeat_interleave(2, dim=2)


def export(network: nn.Module, path: Path, height: int, width: int, batch: int | None) -> None:
    outputs = {"points": ["simcc_x", "simcc_y"], "boxes": ["boxes", "classes"]}[path.stem]
    outputs = outputs[: 1 if type(network) is YellowPeople else 2]
    axes = {} if batch else {name: {0: "batch"} for name in ("input", *outputs)}
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            network.eval(), (torch.zeros(batch or 2, 3, height, width),), path,
            input_names=["input"], output_names=outputs, dynamic_axes=axes, dynamo=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    export(YellowPeople(), folder / "boxes.onnx", 640, 640, 1)
    export(ColouredJoints(133), folder / "points.onnx", 384, 288, None)
    return folder


def spot(frame: np.ndarray, x: float, y: float, colour: tuple[int, int, int]) -> None:
    rows, columns = np.indices(frame.shape[:2])
    weight = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 18)[..., None]
    frame[:] = np.where(weight > 0.05, weight * colour, frame)


def draw(height: int, width: int, people: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """A frame with a person at each center, and keypoints `[P, 4, 2]` of nose, neck, right and left shoulder."""
    frame = np.zeros((height, width, 3), np.uint8)
    truth = []
    for x, y in people:
        cv2.rectangle(frame, (x - 12, y - 12), (x + 12, y + 12), YELLOW, -1)
        nose, right, left = (x + 3, y - 50), (x - 25, y - 25), (x + 27, y - 31)
        for joint, colour in ((nose, RED), (left, GREEN), (right, BLUE)):
            spot(frame, *joint, colour)
        truth.append([nose, ((right[0] + left[0]) / 2, (right[1] + left[1]) / 2), right, left])
    return frame, np.array(truth)


@pytest.mark.parametrize(
    "height, width, people",
    [(300, 500, [(250, 150)]), (500, 220, [(90, 300)]), (640, 640, [(120, 200), (450, 420)]), (240, 400, [])],
)
def test_joints_are_found_at_their_positions(
    folder: Path, height: int, width: int, people: list[tuple[int, int]]
) -> None:
    frame, truth = draw(height, width, people)
    detector = OnnxPose.from_folder(folder)
    assert isinstance(detector, PoseDetector)
    empty = np.zeros_like(frame)
    found, nobody, again = detector.detect(np.stack([frame, empty, frame]), batch_size=1)
    assert len(found) == len(people) and nobody.shape == (0, 18, 3) and found.dtype == np.float32
    np.testing.assert_array_equal(found, again)
    found = found[found[:, 0, 0].argsort()]
    np.testing.assert_allclose(found[:, [0, 1, 2, 5], :2], truth.reshape(-1, 4, 2), atol=1.5)
    assert (found[:, [0, 1, 2, 5], 2] > 0.8).all() and not found[:, [3, 4, *range(6, 18)]].any()


@pytest.mark.parametrize("points, batch", [(17, 2), (26, None)])
def test_networks_with_selection_and_fixed_batch(tmp_path: Path, points: int, batch: int | None) -> None:
    export(SelectedPeople(), tmp_path / "boxes.onnx", 640, 640, 1)
    export(ColouredJoints(points), tmp_path / "points.onnx", 256, 192, batch)
    frame, truth = draw(320, 320, [(162, 202)])
    detector = OnnxPose.from_folder(tmp_path)
    (box,) = detector.find_boxes(frame)
    np.testing.assert_allclose(box[2:] - box[:2], [64, 128])
    assert np.abs((box[2:] + box[:2]) / 2 - [162, 202]).max() <= 12  # any cell of the marker
    (found,) = detector.detect(frame[None])
    np.testing.assert_allclose(found[0, [0, 1, 2, 5], :2], truth[0], atol=1.5)


@pytest.mark.parametrize("option", ["--pretrained.pose", "--detector"])
def test_folder_is_a_source_of_the_pose_network(folder: Path, tmp_path: Path, option: str) -> None:
    frame, truth = draw(300, 500, [(250, 150)])
    write_image(frame, tmp_path / "person.png")
    options = [str(tmp_path / "person.png"), "--out", str(tmp_path / "person.json"), option]
    assert cli.main(["pose", *options, str(folder)]) == 0
    pose = read_poses(tmp_path / "person.json").people[0][0]
    np.testing.assert_allclose(pose[[0, 1, 2, 5], :2], truth[0], atol=1.5)
    detector = load_pose_detector(str(folder))
    detector.save_pretrained(tmp_path / "copy")
    assert OnnxPose.from_folder(tmp_path / "copy").fingerprint == detector.fingerprint
    assert detector.fingerprint in describe(tmp_path / "copy")


def test_other_files_are_user_errors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes.onnx").write_bytes((folder / "boxes.onnx").read_bytes())
    with pytest.raises(UserError, match=r"expected one YOLOX person detector .* found boxes.onnx"):
        OnnxPose.from_folder(tmp_path)
    (tmp_path / "points.onnx").write_bytes((folder / "boxes.onnx").read_bytes())
    with pytest.raises(UserError, match="keep only these two"):
        OnnxPose.from_folder(tmp_path)
    (tmp_path / "points.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(UserError, match="Git LFS pointer"):
        OnnxPose.from_folder(tmp_path)
    (tmp_path / "points.onnx").write_bytes((folder / "points.onnx").read_bytes()[:1000])
    with pytest.raises(UserError, match="no valid ONNX file") as error:
        OnnxPose.from_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_person_detector_that_accepts_any_size_runs_at_640(folder: Path, tmp_path: Path) -> None:
    network = onnx.load(folder / "boxes.onnx")
    for axis in (2, 3):
        network.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
    onnx.save(network, tmp_path / "boxes.onnx")
    (tmp_path / "points.onnx").write_bytes((folder / "points.onnx").read_bytes())
    frame, truth = draw(300, 500, [(250, 150)])
    (found,) = OnnxPose.from_folder(tmp_path).detect(frame[None])
    np.testing.assert_allclose(found[0, [0, 1, 2, 5], :2], truth[0], atol=1.5)


def test_too_narrow_frames_and_single_files_are_user_errors(folder: Path) -> None:
    with pytest.raises(UserError, match="frame of 2000 x 1 pixels: too narrow"):
        OnnxPose.from_folder(folder).detect(np.zeros((1, 1, 2000, 3), np.uint8))
    with pytest.raises(UserError, match="a single ONNX file; give a folder with two"):
        load_pose_detector(str(folder / "points.onnx"))
    assert describe(folder / "points.onnx") == (
        "pose network with 133 points for people of 288 x 384 pixels, in an ONNX file"
    )
    assert (
        describe(folder / "boxes.onnx") == "person detector for images of 640 x 640 pixels, in an ONNX file"
    )
