"""Clips of the models to videos, and videos to shards that are read back with pyarrow."""

import dataclasses
import resource
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines import cli
from pipelines.config.parser import load_config
from pipelines.dataset import CLIP_SCHEMA, decode_row
from pipelines.dataset_index import write_index
from pipelines.preprocess.assembly import VideoAssembler
from pipelines.preprocess.models import PoseAndLatents
from pipelines.preprocess.person_crop import Crop, crop_around
from pipelines.preprocess.pose import pack_people, unpack_people
from pipelines.preprocess.schemas import DECODED_SCHEMA, ENCODED_SCHEMA
from pipelines.preprocess.shards import ShardWriter, read_contents, writing
from pipelines.preprocess.sources import Source
from pipelines.train.clips import ClipStore
from tcan.errors import UserError
from tcan.pose.hands import FaceDetector
from tcan.pose.openpose_loading import open_pose_module
from tcan.weights import load_pose_detector
from tests.pipelines.faults import SIZE, write_video
from tests.pipelines.test_preprocess import read_clips


def end_row(video: str, num_clips: int | None = None, step: str | None = None) -> dict:
    """Build the row that marks the end of a video, or its rejection in `step`."""
    row = dict.fromkeys(ENCODED_SCHEMA.names)
    return row | {"video_id": video, "num_clips": num_clips, "step": step, "reason": step and "broken"}


def encoded_row(video: str, start: int, people: list[np.ndarray]) -> dict:
    counts, packed = pack_people(people)
    latent = np.full((len(people), 4, 8, 8), start, "<f2").tobytes()
    return {
        "video_id": video, "source": f"/{video}", "num_clips": None, "start": start, "num_frames": len(people),
        "fps": 25.0, "height": 64, "width": 64, "canvas": [64, 64], "crop": [0, 0, 64, 64], "people_per_frame": counts, "people": packed,
        "latent_mean": latent, "latent_logvar": latent, "step": None, "reason": None,
    }  # fmt: skip


def person(x: float, height: float) -> np.ndarray:
    """Keypoints [18, 3] of an upright person at x, as a vertical line of `height` pixels around y = 32."""
    return np.stack(
        [np.full(18, x), np.linspace(32 - height / 2, 32 + height / 2, 18), np.ones(18)], axis=1
    ).astype("<f4")


def test_hands_and_faces_are_stored_for_every_person(tmp_path: Path, pretrained_folder: Path) -> None:
    """The OpenPose networks have random weights, which produce arbitrary detections in noise."""
    networks = {
        "body_pose_model.pth": open_pose_module("model").bodypose_model(),
        "hand_pose_model.pth": open_pose_module("model").handpose_model(),
        "facenet.pth": open_pose_module("face").FaceNet(),
    }
    for name, network in networks.items():
        torch.manual_seed(2)
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
        keys = {key: key if name == "facenet.pth" else key.split(".", 1)[1] for key in network.state_dict()}
        torch.save({keys[key]: value for key, value in network.state_dict().items()}, tmp_path / name)
    noise = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    blurred = [cv2.GaussianBlur(frame, (0, 0), 4) for frame in noise]
    frames = np.stack([cv2.normalize(frame, None, 0, 255, cv2.NORM_MINMAX) for frame in blurred])
    pretrained = dataclasses.replace(load_config().pretrained, vae=str(pretrained_folder), pose=str(tmp_path))
    decoded = pa.Table.from_pylist(
        [
            {
                "video_id": "0" * 16,
                "start": 0,
                "num_frames": 2,
                "height": 96,
                "width": 96,
                "frames": frames.tobytes(),
            }
        ],
        DECODED_SCHEMA,
    )
    (row,) = PoseAndLatents(pretrained, 16, "cpu", hands=True, face=True)(decoded).to_pylist()
    clip = decode_row(row)
    people = np.split(clip["people"], np.cumsum(row["people_per_frame"])[:-1])
    assert len(clip["hands"]) == len(clip["faces"]) == len(clip["people"]) == sum(row["people_per_frame"])
    faces = FaceDetector.from_pretrained(tmp_path).detect(frames, people)
    assert np.array_equal(clip["faces"], np.concatenate(faces)) and clip["faces"].any()
    load_pose_detector(str(tmp_path), hands=True, face=True).save_pretrained(tmp_path / "copy")
    copy = load_pose_detector(str(tmp_path / "copy"), hands=True, face=True)
    assert np.array_equal(clip["hands"], np.concatenate(copy.hands.detect(frames, people)))
    assert np.concatenate(copy.detect(frames)).shape[1:] == (130, 3)
    assert copy.part_fingerprints["face"] == FaceDetector.from_pretrained(tmp_path).fingerprint

    with torch.compiler.set_stance("force_eager"):  # without the compiler itself
        (compiled,) = PoseAndLatents(pretrained, 16, "cpu", compiled=True)(decoded).to_pylist()
    assert compiled == row | {"hands": None, "faces": None}


