"""Videos and images on disk."""

import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tcan.errors import UserError
from tcan.video import (
    VideoFrames,
    check_target,
    fit_image,
    fit_keypoints,
    read_image,
    read_video,
    write_image,
    write_video,
)


def smooth_frames(count: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 10 * i)], axis=-1) for i in range(count)
    ]
    return np.array(frames).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 48), (63, 49)])
def test_video_round_trip(tmp_path: Path, height: int, width: int) -> None:
    frames = smooth_frames(7, height, width)
    write_video(iter(frames), tmp_path / "clip.mp4", fps=29.97)
    read, fps = read_video(tmp_path / "clip.mp4")
    assert fps == pytest.approx(29.97, abs=1e-3)
    assert read.shape == (7, height + height % 2, width + width % 2, 3)
    assert np.abs(read[:, :height, :width].astype(int) - frames).mean() < 3
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert len(read_video(tmp_path / "clip.mp4", max_frames=3)[0]) == 3


def test_each_format_holds_the_frames(tmp_path: Path) -> None:
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
    assert len(list(tmp_path.iterdir())) == 4  # nothing else is left


def test_a_gif_plays_at_the_pace_of_the_video(tmp_path: Path) -> None:
    write_video(smooth_frames(24, 32, 32), tmp_path / "clip.gif", fps=29.97)
    with Image.open(tmp_path / "clip.gif") as gif:
        shown = []
        for number in range(gif.n_frames):
            gif.seek(number)
            shown.append(gif.info["duration"])
        assert gif.info["loop"] == 0  # again and again
    assert len(shown) == 24 and sum(shown) == pytest.approx(24 / 29.97 * 1000, abs=20)


@pytest.mark.parametrize(
    ("codec", "suffix", "target", "expected"),
    [
        ("aac", ".mp4", "out.mp4", "aac"),
        ("libopus", ".webm", "out.webm", "opus"),
        ("aac", ".mp4", "out.webm", "opus"),
        ("libopus", ".webm", "out.mp4", "aac"),
    ],
)
def test_the_sound_of_a_video_is_copied(
    codec: str, suffix: str, target: str, expected: str, tmp_path: Path
) -> None:
    """A tone of 440 Hz that turns 660 Hz after a second is still both, at their time; no longer than the frames."""
    source, rate = tmp_path / f"tone{suffix}", 48000
    time = np.arange(3 * rate) / rate
    tone = (0.3 * np.sin(2 * np.pi * np.where(time < 1, 440, 660) * time)).astype(np.float32)
    with av.open(str(source), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        for start in range(0, len(tone), 960):
            sound = av.AudioFrame.from_ndarray(tone[None, start : start + 960], format="flt", layout="mono")
            sound.sample_rate, sound.pts = rate, start
            container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    write_video(smooth_frames(50, 32, 32), tmp_path / target, fps=25, sound=source)
    assert len(read_video(tmp_path / target)[0]) == 50
    with av.open(str(tmp_path / target)) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name == expected
        heard = np.concatenate([sound.to_ndarray()[0] for sound in container.decode(stream)])
        assert len(heard) / stream.rate == pytest.approx(2, abs=0.1)
        for begin, pitch in ((0.2, 440), (1.2, 660)):
            part = heard[int(begin * stream.rate) :][: stream.rate // 2]
            assert np.abs(np.fft.rfft(part)).argmax() * 2 == pytest.approx(pitch, abs=4)


def test_a_video_without_sound_has_none_to_copy(tmp_path: Path) -> None:
    write_video(smooth_frames(3, 32, 32), tmp_path / "silent.mp4", fps=25)
    write_video(smooth_frames(3, 32, 32), tmp_path / "out.mp4", fps=25, sound=tmp_path / "silent.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert not container.streams.audio


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file").touch()
    for name, sound, reason in (
        ("clip.avi", False, "name it .mp4, .webm, .gif, or without a suffix"),
        ("clip.gif", True, "cannot hold sound"),
        ("images", True, "cannot hold sound"),
        ("full", False, "a folder that is there already"),
        ("file", False, "a file that is there already"),
    ):
        with pytest.raises(UserError, match=reason):
            check_target(tmp_path / name, sound)
    with pytest.raises(UserError, match="cannot write the video"):
        write_video(smooth_frames(2, 32, 32), tmp_path / "no" / "images", fps=24)


def test_a_video_is_decoded_as_it_is_asked_for(tmp_path: Path) -> None:
    """60 frames of 192 KiB pass through less memory than 20 of them take; numpy reports its arrays to tracemalloc."""
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
        assert tracemalloc.get_traced_memory()[1] > 60 * 256 * 256 * 3  # what is measured is measured
    finally:
        tracemalloc.stop()


def test_video_is_what_players_know(tmp_path: Path) -> None:
    write_video(smooth_frames(2, 32, 32), tmp_path / "clip.mp4", fps=24)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == (
            "h264",
            "yuv420p",
            Fraction(24),
        )


def test_nothing_half_written(tmp_path: Path) -> None:
    def broken():
        yield from smooth_frames(2, 32, 32)
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        write_video(broken(), tmp_path / "clip.mp4", fps=24)
    with pytest.raises(UserError, match="no frame"):
        write_video([], tmp_path / "none.mp4", fps=24)
    assert not list(tmp_path.iterdir())


def test_unusable_videos(tmp_path: Path) -> None:
    write_video(smooth_frames(60, 64, 64), tmp_path / "whole.mp4", fps=24)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    for name, reason in (
        ("cut.mp4", "cannot be read as a video"),
        ("text.mp4", "cannot be read as a video"),
        ("empty.mp4", "empty file"),
        ("folder.mp4", "a folder"),
        ("missing.mp4", "no such video"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            read_video(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_image_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, k=-1))


def test_names_that_are_no_images(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "clips", tmp_path / "clips.mp4", tmp_path / "clips.psd"):
        with pytest.raises(UserError, match="must name a image"):
            write_image(smooth_frames(1, 64, 64)[0], path)
    assert not list(tmp_path.iterdir())


def test_unusable_images(tmp_path: Path) -> None:
    write_image(smooth_frames(1, 64, 64)[0], tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a image")
    (tmp_path / "empty.png").touch()
    for name in ("cut.png", "text.png", "empty.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)


def test_keypoints_follow_the_image() -> None:
    """A white dot in a wide image, and its keypoint, end in the same place of a tall canvas."""
    image = np.zeros((100, 200, 3), np.uint8)
    image[58:63, 108:113] = 255
    fitted = fit_image(image, 128, 64)
    keypoints = np.zeros((18, 3), np.float32)
    keypoints[4] = (110.5, 60.5, 0.7)
    placed = fit_keypoints(keypoints, 100, 200, 128, 64)
    y, x = np.argwhere(fitted[..., 0] > 127).mean(axis=0) + 0.5
    np.testing.assert_allclose(placed[4], [x, y, 0.7], atol=0.6)
    assert not placed[:4].any()
