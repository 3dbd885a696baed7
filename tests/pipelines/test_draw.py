"""Hands and faces in the pose images of training and animation."""

import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines import cli
from pipelines.animate import Animation, animate, read_inputs, read_motion
from pipelines.config import DrawConfig
from pipelines.config.parser import load_config
from pipelines.dataset import SCHEMA_VERSION, decode_row
from pipelines.inference import load_pipeline
from pipelines.preprocess.assembly import VideoAssembler
from pipelines.preprocess.models import PoseAndLatents
from pipelines.preprocess.pose import pack_people
from pipelines.preprocess.schemas import DECODED_SCHEMA, ENCODED_SCHEMA
from pipelines.preprocess.shards import ShardWriter, write_info, writing
from pipelines.preprocess.sources import Source
from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler
from pipelines.train.job import _check_start
from pipelines.train.run_file import check_same_settings, run_settings
from tcan.errors import UserError
from tcan.pose import PoseErrors, draw_poses, write_poses
from tcan.pose.openpose_loading import open_pose_module
from tcan.pose.parts import keep_parts
from tcan.video import read_image, write_image, write_video
from tcan.weights import MINI_MODEL, load_pose_detector, read_model_info
from tests.tcan.pose.bodies import body
from tests.tcan.pose.test_onnx import ColouredJoints, YellowPeople, export
from tests.tcan.pose.test_onnx import draw as draw_spots
from tests.tcan.pose.test_parts import FACE, LEFT, RIGHT, with_parts

HEIGHT, WIDTH, FRAMES = 128, 192, 12
CROP = 128  # width of the clips; the crop of a video is on the grid of the latents
HANDS = ("hand_fingerprint", "hands", slice(18, 60))
FACES = ("face_fingerprint", "faces", FACE)


def person(frame: int, index: int) -> np.ndarray:
    """Keypoints `[130, 3]` in the frames before the crop. Person 0 is the larger one; its face is missing in frame 3."""
    points = with_parts(body(90 + 25 * index + frame, 30 + 6 * index, 80 - 30 * index), 0.4)
    if index == 0 and frame == 3:
        points[FACE] = 0
    return points


def people_of(frame: int) -> np.ndarray:
    """The people of a frame `[P, 130, 3]`, in an order that changes, with a false detection in some frames."""
    found = [person(frame, 0), person(frame, 1)][:: 1 if frame % 3 else -1]
    return np.stack([with_parts(body(150, 100, 12), 0.1), *found] if frame % 4 == 1 else found)


