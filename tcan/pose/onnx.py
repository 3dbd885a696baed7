"""Pose detection with ONNX files of RTMPose or DWPose: a YOLOX person detector, then a SimCC pose network for each person.

Sources: YOLOX (Ge et al., 2021), RTMPose (Jiang et al., 2023), DWPose (Yang et al., 2023), and the preprocessing in the configurations
of MMDetection and MMPose.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from tcan.errors import UserError, first_line
from tcan.onnx_file import load_session, run_session
from tcan.pose.parts import BODY, FACE, LEFT_HAND, NUM_POINTS, RIGHT_HAND, keep_parts

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PADDING_VALUE = 114  # gray of YOLOX's letterbox
STRIDES = (8, 16, 32)
BOX_INPUT = 640  # height and width of a person detector that accepts any size
PERSON = 0  # class of COCO
MIN_BOX_SCORE = 0.3
MAX_OVERLAP = 0.45  # intersection over union of two boxes of different people
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB
BOX_PADDING = 1.25
BINS_PER_PIXEL = 2
MIN_SCORE = 0.3
"""Joints below it count as not found, as in DWPose."""
COUNTS = (17, 26, 133)
"""COCO, Halpe and whole-body points. The first 17 are COCO's in all of them."""
WITH_PARTS = COUNTS[2]
PARTS = (
    (LEFT_HAND, slice(91, 112)),
    (RIGHT_HAND, slice(112, 133)),
    (slice(FACE.start, FACE.start + 68), slice(23, 91)),
)
"""Points of each part, ours and those of the network, which lacks the pupils: OpenPose's last two points of the face."""
COCO = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
"""COCO's point of each of OpenPose's joints; the neck is the center of the shoulders."""


