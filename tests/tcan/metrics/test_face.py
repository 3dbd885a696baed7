"""Face similarity: alignment in closed form, and embeddings of a small ONNX network computed independently."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from scipy.ndimage import map_coordinates
from skimage.transform import SimilarityTransform
from torch import nn

from pipelines.network_metrics import face_similarities
from tcan.errors import UserError
from tcan.metrics.face import align_face, face_embeddings, face_transform
from tcan.metrics.networks import FaceEmbedding, load_networks
from tcan.pose.skeleton import JOINTS
from tests.tcan.metrics.network_files import LinearFaces, write_face, write_onnx

# ArcFace's published template: position in the image -> x, y.
LEFT, RIGHT, NOSE = (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366)
HEIGHT, WIDTH = 240, 200


def face_pose(left: complex, right: complex, nose: complex) -> np.ndarray:
    """Keypoints `[18, 3]` of a frontal face with eyes on the left and on the right of the image."""
    pose = np.zeros((18, 3), np.float32)
    for name, point in (("right_eye", left), ("left_eye", right), ("nose", nose)):
        pose[JOINTS.index(name)] = point.real, point.imag, 0.8
    return pose


def shown_at(scale_rotation: complex, shift: complex) -> np.ndarray:
    """Keypoints of the template's face, mapped by z -> scale_rotation z + shift."""
    return face_pose(*(scale_rotation * complex(*point) + shift for point in (LEFT, RIGHT, NOSE)))


def drawn(
    colours: Callable[[np.ndarray, np.ndarray], np.ndarray], scale_rotation: complex, shift: complex
) -> np.ndarray:
    """A frame with an image of the template's coordinates, `colours(x, y)`, mapped in the same way."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    template = (x + 1j * y - shift) / scale_rotation
    return colours(template.real, template.imag).round().astype(np.uint8)


def waves(phase: float = 0.0) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Smooth colours without symmetry, at least 3 pixels of the aligned face per radian."""
    return lambda x, y: (
        128
        + 100
        * np.stack(
            [np.sin(x / 9 + phase), np.cos(y / 7 - phase), np.sin((x + 2 * y) / 20 + phase) * np.cos(x / 11)],
            axis=-1,
        )
    )


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("degrees", [0, 35, -120])
def test_rotated_scaled_and_shifted_faces_map_to_the_template(scale: float, degrees: float) -> None:
    a = scale * np.exp(1j * np.deg2rad(degrees))
    shift = complex(WIDTH / 2, HEIGHT / 2) - a * complex(56, 56)  # the face in the center of the frame
    pose = shown_at(a, shift)
    found = face_transform(pose, HEIGHT, WIDTH)
    inverse = 1 / a, -shift / a
    expected = [
        [inverse[0].real, -inverse[0].imag, inverse[1].real],
        [inverse[0].imag, inverse[0].real, inverse[1].imag],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-4)

    face = align_face(drawn(waves(), a, shift), pose)
    assert face.shape == (112, 112, 3) and face.dtype == np.uint8
    y, x = np.mgrid[:112, :112]
    frame = a * (x + 1j * y) + shift  # where each pixel of the face is in the frame
    inside = (frame.real > 1) & (frame.real < WIDTH - 2) & (frame.imag > 1) & (frame.imag < HEIGHT - 2)
    difference = np.abs(face - waves()(x, y))[inside]
    assert inside.mean() > 0.8 and difference.max() < 5 and difference.mean() < 1.5
    assert np.abs(face[:, ::-1] - waves()(x, y))[inside].mean() > 30


def test_other_triangles_are_fitted_as_by_skimage() -> None:
    left, right, nose = 60 + 80j, 85 + 90j, 90 + 110j  # a face in half profile
    points = np.array([[z.real, z.imag] for z in (left, right, nose)])
    expected = SimilarityTransform.from_estimate(points, np.array([LEFT, RIGHT, NOSE])).params[:2]
    np.testing.assert_allclose(
        face_transform(face_pose(left, right, nose), HEIGHT, WIDTH), expected, atol=1e-6
    )


def test_incomplete_faces_are_not_aligned() -> None:
    pose = shown_at(1, 20)
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    assert align_face(frame, pose) is not None
    for joint in ("right_eye", "left_eye", "nose"):
        hidden = pose.copy()
        hidden[JOINTS.index(joint), 2] = 0
        assert align_face(frame, hidden) is None
    assert align_face(frame, shown_at(1, -60)) is None  # an eye is left of the frame
    assert align_face(frame, shown_at(1, 140)) is None  # right of the frame
    assert align_face(frame, face_pose(50 + 50j, 50 + 50j, 50 + 50j)) is None


def aligned_independently(frame: np.ndarray, a: complex, shift: complex) -> np.ndarray:
    y, x = np.mgrid[:112, :112]
    position = a * (x + 1j * y) + shift
    return np.stack(
        [
            map_coordinates(channel, [position.imag, position.real], order=1, mode="grid-constant")
            for channel in np.moveaxis(frame, -1, 0).astype(float)
        ]
    )