def write_dataset(folder: Path, only_main: bool, *parts: tuple[str, str, slice]) -> Path:
    """A dataset of one video of two clips, as preprocessing assembles it."""
    video = "a" * 16
    identity = {key: "0" for key, _, _ in parts} | ({} if only_main else {"people": "all"})
    with writing(str(folder)):
        writer = ShardWriter(str(folder), identity, 2**30, 1e9)
        assembler = VideoAssembler(
            writer, [Source("/a", video, "1-1")], min_person_fraction=0.5, min_person_height=0.1, validation_fraction=0,
            only_main=only_main,
        )  # fmt: skip
        latent = np.zeros((FRAMES // 2, 4, HEIGHT // 8, WIDTH // 8), "<f2").tobytes()
        for start in (0, FRAMES // 2):
            people = [people_of(frame) for frame in range(start, start + FRAMES // 2)]
            counts, packed = pack_people([found[:, :18] for found in people])
            row = dict.fromkeys(ENCODED_SCHEMA.names) | {
                "video_id": video, "source": "/a", "start": start, "num_frames": FRAMES // 2, "fps": 8.0, "height": HEIGHT,
                "width": WIDTH, "canvas": [HEIGHT, CROP], "crop": [0, 0, WIDTH, HEIGHT], "people_per_frame": counts,
                "people": packed, "latent_mean": latent, "latent_logvar": latent,
            }  # fmt: skip
            row |= {name: pack_people([found[:, part] for found in people])[1] for _, name, part in parts}
            assembler.add(row)
        end = {"video_id": video, "source": "/a", "num_clips": 2}
        assert assembler.add(dict.fromkeys(ENCODED_SCHEMA.names) | end) == "kept"
        writer.commit()
        files = {f"clips/{file.name}": 2 for file in (folder / "clips").iterdir()}
        info = {
            "schema_version": SCHEMA_VERSION, "counts": {}, "files": files, "identity": identity, "height": HEIGHT, "width": CROP,
            "vae_fingerprint": "", "vae_scaling_factor": 0.5, "mlflow_run_id": None,
        }  # fmt: skip
        write_info(str(folder), info)
    return folder


def sampler(dataset: Path, size: int | None, **options: object) -> Sampler:
    return Sampler(
        ClipStore(dataset), 2, seed=0, batch_size=1, size=size, vae_scaling_factor=1.0, stick_width=4, frames=FRAMES,
        drop_reference=0.1, **options,
    )  # fmt: skip


def test_body_maps_are_drawn_in_training_and_animation(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", only_main=True)
    skeleton, body_map = (
        sampler(dataset, None, pose_style=style).sample(0, 0) for style in ("skeleton", "body_map")
    )
    assert not np.array_equal(skeleton["pose"], body_map["pose"])
    np.testing.assert_array_equal(skeleton["latents"], body_map["latents"])
    poses = np.stack([person(0, 0)[:18]])
    pipe = load_pipeline(MINI_MODEL, load_config())
    np.testing.assert_array_equal(pipe.draw(poses), draw_poses(poses, 128, 128, 2))
    pipe.model_info["pose_style"] = "body_map"
    np.testing.assert_array_equal(pipe.draw(poses), draw_poses(poses, 128, 128, 2, "body_map"))


def test_stage2_with_other_pose_images_than_stage1_is_refused(tmp_path: Path) -> None:
    stage1 = tmp_path / "model"
    shutil.copytree(MINI_MODEL, stage1)
    info = json.loads((stage1 / "tcan.json").read_text())
    (stage1 / "tcan.json").write_text(json.dumps(info | {"stage": 1, "pose_style": "body_map"}))
    with pytest.raises(UserError, match=r"in the style body_map; set train\.pose_style body_map for stage 2"):
        _check_start(stage1, load_config())
    _check_start(stage1, load_config("--train.pose_style", "body_map"))


def drawn_by_controlnet_aux(people: list[np.ndarray], hands: bool, face: bool) -> np.ndarray:
    util, point = open_pose_module("util"), open_pose_module("body").Keypoint
    image = np.zeros((HEIGHT, CROP, 3), np.uint8)
    for points in people:
        joints = [point(float(x) / CROP, float(y) / HEIGHT) for x, y, _ in points]
        image = util.draw_bodypose(image, joints[:18])
        for part in (LEFT, RIGHT):
            image = util.draw_handpose(image, joints[part]) if hands else image
        if face and points[FACE].any():
            image = util.draw_facepose(image, joints[FACE])
    return image


def cropped(points: np.ndarray, x: float) -> np.ndarray:
    result = points - np.array([x, 0, 0], np.float32)
    return np.where(points[:, 2:] > 0, result, 0)


@pytest.mark.parametrize("only_main", [True, False])
@pytest.mark.parametrize("parts", [(HANDS,), (FACES,), (HANDS, FACES)])
def test_training_draws_the_stored_hands_and_faces_of_the_tracked_people(
    tmp_path: Path, only_main: bool, parts: tuple[tuple[str, str, slice], ...]
) -> None:
    """The pose images of a batch are controlnet_aux's drawings of the people that were stored."""
    dataset = write_dataset(tmp_path / "dataset", only_main, *parts)
    draw = DrawConfig(hands=HANDS in parts, face=FACES in parts)
    batch = sampler(dataset, None, draw=draw).batch(0, [0])
    assert batch.pose.shape == (1, FRAMES, HEIGHT, CROP, 3)
    first = batch.pose[0, 0].numpy()
    (x,) = [  # the crop chosen by preprocessing
        x for x in range(0, WIDTH - CROP + 1, 8)
        if np.array_equal(
            first, drawn_by_controlnet_aux([cropped(person(0, i), x) for i in range(1 if only_main else 2)], *dataclasses.astuple(draw))
        )
    ]  # fmt: skip
    for frame in range(FRAMES):
        people = [cropped(person(frame, i), x) for i in range(1 if only_main else 2)]
        expected = drawn_by_controlnet_aux(people, draw.hands, draw.face)
        np.testing.assert_array_equal(batch.pose[0, frame].numpy(), expected)
    without = sampler(dataset, None).batch(0, [0]).pose[0].numpy()
    np.testing.assert_array_equal(
        without[0],
        drawn_by_controlnet_aux(
            [cropped(person(0, i), x) for i in range(1 if only_main else 2)], False, False
        ),
    )


def test_everything_else_of_a_sample_does_not_depend_on_the_drawn_parts(tmp_path: Path) -> None:
    """Random crops of 64 pixels and pose errors: the hands are drawn in addition to the same joints."""
    dataset = write_dataset(tmp_path / "dataset", True, HANDS, FACES)
    errors = PoseErrors(dropout=0.1, jitter=0.02, outliers=0.2)
    for step in range(5):
        with_hands = sampler(dataset, 64, draw=DrawConfig(True, True), pose_errors=errors).sample(step, 0)
        bodies = sampler(dataset, 64, pose_errors=errors).sample(step, 0)
        for name in bodies.keys() - {"pose"}:
            np.testing.assert_array_equal(with_hands[name], bodies[name])
        covered = bodies["pose"].any(axis=-1)
        assert with_hands["pose"].any(axis=-1)[covered].all()
        assert with_hands["pose"].any(axis=-1).sum() > covered.sum()


def test_cached_parts_equal_those_of_the_files(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", False, HANDS, FACES)
    cached, uncached = ClipStore(dataset), ClipStore(dataset, cache_bytes=0)
    for positions in ([2, 3, 9], [9, 2, 7], [4]):
        for column, shape in (("hands", (2, 42, 3)), ("faces", (2, 70, 3))):
            found = cached.frames(cached.video(0), positions, [column])[column]
            assert found.shape == (len(positions), *shape) and found.any()
            np.testing.assert_array_equal(
                found, uncached.frames(uncached.video(0), positions, [column])[column]
            )


def test_dataset_without_hands_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "dataset", True, HANDS)
    assert cli.main(["train", str(dataset), "--out", str(tmp_path / "run"), "--draw.face", "true"]) == 2
    error = capsys.readouterr().err
    assert "has no face, which draw.face needs; preprocess with --preprocess.face true" in error
    assert not (tmp_path / "run").exists()


def test_runs_of_earlier_versions_resume_without_hands(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", True, HANDS)
    started = run_settings(1, str(dataset), None, load_config())
    old = {key: value for key, value in started.items() if not key.startswith("draw.")}
    assert len(old) == len(started) - 2
    check_same_settings("run", old, run_settings(1, str(dataset), None, load_config()))
    now = run_settings(1, str(dataset), None, load_config("--draw.hands", "true"))
    with pytest.raises(UserError, match=r"started with draw\.hands = False, not True"):
        check_same_settings("run", old, now)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ONNX files: a network with 133 points, all of which are found at the coloured spots of a frame."""
    folder = tmp_path_factory.mktemp("onnx")
    export(YellowPeople(), folder / "boxes.onnx", 640, 640, 1)
    export(ColouredParts(), folder / "points.onnx", 384, 288, None)
    return folder


class ColouredParts(ColouredJoints):
    """COCO's wrists and the hands at the shoulders, the face at the nose."""

    def __init__(self) -> None:
        super().__init__(133)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        red, green, blue = 0, 5, 6  # nose, left and right shoulder
        source = torch.arange(133)
        source[9], source[10], source[91:112], source[112:133], source[23:91] = green, blue, green, blue, red
        return tuple(scores[:, source] for scores in super().forward(x))


def test_onnx_networks_with_133_points_detect_hands_and_faces(detector: Path) -> None:
    frame, truth = draw_spots(300, 500, [(250, 150)])
    nose, _, right, left = truth[0]
    found = load_pose_detector(str(detector), hands=True, face=True)
    ((person,),) = found.detect(frame[None])
    expected = [(LEFT, left), (RIGHT, right), (slice(FACE.start, FACE.start + 68), nose)]
    for part, position in expected:
        assert (np.abs(person[part, :2] - position) <= 1.5).all() and (person[part, 2] > 0.8).all()
    assert not person[128:].any()  # the pupils, which the network lacks
    hands = load_pose_detector(str(detector), hands=True).detect(frame[None])[0][0]
    np.testing.assert_array_equal(hands[:60], person[:60])
    assert not hands[FACE].any()
    assert set(found.part_fingerprints) == {"hand", "face"}
    (body_only,) = load_pose_detector(str(detector)).detect(frame[None])[0]
    np.testing.assert_array_equal(body_only, person[:18])


def test_onnx_networks_of_bodies_are_refused(tmp_path: Path) -> None:
    export(YellowPeople(), tmp_path / "boxes.onnx", 640, 640, 1)
    export(ColouredJoints(26), tmp_path / "points.onnx", 256, 192, None)
    with pytest.raises(UserError, match=r"points\.onnx: its 26 points are those of the body; .* 133 points"):
        load_pose_detector(str(tmp_path), hands=True)
    load_pose_detector(str(tmp_path))


def test_preprocessing_stores_the_parts_of_onnx_networks(detector: Path, pretrained_folder: Path) -> None:
    frame, truth = draw_spots(304, 504, [(250, 150)])
    pretrained = dataclasses.replace(load_config().pretrained, vae=str(pretrained_folder), pose=str(detector))
    clip = {
        "video_id": "a",
        "start": 0,
        "num_frames": 1,
        "height": 304,
        "width": 504,
        "frames": frame.tobytes(),
    }
    decoded = pa.Table.from_pylist([clip], DECODED_SCHEMA)
    (row,) = PoseAndLatents(pretrained, 16, "cpu", hands=True, face=True)(decoded).to_pylist()
    stored = decode_row(row)
    assert stored["people"].shape == (1, 18, 3)
    for hand, joint in ((0, 3), (1, 2)):  # left, right
        assert (np.abs(stored["hands"][0, hand, :, :2] - truth[0, joint]) <= 1.5).all()
    assert (np.abs(stored["faces"][0, :68, :2] - truth[0, 0]) <= 1.5).all()


def model_with(model_folder: Path, folder: Path, pose: Path, draw: dict[str, bool]) -> Path:
    """A copy of a model whose training drew these parts, and which names a pose network."""
    model = shutil.copytree(model_folder, folder)
    info = read_model_info(model)
    info["pretrained"]["pose"] = {"source": str(pose)}
    (model / "tcan.json").write_text(json.dumps(info | {"draw": draw}))
    return model


def test_animation_draws_the_parts_of_the_training_at_the_retargeted_joints(
    model_folder: Path, detector: Path, tmp_path: Path
) -> None:
    """The file has hands and a face; the model was trained with hands. The character has 40% of the driver's size."""
    driver = np.stack([with_parts(body(100 + 10 * frame, 50, 100)) for frame in range(4)])
    character = body(24, 14, 40)
    write_poses(driver, tmp_path / "poses.json", 200, 300, 8)
    write_poses(character[None], tmp_path / "character.json", 64, 64)
    write_image(np.zeros((64, 64, 3), np.uint8), tmp_path / "hero.png")
    model = model_with(model_folder, tmp_path / "model", detector, {"hands": True, "face": False})
    animation = Animation(
        tmp_path / "hero.png", tmp_path / "out", poses=tmp_path / "poses.json", character=tmp_path / "character.json",
        side_by_side=True,
    )  # fmt: skip
    config = load_config(
        "--animate.steps=1", "--animate.guidance_scale=1", "--animate.height=64", "--animate.width=64"
    )
    animate(animation, model, config)
    images = np.stack([read_image(file) for file in sorted((tmp_path / "out").iterdir())])
    for frame, image in enumerate(images):
        expected = with_parts(body(24 + 4 * frame, 14, 40), 0.4)[:60]
        expected = np.concatenate([expected, np.zeros((70, 3), np.float32)])
        drawn, near = image[:, 64:128].any(axis=-1), np.ones((5, 5))
        covered = draw_poses(expected[None], 64, 64, 2)[0].any(axis=-1)
        # Equal but for positions rounded to other pixels.
        assert cv2.dilate(covered.astype(np.uint8), near)[drawn].all()
        assert cv2.dilate(drawn.astype(np.uint8), near)[covered].all()
        assert drawn[~draw_poses(expected[None, :18], 64, 64, 2)[0].any(axis=-1)].sum() > 100
    assert len(images) == 4

    # Without hands in its training, a model draws them on request only.
    body_model = model_with(model_folder, tmp_path / "body", detector, {})
    for options, shape in (((), 18), (("--draw.face=true",), 130)):
        pipe = load_pipeline(body_model, load_config(*options))
        drawn = pipe.draw(driver, 200, 300)
        assert keep_parts(driver, **pipe.model_info["draw"]).shape[1] == shape
        assert drawn[0, 26:51, 88:112].all(axis=-1).any() == (shape == 130)  # white points of the face
        assert not (drawn[0, 79:110, 120:140] == (0, 0, 255)).all(axis=-1).any()


def test_driving_videos_are_searched_for_hands(
    model_folder: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [draw_spots(300, 500, [(x, 150)])[0] for x in (250, 255, 260)]
    write_video(frames, tmp_path / "dance.mp4", 8)
    write_image(frames[0], tmp_path / "hero.png")
    options = ["--pretrained.pose", str(detector), "--draw.hands", "true"]
    assert (
        cli.main(["pose", str(tmp_path / "dance.mp4"), "--out", str(tmp_path / "dance.json"), *options]) == 0
    )
    (person,) = json.loads((tmp_path / "dance.json").read_text())["frames"][0]["people"]
    left = np.array(person["hand_left_keypoints_2d"]).reshape(21, 3)
    assert (np.abs(left[:, :2] - (277, 119)) <= 2).all() and not any(person["face_keypoints_2d"])

    model = model_with(model_folder, tmp_path / "model", detector, {"hands": True, "face": False})
    animation = Animation(tmp_path / "hero.png", tmp_path / "a.mp4", tmp_path / "dance.mp4")
    config = load_config()
    pipe = load_pipeline(model, config)
    motion = read_motion(pipe.pose_detector, animation, read_inputs(animation, config), config, (64, 64))
    assert motion.poses.shape == (3, 1, 130, 3) and motion.characters.shape == (1, 18, 3)
    # All points of the hand are found at the wrist.
    np.testing.assert_allclose(motion.poses[:, 0, LEFT, :2], motion.poses[:, 0, [7] * 21, :2], atol=1)
    assert motion.poses[:, 0, LEFT, 2].all()

    mini = [
        "animate",
        "--image",
        str(tmp_path / "hero.png"),
        "--driving",
        str(tmp_path / "dance.mp4"),
        "--model",
        "mini",
    ]
    capsys.readouterr()
    assert cli.main([*mini, "--out", str(tmp_path / "b.mp4"), "--draw.hands", "true"]) == 2
    assert "pose network mini: detects only bodies" in capsys.readouterr().err