def test_unsupported_hands_option_prints_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "a.mp4", 4)
    assert cli.main(["preprocess", str(tmp_path), str(tmp_path / "out"), "--preprocess.hands", "true"]) == 2
    assert "pose network mini: detects only bodies" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pack_and_unpack_people_round_trip() -> None:
    people = [
        np.zeros((0, 18, 3), "<f4"),
        np.stack([person(1, 2), person(3, 4)]),
        np.zeros((0, 18, 3), "<f4"),
    ]
    assert all(np.array_equal(a, b) for a, b in zip(people, unpack_people(*pack_people(people)), strict=True))


def test_videos_are_stored_completely_in_any_row_order(tmp_path: Path) -> None:
    both = np.stack([person(40, 20), person(10, 40)])
    # The other person is larger here, but is not the tracked one.
    swapped = np.stack([person(40, 35), person(10, 30)])
    empty = np.zeros((0, 18, 3), "<f4")
    ids = ["0" * 16, "f" * 16, "8" * 16, "9" * 16]
    with writing(str(tmp_path)):
        writer = ShardWriter(str(tmp_path), {"size": SIZE}, 2**30, 1e9)
        assembler = VideoAssembler(
            writer, [Source(f"/{video}", video, "1-1") for video in ids], min_person_fraction=0.5,
            min_person_height=0.4, validation_fraction=0.1,
        )  # fmt: skip
        rows = [
            (encoded_row(ids[0], 2, [swapped, swapped]), None),
            (encoded_row(ids[1], 0, [both[:1]]), None),
            (end_row(ids[0], 2), None),  # the end row may arrive before the clips
            (encoded_row(ids[0], 2, [swapped, swapped]), None),  # duplicate row
            (encoded_row(ids[0], 0, [both, both]), "kept"),
            (end_row(ids[1], step="decode"), "decode: broken"),
            (encoded_row(ids[1], 1, [both[:1]]), None),  # arrives after the rejection
            (encoded_row(ids[2], 0, [both, empty, empty]), None),
            (end_row(ids[2], 1), "pose: no person"),
            (encoded_row(ids[3], 0, [both[:1]]), None),
            (end_row(ids[3], 1), "pose: person too small"),
        ]
        for row, outcome in rows:
            assert assembler.add(row) == outcome
        writer.commit()
        contents = read_contents(str(tmp_path), {"size": SIZE})
    assert contents.counts == {
        "sources": 4, "videos": 1, "clips": 2, "frames": 4, "rejected": 3, "duplicates": 0,
    }  # fmt: skip
    assert sorted(contents.rejected.values()) == [
        ("decode", "broken"),
        ("pose", "no person: visible in 33% of the frames, minimum 50%"),
        ("pose", "person too small: 31% of the canvas height, minimum 40%"),
    ]
    assert contents.known == {(f"/{video}", "1-1"): video for video in ids}
    first, second = read_clips(tmp_path)
    assert (first["split"], first["start"], second["start"]) == ("validation", 0, 2)
    assert np.array_equal(decode_row(first)["keypoints"], np.stack([both[1], both[1]]))
    assert np.array_equal(decode_row(second)["keypoints"], np.stack([swapped[1], swapped[1]]))
    assert np.array_equal(decode_row(second)["reference_keypoints"], both[1])
    for row, people in ((first, both), (second, swapped)):  # all people are stored; the main person is marked
        assert (row["people_per_frame"], row["main_person"]) == ([2, 2], [1, 1])
        assert np.array_equal(decode_row(row)["people"], np.concatenate([people, people]))
    assert (decode_row(second)["reference_latent_mean"] == 0).all() and (
        decode_row(second)["latent_mean"] == 2
    ).all()


def test_people_in_50_percent_of_the_frames_are_stored_next_to_the_main_person(tmp_path: Path) -> None:
    """The filters apply to the main person: the others are too small and in too few frames."""
    main, dancer, bystander = person(32, 40), person(50, 20), person(10, 20)
    frames = [np.stack(bodies) for bodies in [[dancer, main]] * 3 + [[main, bystander]] * 2]
    identity = {"people": "all"}
    with writing(str(tmp_path)):
        writer = ShardWriter(str(tmp_path), identity, 2**30, 1e9)
        assembler = VideoAssembler(
            writer, [Source("/a", "a" * 16, "1-1")], min_person_fraction=0.9, min_person_height=0.6,
            validation_fraction=0.1, only_main=False,
        )  # fmt: skip
        assembler.add(encoded_row("a" * 16, 0, frames[:2]))
        assembler.add(encoded_row("a" * 16, 2, frames[2:]))
        assert assembler.add(end_row("a" * 16, 2)) == "kept"
        writer.commit()
    rows = read_clips(tmp_path)
    assert [row["tracked_people"] for row in rows] == [2, 2]
    stored = np.concatenate([decode_row(row)["keypoints"] for row in rows])
    # Read with pyarrow and numpy alone.
    np.testing.assert_array_equal(
        stored, np.frombuffer(b"".join(r["keypoints"] for r in rows), "<f4").reshape(5, 2, 18, 3)
    )
    np.testing.assert_array_equal(stored[:, 0], np.stack([main] * 5))
    np.testing.assert_array_equal(stored[:, 1], np.stack([dancer] * 3 + [np.zeros((18, 3))] * 2))
    assert [row["main_person"] for row in rows] == [[1, 1], [1, 0, 0]]
    write_index(str(tmp_path))
    store = ClipStore(tmp_path)
    np.testing.assert_array_equal(store.frames(store.video(0), [4, 0, 2])["keypoints"], stored[[4, 0, 2]])


