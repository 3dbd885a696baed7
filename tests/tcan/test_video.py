"""Reading and writing of videos and images, and center crops."""

import io
import shutil
import subprocess
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from tcan.crop import fit_image, fit_keypoints
from tcan.errors import UserError
from tcan.pose import read_poses
from tcan.video import VideoFrames, check_target, is_image, read_image, read_video, write_image, write_video


def smooth_frames(count: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 10 * i)], axis=-1) for i in range(count)
    ]
    return np.array(frames).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 48), (63, 49)])
def test_written_video_is_read_back(tmp_path: Path, height: int, width: int) -> None:
    frames = smooth_frames(7, height, width)
    write_video(iter(frames), tmp_path / "clip.mp4", fps=29.97)
    read, fps = read_video(tmp_path / "clip.mp4")
    assert fps == pytest.approx(29.97, abs=1e-3)
    assert read.shape == (7, height + height % 2, width + width % 2, 3)
    assert np.abs(read[:, :height, :width].astype(int) - frames).mean() < 3
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert len(read_video(tmp_path / "clip.mp4", max_frames=3)[0]) == 3


def test_each_format_preserves_the_frames(tmp_path: Path) -> None:
    frames = smooth_frames(12, 63, 49)
    for name, codec, size in (
        ("a.mp4", "h264", (64, 50)),
        ("a.webm", "vp9", (64, 50)),
        ("a.GIF", "gif", (63, 49)),
    ):
        write_video(iter(frames), tmp_path / name, fps=25)
        read, fps = read_video(tmp_path / name)
        assert read.shape == (12, *size, 3) and fps == 25, name
        assert np.abs(read[:, :63, :49].astype(int) - frames).mean() < 4, name
        with av.open(str(tmp_path / name)) as container:
            assert container.streams.video[0].codec_context.name == codec
    write_video(iter(frames), tmp_path / "images", fps=25)
    names = [f"{i:06}.png" for i in range(12)]
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == names
    for name, frame in zip(names, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / name)), frame)
    assert len(list(tmp_path.iterdir())) == 4  # no temporary files


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_equal_frames_give_equal_videos(suffix: str, tmp_path: Path) -> None:
    """An encoder that uses memory which it has not initialized gives different ones. Webm files have random identifiers."""
    rng = np.random.default_rng(0)
    texture = np.repeat(np.repeat(rng.integers(0, 256, (16, 32, 3), np.uint8), 8, 0), 8, 1)
    frames = [np.roll(texture, 3 * shift, 1)[:96, :192] for shift in range(12)]
    contents = set()
    memory = []  # changes the contents of the memory that the next encoder receives
    for number in range(8):
        memory.append(rng.bytes(10_000 * (number + 1)))
        write_video(frames, tmp_path / f"{number}{suffix}", 24)
        contents.add(read_video(tmp_path / f"{number}{suffix}")[0].tobytes())
    assert len(contents) == 1


def test_gif_has_the_duration_of_the_video(tmp_path: Path) -> None:
    write_video(smooth_frames(24, 32, 32), tmp_path / "clip.gif", fps=29.97)
    with Image.open(tmp_path / "clip.gif") as gif:
        durations = []
        for number in range(gif.n_frames):
            gif.seek(number)
            durations.append(gif.info["duration"])
        assert gif.info["loop"] == 0  # repeats forever
    assert len(durations) == 24 and sum(durations) == pytest.approx(24 / 29.97 * 1000, abs=20)