class OnnxPose:
    """A person detector and a pose network, as a `tcan.pose.PoseDetector`.

    Args:
        boxes: maps BGR images, float32 `[1, 3, H, W]` in [0, 255], to YOLOX's raw outputs `[1, N, 5 + classes]`, or to boxes
            and scores `[1, N, 5]` and optionally classes `[1, N]`.
        points: maps normalized RGB crops `[B, 3, h, w]` to the scores of x `[B, K, 2 w]` and y `[B, K, 2 h]`.
        files: of the two networks.
        device: of the two networks.
        hands, face: whether `detect` returns these parts, too; the pose network must have the whole-body points.
    """

    def __init__(
        self,
        boxes: "InferenceSession",
        points: "InferenceSession",
        files: Sequence[Path],
        device: torch.device | str = "cpu",
        hands: bool = False,
        face: bool = False,
    ):
        self.boxes, self.points, self.files = boxes, points, files
        self.hands, self.face = hands, face
        self.device = torch.device(device)
        digests = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
        self.fingerprint = hashlib.sha256(digests).hexdigest()[:16]

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a folder contains ONNX files."""
        return any(folder.glob("*.onnx"))

    @property
    def part_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the networks of "hand" and "face"."""
        parts = {"hand": self.hands, "face": self.face}
        return {name: self.fingerprint for name, is_detected in parts.items() if is_detected}

    @classmethod
    def from_folder(
        cls, folder: Path, device: torch.device | str = "cpu", hands: bool = False, face: bool = False
    ) -> "OnnxPose":
        """Load a folder with two ONNX files of any name: one network has SimCC's two outputs, the other finds people.

        Raises:
            UserError: onnxruntime is not installed; other files than these two; hands or face, and a network without them.
        """
        sessions = {file: load_session(file, torch.device(device)) for file in sorted(folder.glob("*.onnx"))}
        shapes = {file: _output_shapes(file, session) for file, session in sessions.items()}
        points = [file for file, session in sessions.items() if _is_pose_network(session, shapes[file])]
        boxes = [file for file, session in sessions.items() if _is_person_detector(session, shapes[file])]
        if (len(sessions), len(points), len(boxes)) != (2, 1, 1):
            found = ", ".join(f"{file.name} with outputs {shapes[file]}" for file in sessions)
            raise UserError(
                f"{folder}: expected one YOLOX person detector and one SimCC pose network with {COUNTS} points, found "
                f"{found}; keep only these two .onnx files in the folder"
            )
        count = shapes[points[0]][0][1]
        if (hands or face) and count != WITH_PARTS:
            raise UserError(
                f"pose network {points[0]}: its {count} points are those of the body; for hands and faces give a network with "
                f"{WITH_PARTS} points, such as DWPose's"
            )
        return cls(sessions[boxes[0]], sessions[points[0]], (*boxes, *points), device, hands, face)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the files to a folder for `from_folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in self.files:
            shutil.copy(file, folder)

    def to(self, device: torch.device | str) -> "OnnxPose":
        """Move the networks to a device; onnxruntime loads them again for another one."""
        device = torch.device(device)
        if device != self.device:
            self.boxes, self.points = (load_session(file, device) for file in self.files)
            self.device = device
        return self

    def detect(
        self, frames: NDArray[np.uint8], batch_size: int = 16, zoom: float = 1.0
    ) -> list[NDArray[np.float32]]:
        """Detect people in frames `[F, H, W, 3]` (RGB), as specified by `PoseDetector`.

        `zoom` has no effect, because every person is scaled to the size of the pose network.
        """
        boxes = [self.find_boxes(frame) for frame in frames]
        affines = [_affine(box, *_input_size(self.points)) for found in boxes for box in found]
        frame_of = [index for index, found in enumerate(boxes) for _ in found]
        dynamic = not isinstance(self.points.get_inputs()[0].shape[0], int)
        size = batch_size if dynamic else self.points.get_inputs()[0].shape[0]
        people: list[list[NDArray[np.float32]]] = [[] for _ in frames]
        for start in range(0, len(affines), size):
            people_of_batch = range(start, min(start + size, len(affines)))
            part = np.stack([self._crop(frames[frame_of[i]], affines[i]) for i in people_of_batch])
            missing = 0 if dynamic else size - len(part)  # a fixed batch is filled with copies
            x, y = run_session(self.points, np.concatenate([part, part[:1].repeat(missing, axis=0)]))
            for offset in range(len(part)):
                pose = _pose(x[offset], y[offset], affines[start + offset])
                if pose.any():
                    people[frame_of[start + offset]].append(pose)
        nobody = np.zeros((0, NUM_POINTS, 3), np.float32)
        return [keep_parts(np.stack(found) if found else nobody, self.hands, self.face) for found in people]

    def find_boxes(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Boxes of people in a frame `[H, W, 3]` (RGB): `[P, 4]`, left, top, right, bottom in pixels."""
        height, width = _input_size(self.boxes)
        scale = min(height / frame.shape[0], width / frame.shape[1])
        h, w = int(frame.shape[0] * scale), int(frame.shape[1] * scale)
        if min(h, w) < 1:
            raise UserError(
                f"frame of {frame.shape[1]} x {frame.shape[0]} pixels: too narrow for pose detection; remove the video or "
                "crop it"
            )
        canvas = np.full((height, width, 3), PADDING_VALUE, np.uint8)
        canvas[:h, :w] = cv2.resize(frame[..., ::-1], (w, h), interpolation=cv2.INTER_LINEAR)
        outputs = run_session(
            self.boxes, np.ascontiguousarray(canvas.transpose(2, 0, 1))[None].astype(np.float32)
        )
        found = outputs[0][0]
        if found.shape[1] == 5:  # the network contains the selection
            scores = np.where(outputs[1][0] == PERSON, found[:, 4], 0) if len(outputs) > 1 else found[:, 4]
            return found[scores > MIN_BOX_SCORE, :4] / scale
        cells = [(height // stride, width // stride, stride) for stride in STRIDES]
        corners = np.concatenate([np.indices((r, c))[::-1].reshape(2, -1).T * float(s) for r, c, s in cells])
        strides = np.concatenate([np.full((r * c, 1), s) for r, c, s in cells])
        sizes = np.exp(found[:, 2:4]) * strides
        lefts_tops = found[:, :2] * strides + corners - sizes / 2
        scores = found[:, 4] * found[:, 5 + PERSON]
        rectangles = np.concatenate([lefts_tops, sizes], axis=1)
        kept = np.asarray(
            cv2.dnn.NMSBoxes(rectangles.tolist(), scores.tolist(), MIN_BOX_SCORE, MAX_OVERLAP), int
        ).reshape(-1)
        boxes = np.concatenate([lefts_tops, lefts_tops + sizes], axis=1)[kept] / scale
        return boxes.astype(np.float32)

    def _crop(self, frame: NDArray[np.uint8], affine: NDArray[np.float64]) -> NDArray[np.float32]:
        height, width = _input_size(self.points)
        crop = cv2.warpAffine(frame, affine, (width, height), flags=cv2.INTER_LINEAR)
        normalized = (crop - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        return normalized.transpose(2, 0, 1).astype(np.float32)


def _input_size(session: "InferenceSession") -> tuple[int, int]:
    """Height and width of a network's images; `BOX_INPUT` where the network accepts any."""
    height, width = (n if isinstance(n, int) else BOX_INPUT for n in session.get_inputs()[0].shape[2:])
    return height, width


def _output_shapes(file: Path, session: "InferenceSession") -> list[tuple[int, ...]]:
    """Shapes of the outputs for one black image: the shapes in the file often have unknown sizes.

    Raises:
        UserError: the network does not take one batch of images, or fails on them.
    """
    shapes = [item.shape for item in session.get_inputs()]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
        raise UserError(f"{file}: expected one input [B, 3, H, W], found {shapes}; use another file")
    (shape,) = shapes
    batch = shape[0] if isinstance(shape[0], int) else 1
    black = np.zeros((batch, 3, *_input_size(session)), np.float32)
    try:
        return [output.shape for output in run_session(session, black)]
    except Exception as error:  # onnxruntime's exceptions have no common class
        raise UserError(f"{file}: fails on a black image ({first_line(error)}); use another file") from error


def _is_pose_network(session: "InferenceSession", shapes: list[tuple[int, ...]]) -> bool:
    height, width = _input_size(session)
    bins = [width * BINS_PER_PIXEL, height * BINS_PER_PIXEL]
    return [shape[-1] for shape in shapes] == bins and all(
        len(shape) == 3 and shape[1] in COUNTS for shape in shapes
    )


def _is_person_detector(session: "InferenceSession", shapes: list[tuple[int, ...]]) -> bool:
    height, width = _input_size(session)
    cells = sum((height // stride) * (width // stride) for stride in STRIDES)
    boxes = shapes[0]
    if len(boxes) != 3 or boxes[0] != 1:
        return False
    return boxes[2] == 5 or (boxes[2] > 5 and boxes[1] == cells)


def describe_onnx(file: Path) -> str:
    """One line with the kind of an ONNX file.

    Raises:
        UserError: as `OnnxPose.from_folder`, or the file is of neither kind.
    """
    session = load_session(file, torch.device("cpu"))
    shapes = _output_shapes(file, session)
    height, width = _input_size(session)
    if _is_pose_network(session, shapes):
        return f"pose network with {shapes[0][1]} points for people of {width} x {height} pixels, in an ONNX file"
    if _is_person_detector(session, shapes):
        return f"person detector for images of {width} x {height} pixels, in an ONNX file"
    raise UserError(
        f"{file}: neither a YOLOX person detector nor a SimCC pose network with {COUNTS} points: outputs {shapes}; use "
        "another file"
    )


def _affine(box: NDArray[np.float32], height: int, width: int) -> NDArray[np.float64]:
    """Map `[2, 3]` from a frame to a crop of this height and width, which contains the box with padding, unstretched."""
    left, top, right, bottom = box.astype(float)
    center = np.array([left + right, top + bottom]) / 2
    scale = min(width / (right - left), height / (bottom - top)) / BOX_PADDING
    return np.column_stack([np.eye(2) * scale, np.array([width, height]) / 2 - center * scale])


def _pose(x: NDArray[np.float32], y: NDArray[np.float32], affine: NDArray[np.float64]) -> NDArray[np.float32]:
    """Keypoints `[130, 3]` in the frame from the scores of x `[K, 2 w]` and y `[K, 2 h]` in a crop; without a body all 0."""
    scores = np.minimum(x.max(axis=1), y.max(axis=1)).clip(max=1)
    bins = np.stack([x.argmax(axis=1), y.argmax(axis=1)], axis=1)
    points = (bins / BINS_PER_PIXEL - affine[:, 2]) / affine[0, 0]
    found = np.column_stack([points, scores])
    found[scores < MIN_SCORE] = 0
    pose = np.zeros((NUM_POINTS, 3), np.float32)
    for joint, point in enumerate(COCO):
        if point is not None:
            pose[joint] = found[point]
    shoulders = found[[5, 6]]
    if (shoulders[:, 2] > 0).all():
        pose[1] = *shoulders[:, :2].mean(axis=0), shoulders[:, 2].min()
    if len(found) == WITH_PARTS and pose[BODY].any():
        for part, source in PARTS:
            pose[part] = found[source]
    return pose