@pytest.mark.parametrize("batch", [None, 1])
def test_similarities_are_cosines_of_the_network_of_normalized_aligned_faces(
    tmp_path: Path, batch: int | None
) -> None:
    matrix, vector = write_face(tmp_path / "face.onnx", batch)
    networks = load_networks({"face": str(tmp_path / "face.onnx")})
    maps = [(np.exp(0.2j * i) * (0.8 + 0.1 * i), 40 + 30j - 10 * i) for i in range(4)]
    poses = np.stack([shown_at(*item) for item in maps])
    truths, results = (
        [np.stack([drawn(waves(video + 0.1 * i + shift), *maps[i]) for i in range(4)]) for video in (0, 1.5)]
        for shift in (0, 0.3)
    )

    def embedded(frames: np.ndarray) -> np.ndarray:
        faces = np.stack(
            [aligned_independently(frame, *item) for frame, item in zip(frames, maps, strict=True)]
        )
        pooled = ((faces - 127.5) / 127.5).reshape(4, 3, 14, 8, 14, 8).mean(axis=(3, 5)).reshape(4, -1)
        features = pooled @ matrix.T + vector
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    hidden = poses.copy()
    hidden[2, JOINTS.index("nose"), 2] = 0
    rows = face_similarities(
        [(results[0], hidden), (results[1], poses)], [(truths[0], poses), (truths[1], poses)], networks
    )
    references = [embedded(truth)[0] for truth in truths]
    for i, (row, kept) in enumerate(zip(rows, ([0, 1, 3], [0, 1, 2, 3]), strict=True)):
        found = embedded(results[i])[kept]
        assert row == pytest.approx(
            {
                "face_similarity": (found @ references[i]).mean(),
                "face_similarity_other": (found @ references[1 - i]).mean(),
                "face_similarity_source": (embedded(truths[i])[kept[1:]] @ references[i]).mean(),
                "face_frames": len(kept),
            },
            abs=1e-3,
        )
        assert abs(row["face_similarity"] - row["face_similarity_other"]) > 0.05


def test_videos_without_a_face_have_no_similarity(tmp_path: Path) -> None:
    write_face(tmp_path / "face.onnx")
    networks = load_networks({"face": str(tmp_path / "face.onnx")})
    a, shift = 1.0, 30 + 30j
    frames = np.stack([drawn(waves(phase), a, shift) for phase in (0, 1)])
    shown, nobody = np.stack([shown_at(a, shift)] * 2), np.zeros((2, 18, 3))
    first_hidden = shown * [[[0]], [[1]]]
    rows = face_similarities(
        [(frames, nobody), (frames, shown), (frames, shown)],
        [(frames, shown), (frames, first_hidden), (frames, shown)],
        networks,
    )
    for row in rows[:2]:  # no face in the result; none in the reference
        assert row.pop("face_frames") == 0 and all(np.isnan(value) for value in row.values())
    # The reference without a face is no control of the third video.
    assert rows[2]["face_frames"] == 2 and rows[2]["face_similarity"] == pytest.approx(
        rows[2]["face_similarity_other"]
    )
    assert np.isnan(face_embeddings(networks.loaded["face"], frames, first_hidden)).all(axis=1).tolist() == [
        True,
        False,
    ]


def test_without_a_file_the_metric_is_unavailable() -> None:
    networks = load_networks({"face": "missing.onnx"}, prefix="evaluate.networks.")
    assert (
        networks.unavailable["face_similarity"]
        == "evaluate.networks.face = missing.onnx: no such file or folder"
    )
    frames, poses = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 18, 3))
    assert face_similarities([(frames, poses)], [(frames, poses)], networks) == [{}]


class TwoOutputs(LinearFaces):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x), x


def test_wrong_files_are_user_errors(tmp_path: Path) -> None:
    write_face(tmp_path / "batch.onnx", batch=2)
    write_face(tmp_path / "number.onnx", dimensions=1)
    write_onnx(tmp_path / "size.onnx", nn.ReLU(), (1, 3, 128, 128))
    write_onnx(tmp_path / "vector.onnx", nn.ReLU(), (1, 112))
    write_onnx(tmp_path / "image.onnx", nn.ReLU(), (1, 3, 112, 112))
    write_onnx(tmp_path / "two.onnx", TwoOutputs(12), (1, 3, 112, 112))
    write_face(tmp_path / "face.onnx")
    network = onnx.load(tmp_path / "face.onnx")
    network.graph.node[0].name = "_minusscalar0"
    onnx.save(network, tmp_path / "mxnet.onnx")
    network.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT32
    onnx.save(network, tmp_path / "type.onnx")
    (tmp_path / "pointer.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "page.onnx").write_text("<!DOCTYPE html><html></html>")
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "face.onnx").read_bytes()[:1000])
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "folder").mkdir()
    for file, reason in (
        ("batch.onnx", r"its inputs have shapes \[\[2, 3, 112, 112\]\]"),
        ("size.onnx", r"its inputs have shapes \[\[1, 3, 128, 128\]\]"),
        ("vector.onnx", r"its inputs have shapes \[\[1, 112\]\]"),
        ("number.onnx", r"its outputs for one image have shapes \[\[1, 1\]\]"),
        ("image.onnx", r"its outputs for one image have shapes \[\[1, 3, 112, 112\]\]"),
        ("two.onnx", r"its outputs for one image have shapes \[\[1, 12\], \[1, 3, 112, 112\]\]"),
        ("mxnet.onnx", "exported from MXNet"),
        ("type.onnx", "no valid ONNX file"),
        ("pointer.onnx", "a Git LFS pointer"),
        ("page.onnx", "an HTML page"),
        ("cut.onnx", "no valid ONNX file"),
        ("empty.onnx", "no valid ONNX file"),
        ("folder", "no valid ONNX file"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            FaceEmbedding(tmp_path / file)
        assert str(tmp_path / file) in str(error.value) and "\n" not in str(error.value)
