"""Decoding of real video files into clips."""

import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import av
import decord
import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.preprocess import decoder_process
from pipelines.preprocess.decode import DECODER, DecodeError, decode, decode_clips
from tcan import video_stream
from tcan.crop import fit_image
from tcan.video import write_video as write_frames
from tests.pipelines.faults import SIZE, disc_frames, rotate, trim, write_video
from tests.tcan import video_zoo as zoo

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


ZOO = (
    *(
        "mpeg2.mpg",
        "mpeg2.ts",
        "offset.ts",
        "wmv2.wmv",
    ),  # seeking to a frame of them gives one of another GOP
    *("cut_long.mp4", "cut_short.mp4", "cut_no_b.mp4", "cut.mkv"),  # cut without re-encoding
    *("sar_wide.mp4", "sar_dvd.mpg"),
    *("packed.avi", "xvid_sound.avi"),  # the header counts more frames than there are
    *("begins_inside_gop.ts", "ends_inside_frame.mpg", "ends_inside_frame.mp4"),
    *("cover.mkv", "cover.mp4", "gaps.avi", "stall.mp4", "theora.ogv", "interlaced.mpg"),
)


@pytest.fixture(scope="module")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    zoo.make(folder, ZOO)
    return folder


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="requires the program ffmpeg")
@pytest.mark.parametrize("name", ZOO)
def test_clips_contain_the_frames_of_a_linear_decode_by_ffmpeg(zoo_folder: Path, name: str) -> None:
    """Every frame once, and the frame at k / fps with resampling."""
    size = zoo.displayed_size(zoo_folder / name)
    truth = zoo.decode(zoo_folder / name, *size)
    times = np.array(truth.times)
    limit = 3 if name in zoo.ROUNDED else 0.1
    for fps in (None, 2.0, 25.0, 30.0, 60.0):
        options = DECODE | {"sizes": [size], "fps": fps, "min_clip_frames": 1}
        *clips, _ = decoder_process.decode(str(zoo_folder / name), **options)
        frames = np.concatenate([frames for _, frames in clips])
        if fps is None:
            shown = np.arange(len(truth.frames))
        elif name in zoo.LATE:
            continue  # ffmpeg's times omit the chunks without a frame
        else:
            shown = np.searchsorted(times, np.arange(len(frames)) / fps + 2e-3, side="right") - 1
            assert abs(len(frames) / fps - times[-1]) < 0.6
        assert len(frames) == len(shown)
        assert np.abs(frames.astype(int) - truth.frames[shown]).mean(axis=(1, 2, 3)).max() < limit


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