@pytest.mark.parametrize(
    ("codec", "suffix", "target", "expected"),
    [
        ("aac", ".mp4", "out.mp4", "aac"),
        ("libopus", ".webm", "out.webm", "opus"),
        ("aac", ".mp4", "out.webm", "opus"),
        ("libopus", ".webm", "out.mp4", "aac"),
    ],
)
def test_audio_is_copied_in_sync_and_cut_to_the_frames(
    codec: str, suffix: str, target: str, expected: str, tmp_path: Path
) -> None:
    """A tone that changes from 440 Hz to 660 Hz after 1 s still does so; the audio is as long as the frames."""
    source, rate = tmp_path / f"tone{suffix}", 48000
    time = np.arange(3 * rate) / rate
    tone = (0.3 * np.sin(2 * np.pi * np.where(time < 1, 440, 660) * time)).astype(np.float32)
    with av.open(str(source), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        for start in range(0, len(tone), 960):
            audio = av.AudioFrame.from_ndarray(tone[None, start : start + 960], format="flt", layout="mono")
            audio.sample_rate, audio.pts = rate, start
            container.mux(stream.encode(audio))
        container.mux(stream.encode(None))
    write_video(smooth_frames(50, 32, 32), tmp_path / target, fps=25, audio=source)
    assert len(read_video(tmp_path / target)[0]) == 50
    with av.open(str(tmp_path / target)) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name == expected
        decoded = np.concatenate([audio.to_ndarray()[0] for audio in container.decode(stream)])
        assert len(decoded) / stream.rate == pytest.approx(2, abs=0.1)
        for begin, pitch in ((0.2, 440), (1.2, 660)):
            part = decoded[int(begin * stream.rate) :][: stream.rate // 2]
            assert np.abs(np.fft.rfft(part)).argmax() * 2 == pytest.approx(pitch, abs=4)


X264 = "-c:v libx264 -preset ultrafast -pix_fmt yuv420p"
BEEP = "aevalsrc=0.5*sin(2*PI*1000*t)*gte(t\\,0.5):s=48000:d=1.5"
"""Silence, then a tone from 0.5 s on."""


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="requires the program ffmpeg")
@pytest.mark.parametrize("target", ["out.mp4", "out.webm"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beep.wmv", "-c:v wmv2 -c:a wmav2"),  # most audio frames have no time stamp
        (
            "beep.mp4",
            f"{X264} -bf 2 -c:a aac -movflags frag_keyframe+empty_moov",
        ),  # the first image is at 0.083 s
        ("beep.ts", f"{X264} -bf 2 -c:a aac -output_ts_offset 95440"),
        ("beep.mpg", "-c:v mpeg2video -c:a mp2"),  # the clock starts at 0.5 s
    ],
)
def test_sound_stays_in_sync_with_the_images(name: str, options: str, target: str, tmp_path: Path) -> None:
    """The tone begins 0.5 s after the first image, as in the source; the ear notices differences above 20 ms."""
    inputs = ["-f", "lavfi", "-i", "testsrc2=s=64x64:r=24:d=1.5", "-f", "lavfi", "-i", BEEP]
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", *inputs, *options.split(), str(tmp_path / name)]
    subprocess.run(command, check=True)
    write_video(smooth_frames(36, 32, 32), tmp_path / target, fps=24, audio=tmp_path / name)
    with av.open(str(tmp_path / target)) as container:
        stream = container.streams.video[0]
        first = next(float(image.pts * image.time_base) for image in container.decode(stream))
    with av.open(str(tmp_path / target)) as container:
        for audio in container.decode(audio=0):
            loud = np.flatnonzero(np.abs(audio.to_ndarray()[0]) > 0.2)
            if len(loud):
                begin = float(audio.pts * audio.time_base) + loud[0] / audio.sample_rate
                break
    assert begin - first == pytest.approx(0.5, abs=0.02)


def test_source_without_audio_gives_a_video_without_audio(tmp_path: Path) -> None:
    write_video(smooth_frames(3, 32, 32), tmp_path / "silent.mp4", fps=25)
    write_video(smooth_frames(3, 32, 32), tmp_path / "out.mp4", fps=25, audio=tmp_path / "silent.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert not container.streams.audio


def test_unwritable_targets_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file").touch()
    for name, audio, reason in (
        ("clip.avi", False, "unsupported suffix; use .mp4, .webm, .gif, or no suffix"),
        ("clip.gif", True, "this format has no audio"),
        ("images", True, "this format has no audio"),
        ("full", False, "a folder of this name exists"),
        ("file", False, "a file of this name exists"),
    ):
        with pytest.raises(UserError, match=reason):
            check_target(tmp_path / name, audio)
    with pytest.raises(UserError, match="cannot write the video"):
        write_video(smooth_frames(2, 32, 32), tmp_path / "no" / "images", fps=24)


def test_iteration_decodes_frames_on_demand(tmp_path: Path) -> None:
    """60 frames of 192 KiB each need less memory than 20 of them (numpy reports its arrays to tracemalloc)."""
    write_video(smooth_frames(60, 256, 256), tmp_path / "long.mp4", fps=24)
    video = VideoFrames(tmp_path / "long.mp4")
    assert (video.fps, video.height, video.width) == (24, 256, 256)
    tracemalloc.start()
    try:
        assert sum(1 for _ in video) == sum(1 for _ in video) == 60
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 20 * 256 * 256 * 3
        tracemalloc.reset_peak()
        read_video(tmp_path / "long.mp4")
        assert tracemalloc.get_traced_memory()[1] > 60 * 256 * 256 * 3  # tracemalloc does count the frames
    finally:
        tracemalloc.stop()


def test_mp4_is_h264_yuv420p(tmp_path: Path) -> None:
    write_video(smooth_frames(2, 32, 32), tmp_path / "clip.mp4", fps=24)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(24)


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    def broken():
        yield from smooth_frames(2, 32, 32)
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        write_video(broken(), tmp_path / "clip.mp4", fps=24)
    with pytest.raises(UserError, match="no frames to write"):
        write_video([], tmp_path / "none.mp4", fps=24)
    assert not list(tmp_path.iterdir())


def test_unreadable_videos_are_user_errors(tmp_path: Path) -> None:
    write_video(smooth_frames(60, 64, 64), tmp_path / "complete.mp4", fps=24)
    complete = (tmp_path / "complete.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(complete[: len(complete) * 2 // 3])
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    for name, reason in (
        ("text.mp4", "cannot be read as a video"),
        ("empty.mp4", "empty file"),
        ("folder.mp4", "a folder"),
        ("missing.mp4", "no such video"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            read_video(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_frames_of_a_truncated_video_are_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_video(smooth_frames(60, 64, 64), tmp_path / "complete.mp4", fps=24)
    complete = (tmp_path / "complete.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(complete[: len(complete) * 2 // 3])
    frames, _ = read_video(tmp_path / "cut.mp4")
    assert 0 < len(frames) < 60
    assert f"the header declares 60 frames, but {len(frames)} can be decoded" in caplog.text


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
    Image.fromarray(pixels).save(tmp_path / "rotated.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "rotated.png"), np.rot90(pixels, k=-1))


def test_photos_with_further_pages_are_images_and_animations_are_not(tmp_path: Path) -> None:
    for name, expected in (("photo.mpo", True), ("scan.tiff", True), ("a.gif", False), ("a.webp", False)):
        pages = [Image.new("RGB", (40, 60), color) for color in ("red", "blue")]
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        assert is_image(tmp_path / name) is expected, name
    assert (read_image(tmp_path / "photo.mpo")[0, 0] > (200, -1, -1)).all()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_video_whose_frames_have_exif_metadata_is_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    truth = []
    with (tmp_path / "camera.mjpeg").open("wb") as file:
        for frame in smooth_frames(4, 48, 32):
            part = io.BytesIO()
            Image.fromarray(frame).save(part, "jpeg", quality=95, subsampling=0, exif=exif)
            file.write(part.getvalue())
            truth.append(np.asarray(ImageOps.exif_transpose(Image.open(part)).convert("RGB")))
    frames, _ = read_video(tmp_path / "camera.mjpeg")
    assert frames.shape == np.shape(truth)
    assert np.abs(frames.astype(int) - truth).mean() < 2


def test_write_image_rejects_other_suffixes(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "clips", tmp_path / "clips.mp4", tmp_path / "clips.psd"):
        with pytest.raises(UserError, match="not the name of an image file"):
            write_image(smooth_frames(1, 64, 64)[0], path)
    assert not list(tmp_path.iterdir())


def test_unreadable_images_are_user_errors(tmp_path: Path) -> None:
    write_image(smooth_frames(1, 64, 64)[0], tmp_path / "complete.png")
    complete = (tmp_path / "complete.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(complete[: len(complete) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name in ("cut.png", "text.png", "empty.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)


def test_keypoints_are_cropped_like_the_image() -> None:
    """A white dot in a wide image and its keypoint are mapped to the same position of a tall image."""
    image = np.zeros((100, 200, 3), np.uint8)
    image[58:63, 108:113] = 255
    fitted = fit_image(image, 128, 64)
    keypoints = np.zeros((18, 3), np.float32)
    keypoints[4] = (110.5, 60.5, 0.7)
    mapped = fit_keypoints(keypoints, 100, 200, 128, 64)
    y, x = np.argwhere(fitted[..., 0] > 127).mean(axis=0) + 0.5
    np.testing.assert_allclose(mapped[4], [x, y, 0.7], atol=0.6)
    assert not mapped[:4].any()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a Git LFS pointer, not the file itself",
        ),
        ("<!DOCTYPE html><html></html>", "an HTML page, not "),
    ],
)
def test_what_was_saved_in_the_place_of_an_input_is_named(tmp_path: Path, content: str, reason: str) -> None:
    for name, read in (("a.png", read_image), ("a.mp4", VideoFrames), ("a.json", read_poses)):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name}: .*{reason}"):
            read(tmp_path / name)
