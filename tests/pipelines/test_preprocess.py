"""Preprocessing of real video files with Ray: sources, decoding, shards, and complete jobs read back with pyarrow."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import cv2
import decord
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from pipelines import cli
from pipelines.config import Config
from pipelines.config.parser import load_config
from pipelines.dataset import CLIP_SCHEMA, decode_row, read_info
from pipelines.preprocess import decoder_process
from pipelines.preprocess.assembly import VideoAssembler
from pipelines.preprocess.decode import DECODER, DecodeError, decode, decode_clips
from pipelines.preprocess.job import plan, preprocess
from pipelines.preprocess.latents import EncodedFrames
from pipelines.preprocess.models import PoseAndLatents
from pipelines.preprocess.person_crop import Crop, crop_around
from pipelines.preprocess.pose import pack_people, unpack_people
from pipelines.preprocess.schemas import DECODED_SCHEMA, ENCODED_SCHEMA
from pipelines.preprocess.shards import Contents, ShardWriter, read_contents, writing
from pipelines.preprocess.sources import Source, identify, list_sources
from pipelines.puppets.world import Clip, sample_clip, write_clip
from tcan import video_stream
from tcan.crop import fit_image
from tcan.errors import UserError
from tcan.pose.hands import FaceDetector
from tcan.pose.openpose_loading import open_pose_module
from tcan.video import write_video as write_frames
from tcan.weights import load_part
from tests.pipelines.faults import KEPT, SIZE, disc_frames, rotate, trim, write_corpus, write_video

OPTIONS = (
    "--size=64",
    "--preprocess.clip_frames=16",
    "--preprocess.min_clip_frames=8",
    "--preprocess.min_person_fraction=0",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, str]]]:
    """Folder of valid, unusual and broken files, and the expected outcome of each."""
    folder = tmp_path_factory.mktemp("videos")
    return folder, write_corpus(folder)


def make_config(pretrained: Path, folder: Path, *options: str) -> Config:
    sources = [
        f"--pretrained.vae={pretrained}",
        f"--pretrained.pose={pretrained / 'pose'}",
        f"--tracking.folder={folder / 'mlflow'}",
    ]
    return load_config(*OPTIONS, *sources, *options)


@dataclasses.dataclass
class Preprocessed:
    videos: Path
    expected: dict[str, tuple[str, str]]
    out: Path
    config: Config
    pretrained: Path
    summary: dict


@pytest.fixture(scope="session")
def job(
    corpus: tuple[Path, dict],
    pretrained_folder: Path,
    ray_cluster: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Preprocessed:
    folder = tmp_path_factory.mktemp("job")
    config = make_config(pretrained_folder, folder)
    summary = preprocess(str(corpus[0]), str(folder / "out"), config)
    return Preprocessed(*corpus, folder / "out", config, pretrained_folder, summary)


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def read_clips(out: Path) -> list[dict]:
    rows = [row for file in (out / "clips").iterdir() for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: row["clip_id"])


# --- sources ---------------------------------------------------------------------------------------------------------


def test_list_sources_accepts_folder_pattern_list_and_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "deep/er/b.MKV", "odd [1].mp4", "c.txt", "d.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)

    def names(source: str) -> list[str]:
        return [os.path.relpath(path, tmp_path) for path in list_sources(source)]

    assert names(str(tmp_path)) == ["a.mp4", "deep/er/b.MKV", "odd [1].mp4"]
    assert names(str(tmp_path / "**/*.MKV"))[0] == "deep/er/b.MKV"
    assert names(str(tmp_path / "odd [1].mp4")) == ["odd [1].mp4"]
    (tmp_path / "list.txt").write_text(f"# comment\n\na.mp4\n{tmp_path}/d.json\nmissing.mp4\na.mp4\n")
    assert names(str(tmp_path / "list.txt")) == ["a.mp4", "d.json", "missing.mp4"]


def test_missing_or_empty_sources_raise_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("# nothing\n")
    for source, message in {
        "nowhere": "no such file or folder",
        "empty": "no videos in this folder",
        "*.mp4": "no file matches",
        "list.txt": "names no videos",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            list_sources(str(tmp_path / source))
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_unreadable_file_is_listed_with_its_problem(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("x")
    (tmp_path / "a.mp4").chmod(0)
    assert "cannot be read" in str(identify([str(tmp_path / "a.mp4")], {})[0].problem)


def test_plan_skips_finished_sources_by_path_and_content() -> None:
    done = Contents(
        videos={"1": "/a"},
        rejected={
            ("/bad", "2"): ("decode", ""),
            ("/gone", None): ("list", ""),
            ("/copy", "5"): ("duplicate", "/original"),
        },
    )
    sources = [
        Source("/a", "1"),  # done
        Source("/original", "5"),  # no longer recorded as rejected, although its duplicate still is
        Source("/copy", "5"),  # done
        Source("/bad", "2"),  # done
        Source("/bad too", "2"),
        Source("/gone", problem="no such file"),  # done
        Source("/bad", "3"),  # content changed
        Source("/moved", "1"),
        Source("/new", "4"),
        Source("/new too", "4"),
    ]
    pending, rejected = plan(sources, done)
    assert [(source.path, source.video_id) for source in pending] == [
        ("/original", "5"),
        ("/bad", "3"),
        ("/new", "4"),
    ]
    assert [(source.path, stage, reason) for source, stage, reason in rejected] == [
        ("/bad too", "duplicate", "/bad"),
        ("/moved", "duplicate", "/a"),
        ("/new too", "duplicate", "/new"),
    ]


# --- decode ----------------------------------------------------------------------------------------------------------

DECODE = {"sizes": [(SIZE, SIZE)], "fps": None, "clip_frames": 16, "min_clip_frames": 8, "timeout": 120.0}


def test_clips_contain_consecutive_frames_of_the_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 40)
    *clips, end = decode_clips(str(path), **DECODE)
    assert [(clip["start"], clip["num_frames"]) for clip in clips] == [(0, 16), (16, 16), (32, 8)]
    assert end == {"num_clips": 3, "warning": None}
    frames = np.frombuffer(b"".join(clip["frames"] for clip in clips), np.uint8).reshape(40, SIZE, SIZE, 3)
    with av.open(str(path)) as container:  # decoders differ by rounding in colour conversion
        truth = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.abs(frames.astype(int) - truth).mean() < 2
    shifted_errors = [np.abs(frames.astype(int) - np.roll(truth, shift, axis=0)).mean() for shift in (-1, 1)]
    assert np.abs(frames.astype(int) - truth).mean() < min(shifted_errors)
    # A remainder that is too short is dropped.
    *clips, end = decode_clips(str(path), **DECODE | {"min_clip_frames": 9})
    assert ([clip["num_frames"] for clip in clips], end) == ([16, 16], {"num_clips": 2, "warning": None})


def test_decoder_process_does_not_import_torch() -> None:
    code = "import sys, pipelines.preprocess.decoder_process, tcan.video; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_crop_is_the_scaled_centre_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "wide.mp4", 16, height=128, width=320)
    clip, _ = decode_clips(str(path), **DECODE)
    assert clip["crop"] == [96, 0, 224, 128]
    frame = np.frombuffer(clip["frames"], np.uint8).reshape(16, SIZE, SIZE, 3)[0].astype(int)
    truth = (
        decord.VideoReader(str(path))[0].asnumpy()[:, 96:224].reshape(SIZE, 2, SIZE, 2, 3).mean(axis=(1, 3))
    )
    assert np.abs(frame - truth).mean() < 2


def test_full_frames_keep_aspect_ratio_up_to_limit(tmp_path: Path) -> None:
    for name, height, width, expected in (
        ("wide", 64, 150, (64, 144, [3, 0, 147, 64])),  # 150 is not a multiple of 8
        ("tall", 160, 80, (128, 64, [0, 0, 80, 160])),
        ("very wide", 64, 320, (64, 192, [64, 0, 256, 64])),
        ("square", 96, 96, (64, 64, [0, 0, 96, 96])),
    ):
        path = write_video(tmp_path / f"{name}.mp4", 16, height=height, width=width)
        clip, _ = decode_clips(str(path), **DECODE | {"full_frame": True})
        assert (clip["height"], clip["width"], np.round(clip["crop"], 3).tolist()) == expected
        x0, y0, x1, y1 = expected[2]
        frame = Image.fromarray(decord.VideoReader(str(path))[0].asnumpy()[y0:y1, x0:x1])
        truth = np.asarray(frame.resize(expected[1::-1], Image.Resampling.LANCZOS), int)
        assert (
            np.abs(np.frombuffer(clip["frames"], np.uint8)[: truth.size].reshape(truth.shape) - truth).max()
            <= 1
        )


def test_resampling_selects_frame_at_each_timestamp(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 40, fps=30)
    clip, _ = decode_clips(str(path), **DECODE | {"fps": 10.0})
    frames = np.frombuffer(clip["frames"], np.uint8).reshape(-1, SIZE, SIZE, 3)
    assert (clip["num_frames"], clip["fps"]) == (13, 10.0)
    assert np.array_equal(frames, decord.VideoReader(str(path)).get_batch(range(0, 39, 3)).asnumpy())


@pytest.mark.parametrize(
    "name, options",
    [
        ("vp9.webm", {"codec": "libvpx-vp9"}),
        ("ten bits.mp4", {"pix_fmt": "yuv420p10le"}),
        ("grey.mkv", {"pix_fmt": "gray"}),
        ("odd.mkv", {"height": 49, "width": 71, "pix_fmt": "yuv444p"}),
        ("rotated.mp4", {"height": 64, "width": 128}),
    ],
)
def test_unusual_encodings_decode_to_the_drawn_frames(tmp_path: Path, name: str, options: dict) -> None:
    """Compares shape, position, colour and orientation with the frames that were encoded."""
    path = write_video(tmp_path / name, 20, **options)
    size = {"height": SIZE, "width": SIZE} | {
        key: options[key] for key in ("height", "width") if key in options
    }
    truth = np.stack(disc_frames(20, **size))
    if name.startswith("grey"):
        truth = np.repeat(truth @ [[0.299], [0.587], [0.114]], 3, axis=-1).astype(np.uint8)
    if name.startswith("rotated"):
        rotate(path)
        truth = np.rot90(truth, k=-1, axes=(1, 2))  # clockwise
    clip, _ = decode_clips(str(path), **DECODE)
    frames = np.frombuffer(clip["frames"], np.uint8).reshape(16, SIZE, SIZE, 3).astype(int)
    truth = np.stack([fit_image(np.ascontiguousarray(image), SIZE, SIZE) for image in truth[:16]])
    assert np.abs(frames - truth).mean() < 6, np.abs(frames - truth).mean()


def test_variable_frame_rate_is_resampled_by_timestamps(tmp_path: Path) -> None:
    times = [0, 40, 80, *range(400, 1200, 40)]  # the third frame is shown for 320 ms
    path = write_video(tmp_path / "a.mp4", len(times), times=times)
    clip, _ = decode_clips(str(path), **DECODE | {"fps": 12.5})
    frames = np.frombuffer(clip["frames"], np.uint8).reshape(-1, SIZE, SIZE, 3).astype(int)
    truth = np.stack(disc_frames(len(times))).astype(int)
    shown = [max(i for i, time in enumerate(times) if time <= 80 * k) for k in range(len(frames))]
    assert [int(np.abs(truth - frame).mean(axis=(1, 2, 3)).argmin()) for frame in frames] == shown
    assert len(frames) == 15


def test_trimmed_beginning_of_long_video_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The video exceeds this limit, so it counts as long.
    monkeypatch.setattr(video_stream, "AHEAD_BYTES", 40 * SIZE * SIZE * 3 - 1)
    path = trim(write_video(tmp_path / "a.mp4", 40), 0.4)
    *clips, _ = decoder_process.decode(str(path), **DECODE)
    frames = np.concatenate([frames for _, frames in clips])
    truth = np.stack(disc_frames(40)).astype(int)
    closest = [int(np.abs(truth - frame).mean(axis=(1, 2, 3)).argmin()) for frame in frames]
    assert closest == list(range(10, 40))


def test_clips_end_at_scene_cuts(tmp_path: Path) -> None:
    images = [
        np.full((SIZE, SIZE, 3), colour, np.uint8) for colour in ((200, 30, 30), (30, 30, 200), (30, 200, 30))
    ]
    frames = [images[0]] * 20 + [images[1]] * 5 + [images[2]] * 13
    write_frames(frames, tmp_path / "a.mp4", fps=25)
    *clips, end = decode_clips(
        str(tmp_path / "a.mp4"), **DECODE | {"cut_threshold": 27.0, "min_clip_frames": 4}
    )
    assert [(clip["start"], clip["num_frames"]) for clip in clips] == [(0, 16), (16, 4), (20, 5), (25, 13)]
    assert end == {"num_clips": 4, "warning": None}
    with pytest.raises(DecodeError, match="too short: no 21 consecutive frames without a cut"):
        list(
            decode_clips(
                str(tmp_path / "a.mp4"),
                **DECODE | {"cut_threshold": 27.0, "clip_frames": 32, "min_clip_frames": 21},
            )
        )


def test_videos_outside_duration_limits_are_rejected(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "a.mp4", 40))  # 1.6 s
    with pytest.raises(DecodeError, match=r"too short: 1\.6 s, less than 2 s"):
        list(decode_clips(path, **DECODE | {"min_seconds": 2.0}))
    with pytest.raises(DecodeError, match=r"too long: 1\.6 s, more than 1\.5 s"):
        list(decode_clips(path, **DECODE | {"max_seconds": 1.5}))


def test_decoder_timeout_raises_decode_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 40)
    with pytest.raises(DecodeError, match="no clip within"):
        list(decode_clips(str(path), **DECODE | {"timeout": 1e-5}))


def test_slow_consumer_does_not_trigger_decoder_timeout(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 200, height=256, width=256)
    clips = decode_clips(str(path), **DECODE | {"sizes": [(256, 256)], "timeout": 5.0})
    next(clips)
    time.sleep(6)
    assert len(list(clips)) == 12 + 1  # the remaining 12 of 13 clips, and the end row


def decoders() -> list[psutil.Process]:
    """Decoder processes of this process, excluding those of Ray. The first one forks the others."""
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if str(DECODER) in process.cmdline():
                found += [process, *process.children()]
    return found


@pytest.mark.parametrize("after_first_clip", [False, True])
@pytest.mark.parametrize("which", [0, -1])
def test_killed_decoder_is_restarted_with_identical_clips(
    tmp_path: Path, after_first_clip: bool, which: int
) -> None:
    path = str(write_video(tmp_path / "a.mp4", 100, height=256, width=256))
    settings = DECODE | {"sizes": [(256, 256)]}
    sources = pa.table({"video_id": ["x"], "source": [path]})
    truth = [clip.to_pylist() for clip in decode(sources, **settings)]
    clips = decode(sources, **settings)
    first = [next(clips).to_pylist()] if after_first_clip else []
    assert len(decoders()) == 1 + after_first_clip
    decoders()[which].kill()
    assert first + [clip.to_pylist() for clip in clips] == truth


def test_closing_the_iterator_ends_decoder_processes(tmp_path: Path) -> None:
    clips = decode_clips(str(write_video(tmp_path / "a.mp4", 100)), **DECODE)
    next(clips)
    processes = decoders()
    assert len(processes) == 2
    clips.close()
    assert psutil.wait_procs(processes, timeout=10)[1] == []


@pytest.mark.slow
def test_decoder_memory_is_bounded_with_slow_consumer(tmp_path: Path) -> None:
    """The decoded frames occupy 660 MB."""
    path = write_video(
        tmp_path / "a.mp4", 60, height=72, width=128, upscale=20, codec="mpeg4", index_first=False
    )
    peak = 0
    for _ in decode_clips(str(path), **DECODE):
        time.sleep(1)
        for process in decoders():
            with suppress(psutil.Error):
                peak = max(peak, process.memory_info().rss)
    assert 0 < peak < 400 * 2**20


# --- videos and shards -----------------------------------------------------------------------------------------------


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

    (row,) = PoseAndLatents(pretrained, 16, "cpu")(decoded).to_pylist()
    assert row["hands"] is None and row["faces"] is None


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


def test_invalid_output_folder_raises_user_error(tmp_path: Path, pretrained_folder: Path) -> None:
    write_video(tmp_path / "a.mp4", 8)
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        with pytest.raises(UserError, match=r"is a file|cannot be written"):
            preprocess(str(tmp_path / "a.mp4"), str(tmp_path / out), make_config(pretrained_folder, tmp_path))


# --- the job ---------------------------------------------------------------------------------------------------------


def decodable_frames(path: Path) -> int:
    count = 0
    with av.open(str(path)) as container:
        decoder = container.streams.video[0].codec_context
        with suppress(av.FFmpegError):
            for packet in container.demux(video=0):
                count += len(decoder.decode(packet))
        with suppress(av.FFmpegError):  # frames that the decoder holds back; EOF if there are none
            count += len(decoder.decode(None))
    return count


def test_every_source_is_kept_or_rejected_with_a_reason(job: Preprocessed) -> None:
    info = read_info(job.out)
    clips = read_clips(job.out)
    rejected = [row for file in (job.out / "rejected").iterdir() for row in pq.read_table(file).to_pylist()]
    # A byte that is not valid UTF-8 is a surrogate in Python file names and an escape sequence in the dataset.
    sources = [source.replace("\udce9", r"\xe9") for source in list_sources(str(job.videos))]
    assert len(job.expected) >= 30
    assert {os.path.relpath(source, job.videos) for source in sources} == job.expected.keys()
    assert Counter(sources) == Counter({row["source"] for row in clips}) + Counter(
        row["source"] for row in rejected
    )
    found = {row["source"]: ("kept", "") for row in clips}
    found |= {row["source"]: (row["step"], row["reason"]) for row in rejected}
    for source, (step, reason) in found.items():
        expected, reason_prefix = job.expected[os.path.relpath(source, job.videos)]
        assert step == expected and reason.startswith(reason_prefix) and "\n" not in reason, (
            source,
            step,
            reason,
        )
    kept = sum(expected == KEPT for expected in job.expected.values())
    counts = {"sources": len(sources), "videos": kept, "rejected": len(sources) - kept - 1, "duplicates": 1}
    # 40 frames give clips of 16, 16 and 8. 20 frames give one clip of 16; the remainder is too short. The 8K video has
    # 8 frames.
    counts |= {"clips": kept - 2 + 2, "frames": 40 + (kept - 4) * 16 + 8}
    for fraction in (0.5, 0.9):  # truncated files: the frames that PyAV decodes
        full, remainder = divmod(decodable_frames(job.videos / f"cut at {fraction}.mp4"), 16)
        counts["clips"] += full + (remainder >= 8)
        counts["frames"] += full * 16 + remainder * (remainder >= 8)
    assert info["counts"] == counts
    assert {key: job.summary[key] for key in counts} == counts
    assert sum(job.summary["reasons"].values()) == len(sources) - kept
    assert info["settings"] == dataclasses.asdict(job.config.preprocess)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vae_in_half_precision_yields_float16_latents(pretrained_folder: Path, dtype: torch.dtype) -> None:
    vae = load_part("vae", str(pretrained_folder)).eval()
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    expected = EncodedFrames(vae, frames, 2).numpy()
    for latents, reference in zip(EncodedFrames(vae.to(dtype), frames, 2).numpy(), expected, strict=True):
        assert latents.dtype == np.float16 and latents.shape == (3, 4, 8, 8)
        assert np.abs(latents.astype(np.float32) - reference).mean() < 0.05


def test_stored_latents_match_vae_output(job: Preprocessed) -> None:
    vae = AutoencoderKL.from_pretrained(job.pretrained / "vae").eval()
    rows = [row for row in read_clips(job.out) if Path(row["source"]).name in ("a.mp4", "with audio.mp4")]
    assert len(rows) == 4
    for row in rows:
        reader = decord.VideoReader(row["source"])
        frames = reader.get_batch(range(row["start"], row["start"] + row["num_frames"])).asnumpy()
        pixels = torch.from_numpy(frames).movedim(-1, 1).float() / 255 * 2 - 1
        with torch.no_grad():
            truth = vae.encode(pixels).latent_dist
            first = vae.encode(
                torch.from_numpy(reader[0].asnumpy()).movedim(-1, 0)[None].float() / 255 * 2 - 1
            )
        arrays = decode_row(row)
        for name, expected in {
            "latent_mean": truth.mean,
            "latent_logvar": truth.logvar,
            "reference_latent_mean": first.latent_dist.mean[0],
        }.items():
            assert arrays[name].shape == tuple(expected.shape)
            np.testing.assert_allclose(
                arrays[name].astype(np.float32), expected.numpy(), rtol=1e-3, atol=2e-3
            )
        assert arrays["keypoints"].shape == (row["num_frames"], 18, 3)
        assert (row["height"], row["width"], row["fps"]) == (SIZE, SIZE, 25)


def test_rerun_adds_nothing_and_new_video_is_appended(
    job: Preprocessed, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = shutil.copytree(job.out, tmp_path / "out")
    before = files_of(out)
    again = preprocess(str(job.videos), str(out), job.config)
    assert files_of(out) == before
    assert "nothing to add" in capsys.readouterr().out
    assert (again["new_videos"], again["new_rejected"]) == (0, 0)

    new = write_video(tmp_path / "new.mp4", 20, seed=9)
    more = preprocess(str(new), str(out), job.config)
    after = files_of(out)
    old = before.keys() - {"dataset.json", "index.parquet"}
    assert {name: after[name] for name in old} == {name: before[name] for name in old}
    assert (more["new_videos"], more["videos"]) == (1, again["videos"] + 1)
    assert read_info(out)["counts"]["sources"] == again["sources"] + 1
    assert "changed" not in capsys.readouterr().out

    write_video(new, 20, seed=10)
    changed = preprocess(str(new), str(out), job.config)
    assert (
        f"{out}: 1 changed sources; clips of their earlier versions remain in the dataset"
        in capsys.readouterr().out
    )
    assert (changed["new_videos"], changed["videos"]) == (1, again["videos"] + 2)


def test_different_settings_are_rejected_with_the_difference(job: Preprocessed) -> None:
    before = files_of(job.out)
    other = dataclasses.replace(
        job.config, preprocess=dataclasses.replace(job.config.preprocess, clip_frames=8)
    )
    with pytest.raises(UserError, match="clip_frames 16, not 8"):
        preprocess(str(job.videos), str(job.out), other)
    assert files_of(job.out) == before


def test_mlflow_run_records_counts_and_artifacts(job: Preprocessed) -> None:
    from mlflow import MlflowClient

    from pipelines import tracking

    client = MlflowClient(tracking.resolve_uri(job.config.tracking))
    run = client.get_run(read_info(job.out)["mlflow_run_id"])
    assert run.info.status == "FINISHED" and run.data.tags["tcan.kind"] == "preprocess"
    for name, count in read_info(job.out)["counts"].items():
        assert run.data.metrics[name] == count
    assert {"dataset.json", "clips.png"} <= {
        artifact.path for artifact in client.list_artifacts(run.info.run_id)
    }


def test_no_usable_source_raises_and_writes_no_dataset(job: Preprocessed, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "text.mp4").write_text("no video")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"none of 1 sources can be used: .*text.mp4: decode: not a video"
        ):
            preprocess(str(tmp_path / "videos"), str(tmp_path / "out"), job.config)
        with pytest.raises(UserError, match="not finished"):
            read_info(tmp_path / "out")


def test_detected_keypoints_match_puppet_keypoints(ray_cluster: None, tmp_path: Path) -> None:
    clip = sample_clip("dance", seed=5, num_frames=20)
    (tmp_path / "videos").mkdir()
    write_clip(clip, tmp_path / "videos" / "puppet")
    write_video(tmp_path / "videos" / "empty.mp4", 20, height=128, width=128)
    config = load_config(f"--tracking.folder={tmp_path / 'mlflow'}")
    summary = preprocess(str(tmp_path / "videos"), str(tmp_path / "out"), config)
    assert (summary["videos"], summary["rejected"]) == (1, 1)
    assert [reason.split(":")[:2] for reason in summary["reasons"]] == [["pose", " no person"]]
    (row,) = read_clips(tmp_path / "out")
    found = decode_row(row)["keypoints"]
    visible = clip.keypoints[..., 2] > 0
    close = np.linalg.norm((found - clip.keypoints)[..., :2], axis=-1) < 0.05 * 128
    assert close[visible].mean() > 0.9
    mirrored = np.linalg.norm((128 - found[..., 0] - clip.keypoints[..., 0])[..., None], axis=-1) < 0.05 * 128
    assert mirrored[visible].mean() < 0.7


def write_off_centre_videos(folder: Path) -> dict[str, np.ndarray]:
    """Write a puppet at the right of a wide video and at the top of a tall video.

    Returns the ground-truth keypoints by file name.
    """
    clip = sample_clip("dance", seed=5, num_frames=20, size=256)
    folder.mkdir()
    truth = {}
    for name, padding, shift in (("wide", (0, 256), (256, 0)), ("tall", (256, 0), (0, 0))):
        below, left = padding
        frames = np.pad(clip.frames, ((0, 0), (0, below), (left, 0), (0, 0)), mode="edge")
        truth[name] = clip.keypoints + np.array([*shift, 0], np.float32)
        write_clip(Clip(frames, truth[name], clip.mask), folder / name)
    return truth


def inside(keypoints: np.ndarray, crop: list[float]) -> np.ndarray:
    return ((keypoints[..., :2] >= crop[:2]) & (keypoints[..., :2] < crop[2:])).all(-1)


def test_person_crop_contains_person_away_from_the_centre(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The source resolution is 1.6 times that of the canvas, and the canvas is larger than the default training size."""
    truth = write_off_centre_videos(tmp_path / "videos")
    options = ["--preprocess.canvas=160", f"--tracking.folder={tmp_path / 'mlflow'}"]
    config = load_config(*options)
    out = tmp_path / "person"
    preprocess(str(tmp_path / "videos"), str(out), config)
    vae = load_part("vae", config.pretrained.vae).eval()
    rows = {Path(row["source"]).stem: row for row in read_clips(out)}
    assert rows.keys() == truth.keys()
    for name, row in rows.items():
        clip, crop = decode_row(row), np.array(row["crop"])
        assert inside(truth[name], row["crop"]).all()
        assert (row["height"], row["width"], *np.round(crop[2:] - crop[:2], 3)) == (160, 160, 256, 256)
        found = clip["keypoints"][..., :2] * 1.6 + crop[:2]
        close = np.linalg.norm(found - truth[name][..., :2], axis=-1) < 0.05 * 256
        assert close[truth[name][..., 2] > 0].mean() > 0.9
        video = decord.VideoReader(row["source"])
        for i, latent in ((0, clip["reference_latent_mean"]), (10, clip["latent_mean"][10])):
            with torch.no_grad():
                decoded = vae.decode(torch.from_numpy(latent[None].astype(np.float32))).sample[0]
            image = (decoded.movedim(0, -1).numpy() + 1) * 127.5
            square = Image.fromarray(video[i].asnumpy()).resize((160, 160), box=tuple(crop))
            differences = [  # at the stored crop, and shifted by one latent
                np.abs(np.roll(square, shift, axis=(0, 1)).astype(int) - image)[16:-16, 16:-16].mean()
                for shift in ((0, 0), (0, 8), (0, -8), (8, 0), (-8, 0))
            ]
            assert differences[0] < 0.7 * min(differences[1:]), differences

    preprocess(
        str(tmp_path / "videos"), str(tmp_path / "centre"), load_config(*options, "--preprocess.crop=centre")
    )
    for row in read_clips(tmp_path / "centre"):
        assert row["crop"] == ([128, 0, 384, 256] if "wide" in row["source"] else [0, 128, 256, 384])
        assert not inside(truth[Path(row["source"]).stem], row["crop"]).all()

    for command in (
        ["verify", str(out)],
        ["info", str(out)],
        ["preview", str(out), f"--out={tmp_path}/a.png"],
    ):
        assert cli.main(["dataset", *command]) == 0
    assert Image.open(tmp_path / "a.png").size == (8 * 160, 2 * 160)
    with pytest.raises(UserError, match="created with crop person, not centre"):
        preprocess(str(tmp_path / "videos"), str(out), load_config(*options, "--preprocess.crop=centre"))
    capsys.readouterr()
    assert cli.main(["train", str(out), f"--out={tmp_path}/model", "--size=192"]) == 2
    error = capsys.readouterr().err
    assert (
        "its canvas of 160 x 160 pixels is smaller than the training size 192" in error
        and error.count("\n") == 1
    )