def test_square_covers_most_joints_of_the_person() -> None:
    """Images are 128 x 64 and 64 x 128. Bodies are lines, so the joints inside the square are easy to count."""

    def corner(positions: list[float], tall: bool = False) -> int:
        bodies = np.stack([person(x, 40) for x in positions])
        if tall:
            bodies[..., :2] = bodies[..., 1::-1]
        crop = crop_around(bodies, *((128, 64) if tall else (64, 128)), (64, 64))
        assert (crop.height, crop.width, crop.x if tall else crop.y) == (64, 64, 0)
        return crop.y if tall else crop.x

    for tall in (False, True):
        assert corner([20.0] * 10, tall) == 0  # at an edge
        assert corner([70.0] * 10, tall) == 40  # centred, up to the grid of the latents
        assert corner([20.0] * 4 + [110.0] * 6, tall) == 64  # the person moves: the position with more frames
        assert corner([40.0] * 199 + [120.0], tall) == 8  # one frame with a false detection
    # As many people as fit, but always the main person, who is the first one.
    near, far = (np.stack([[person(70, 40), person(x, 40)]] * 4) for x in (110, 10))
    assert [crop_around(people, 64, 128, (64, 64)).x for people in (near, near[:, :1])] == [56, 40]
    assert crop_around(far[:, [0, 1, 1]], 64, 128, (64, 64)).x == 8
    apart = np.stack([[person(5, 40), person(120, 40), person(120, 40)]] * 4)
    assert crop_around(apart, 64, 128, (64, 64)).x == 0
    no_person = np.zeros((4, 18, 3), np.float32)
    assert crop_around(no_person, 64, 128, (64, 64)) == Crop(32, 0, 64, 64)

    # Only people inside the square count as visible.
    assert Crop(0, 0, 64, 64).shows(np.stack([person(20, 40), person(70, 40), no_person[0]])).tolist() == [
        True,
        False,
        False,
    ]


def test_assembler_memory_is_bounded_for_long_videos(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    pool = pa.proxy_memory_pool(pa.default_memory_pool())  # a new pool, whose peak starts at 0
    original_pool = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        with writing(str(tmp_path)):
            writer = ShardWriter(str(tmp_path), {}, 2**30, 1e9)
            assembler = VideoAssembler(
                writer, [Source("/a", "0" * 16, "1-1")], min_person_fraction=0, min_person_height=0,
                validation_fraction=0.1,
            )  # fmt: skip
            for clip in range(32):
                latents = {name: noise.bytes(2**20) for name in ("latent_mean", "latent_logvar")}
                assembler.add(encoded_row("0" * 16, 2 * clip, [person(32, 40)[None]] * 2) | latents)
                del latents
            assert assembler.add(end_row("0" * 16, 32)) == "kept"
            writer.commit()
            peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(original_pool)
    (file,) = (tmp_path / "clips").iterdir()
    assert file.stat().st_size > 64 * 2**20 > 2 * peak, peak
    assert [row["start"] for row in read_clips(tmp_path)] == list(range(0, 64, 2))


def test_full_disk_raises_user_error_and_leaves_no_partial_file(tmp_path: Path) -> None:
    """A limit on the file size makes a write fail in the middle of a file, as a full disk does."""
    noise = np.random.default_rng(0).bytes(200_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writing(str(tmp_path)):
        writer = ShardWriter(str(tmp_path), {}, 2**30, 1e9)
        row = encoded_row("0" * 16, 0, [person(1, 2)[None]]) | {"clip_id": "x", "latent_mean": noise}
        writer.add_video([{name: row.get(name) for name in CLIP_SCHEMA.names}])
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(
                UserError, match="cannot be written: file too large; free disk space"
            ) as error:
                writer.commit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_concurrent_writers_to_one_dataset_are_rejected(tmp_path: Path) -> None:
    with writing(str(tmp_path)), pytest.raises(UserError, match="another preprocess"), writing(str(tmp_path)):
        pass