def test_centre_crop_has_the_nearest_aspect_ratio_of_the_buckets(tmp_path: Path) -> None:
    buckets = [(64, 64), (48, 80), (80, 48), (64, 256)]
    for name, height, width, canvas, crop in (
        ("wide", 96, 176, [48, 80], [8, 0, 168, 96]),
        ("tall", 160, 80, [80, 48], [0, 40 / 3, 80, 440 / 3]),
        ("square", 96, 104, [64, 64], [4, 0, 100, 96]),
        ("very wide", 64, 320, [64, 256], [32, 0, 288, 64]),
    ):
        path = write_video(tmp_path / f"{name}.mp4", 8, height=height, width=width)
        clip, _ = decode_clips(str(path), **DECODE | {"sizes": buckets})
        assert clip["canvas"] == [clip["height"], clip["width"]] == canvas
        np.testing.assert_allclose(clip["crop"], crop, atol=1e-3)
        x0, y0, x1, y1 = clip["crop"]
        assert (x1 - x0) / (y1 - y0) == pytest.approx(canvas[1] / canvas[0])  # nothing is stretched
    # Full frames contain the bucket, also one that is wider than the limit of full frames.
    clip, _ = decode_clips(str(path), **DECODE | {"sizes": buckets, "full_frame": True})
    assert (clip["height"], clip["width"]) == (64, 256)


def test_videos_of_three_aspect_ratios_enter_three_buckets(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The puppets of the wide and of the tall video are not at the center; the crops are not as wide or tall as the videos."""
    truth = write_off_centre_videos(tmp_path / "videos")
    clip = sample_clip("dance", seed=6, num_frames=20, size=256)
    truth["square"] = clip.keypoints
    write_clip(clip, tmp_path / "videos" / "square")
    out, store = tmp_path / "out", f"--tracking.folder={tmp_path / 'mlflow'}"
    config = load_config("--preprocess.buckets=[128x128, 112x144, 144x112]", store)
    preprocess(str(tmp_path / "videos"), str(out), config)
    rows = {Path(row["source"]).stem: row for row in read_clips(out)}
    sizes = {name: (row["height"], row["width"]) for name, row in rows.items()}
    assert sizes == {"square": (128, 128), "wide": (112, 144), "tall": (144, 112)}
    for name, row in rows.items():
        x0, y0, x1, y1 = row["crop"]
        scale = row["height"] / (y1 - y0)
        assert scale == pytest.approx(row["width"] / (x1 - x0), rel=1e-3)
        assert inside(truth[name], row["crop"]).all()
        arrays = decode_row(row)
        assert arrays["latent_mean"].shape == (20, 16, row["height"] // 8, row["width"] // 8)
        found = arrays["keypoints"][..., :2] / scale + (x0, y0)
        close = np.linalg.norm(found - truth[name][..., :2], axis=-1) < 0.05 * 256
        assert close[truth[name][..., 2] > 0].mean() > 0.9

    assert read_info(out)["buckets"] == [[112, 144], [128, 128], [144, 112]]
    for command in (
        ["verify", str(out)],
        ["info", str(out)],
        ["preview", str(out), f"--out={tmp_path}/a.png"],
    ):
        assert cli.main(["dataset", *command]) == 0
    lines = capsys.readouterr().out
    for size in ("112x144 ", "128x128 ", "144x112 "):
        assert f"{size}  1 videos, 20 frames" in lines
    assert Image.open(tmp_path / "a.png").size == (8 * 144, 112 + 128 + 144)
    with pytest.raises(
        UserError, match=r"created with buckets \['112x144', .*\], not None, canvas None, not 128"
    ):
        preprocess(str(tmp_path / "videos"), str(out), load_config(store))


@pytest.fixture
def driver(tmp_path: Path, pretrained_folder: Path) -> Iterator[subprocess.Popen]:
    """Preprocessing job in a separate process with its own Ray instance; commits each video once it is finished."""
    for i in range(12):
        write_video(tmp_path / "videos" / f"{i}.mp4", 48, seed=20 + i)
    # A copy of the last video in the sorted list, which is not finished when the job is killed.
    shutil.copyfile(tmp_path / "videos" / "9.mp4", tmp_path / "videos" / "9 again.mp4")
    script = tmp_path / "driver.py"
    script.write_text(
        "import sys\nfrom pipelines.config.parser import load_config\nfrom pipelines.preprocess.job import preprocess\n"
        "preprocess(sys.argv[1], sys.argv[2], load_config(*sys.argv[3:]))\n"
    )
    options = [
        *OPTIONS,
        f"--pretrained.vae={pretrained_folder}",
        f"--pretrained.pose={pretrained_folder / 'pose'}",
    ]
    options += [f"--tracking.folder={tmp_path / 'mlflow'}", "--preprocess.commit_seconds=0"]
    command = [sys.executable, str(script), str(tmp_path / "videos"), str(tmp_path / "out"), *options]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        yield process
        process.kill()


@pytest.mark.slow
def test_rerun_after_kill_completes_the_dataset(
    driver: subprocess.Popen, tmp_path: Path, pretrained_folder: Path, ray_cluster: None
) -> None:
    out = tmp_path / "out"
    while not list(out.glob("clips/*.parquet")):
        assert driver.poll() is None, "the job ended before it could be killed"
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    survived = {
        name: file for name, file in files_of(out).items() if ".partial" not in name and name != ".lock"
    }
    assert not (out / "dataset.json").exists()
    (out / "clips" / ".clips-0.parquet.partial").write_text("incomplete")

    config = make_config(pretrained_folder, tmp_path)
    summary = preprocess(str(tmp_path / "videos"), str(out), config)
    clean = preprocess(str(tmp_path / "videos"), str(tmp_path / "clean"), config)
    after = files_of(out)
    assert {name: after[name] for name in survived} == survived
    assert not [name for name in after if ".partial" in name]
    assert 0 < summary["new_videos"] < 12 and summary["videos"] == clean["videos"] == 12
    assert summary["duplicates"] == clean["duplicates"] == 1
    rows, truth = read_clips(out), read_clips(tmp_path / "clean")
    assert [row["clip_id"] for row in rows] == [row["clip_id"] for row in truth]
    assert len({row["clip_id"] for row in rows}) == 36
    for row, other in zip(rows, truth, strict=True):
        a, b = decode_row(row), decode_row(other)
        assert all(np.allclose(a[name], b[name], atol=2e-3) for name in a), row["clip_id"]
    assert json.loads((out / "dataset.json").read_text())["counts"]["clips"] == 36
