"""Frames, times, aspect and colors of many kinds of files equal those of a linear decoding by ffmpeg."""

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import ExifTags, Image, ImageOps

from tcan import video_stream
from tcan.video import VideoFrames
from tcan.video_stream import VideoStream
from tests.tcan import video_zoo as zoo

pytestmark = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="requires the program ffmpeg (Debian package ffmpeg)"
)
QUICK = zoo.NAMES[::2]
RATES = (30.0, 2.0, 25.0, 60.0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    zoo.make(folder)
    return folder


def test_zoo_has_at_least_60_files() -> None:
    assert len(set(zoo.NAMES)) >= 60


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in zoo.NAMES]
)
def test_frames_times_aspect_and_colors_equal_ffmpeg(folder: Path, name: str) -> None:
    video = VideoStream(folder / name)
    assert (video.height, video.width) == zoo.displayed_size(folder / name)
    truth = zoo.decode(folder / name, video.height, video.width)
    frames = list(video)
    assert len(frames) == len(truth.frames)
    assert len(video.warnings) == (name in zoo.WARNINGS)
    assert zoo.WARNINGS.get(name, "") in "".join(video.warnings)
    tolerance = 2e-3 + zoo.LATE.get(name, 0)
    np.testing.assert_allclose([time for time, _ in frames], truth.times, atol=tolerance)
    limit = 3 if name in zoo.ROUNDED else 0.1
    assert max(difference(a, b) for (_, a), b in zip(frames, truth.frames, strict=True)) < limit

    # Frame k is the one that ffmpeg shows at k / fps.
    times = [time for time, _ in frames] if name in zoo.LATE else truth.times
    for fps in RATES if name in zoo.GROUPS else RATES[:1]:
        resampled = list(VideoFrames(folder / name, fps))
        shown = np.searchsorted(times, np.arange(len(resampled)) / fps + 2e-3, side="right") - 1
        for image, index in zip(resampled, shown, strict=True):
            assert difference(image, truth.frames[index]) < limit
        assert len(resampled) / fps == pytest.approx(truth.times[-1], abs=0.6)
        assert len(resampled) / fps > truth.times[-1]


@pytest.mark.parametrize(
    ("name", "fps"), [("stall.mp4", 24), ("stall.mkv", 24), ("stall.webm", 24), ("gaps.avi", 12)]
)
def test_without_a_rate_the_speed_and_the_duration_are_those_of_the_file(
    folder: Path, name: str, fps: int
) -> None:
    """As in `animate` and `pose`. The stalls last 0.5 s; the header of the AVI file counts an empty chunk per frame."""
    truth = zoo.decode(folder / name, 64, 64)
    video = VideoFrames(folder / name)
    frames = list(video)
    assert video.fps == pytest.approx(fps, rel=1e-3)
    assert (len(frames) - 1) / fps == pytest.approx(truth.times[-1], abs=0.6 / fps)
    for number, image in enumerate(frames):
        shown = np.searchsorted(truth.times, number / fps + 2e-3, side="right") - 1
        assert difference(image, truth.frames[shown]) < 0.1


@pytest.fixture
def source(folder: Path) -> np.ndarray:
    return np.stack([image for _, image in VideoStream(folder / "ffv1.mkv")])


@pytest.mark.parametrize(("hflip", "vflip"), [(True, False), (False, True)])
def test_mirrored_display_matrix_is_applied(tmp_path: Path, folder: Path, hflip: bool, vflip: bool) -> None:
    with av.open(str(folder / "no_b.mp4")) as original, av.open(str(tmp_path / "a.mp4"), "w") as mirrored:
        stream = mirrored.add_stream_from_template(original.streams.video[0])
        stream.set_display_rotation(0, hflip=hflip, vflip=vflip)
        for packet in original.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                mirrored.mux(packet)
    _, image = next(iter(VideoStream(tmp_path / "a.mp4")))
    _, plain = next(iter(VideoStream(folder / "no_b.mp4")))
    np.testing.assert_allclose(image[:: -1 if vflip else 1, :: -1 if hflip else 1], plain, atol=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_mjpeg_frames_is_applied(tmp_path: Path, orientation: int) -> None:
    """As PIL does for a JPEG image."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32], pixels[:24, 32:], pixels[24:, :32] = (220, 30, 30), (30, 200, 30), (40, 40, 220)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, exif=exif)
    jpeg = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.mjpeg").write_bytes(3 * jpeg)
    zoo._ffmpeg(*f"-f mjpeg -i {tmp_path}/a.mjpeg -c copy {tmp_path}/a.avi".split())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    video = VideoStream(tmp_path / "a.avi")
    assert (video.height, video.width) == expected.shape[:2]
    for _, image in video:
        assert difference(image, expected) < 8


def test_animated_webp_keeps_frames_and_times(tmp_path: Path, source: np.ndarray) -> None:
    pages = [Image.fromarray(image) for image in source]
    durations = [40] * 10 + [400] + [40] * 9
    pages[0].save(
        tmp_path / "a.webp", save_all=True, append_images=pages[1:], duration=durations, lossless=True
    )
    video = VideoStream(tmp_path / "a.webp")
    times, images = zip(*video, strict=True)
    np.testing.assert_array_equal(np.stack(images), source)
    np.testing.assert_allclose(times, np.cumsum([0, *durations[:-1]]) / 1000)
    assert len(list(video.resampled(25))) == pytest.approx(sum(durations) / 40)


@pytest.mark.parametrize(("transfer", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_hdr_is_tone_mapped_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transfer: str, name: str
) -> None:
    """Mid gray of SDR content that ffmpeg converted to HDR at 203 cd/m2 is mid gray again; untouched, PQ is 40 % darker."""
    zoo.make_hdr(tmp_path / "hdr.mp4", transfer, frames=3)
    prepared = []
    monkeypatch.setattr(
        video_stream, "VideoReformatter", lambda: prepared.append(VideoReformatter()) or prepared[-1]
    )
    video = VideoStream(tmp_path / "hdr.mp4")
    images = [image for _, image in video]
    assert video.warnings == [f"HDR ({name}); tone-mapped to BT.709"]
    assert [image.mean() for image in images] == pytest.approx([0xB0] * 3, abs=25)
    assert len(prepared) == 2  # for the first frame, then for all: preparing the tone mapping takes seconds


def test_change_of_size_fits_all_frames_to_the_first(tmp_path: Path) -> None:
    for size in (64, 32):
        options = f"-f lavfi -i testsrc2=s={size}x{size}:r=24 -frames:v 10 {zoo.MPEG2} {tmp_path}/{size}.ts"
        zoo._ffmpeg(*options.split())
    (tmp_path / "both.ts").write_bytes((tmp_path / "64.ts").read_bytes() + (tmp_path / "32.ts").read_bytes())
    video = VideoStream(tmp_path / "both.ts")
    times, images = zip(*video, strict=True)
    # ffmpeg shows 19 frames too: its MPEG-2 decoder drops the delayed frame at the change.
    assert len(images) == 19 and {image.shape for image in images} == {(64, 64, 3)}
    small = next(iter(VideoStream(tmp_path / "32.ts")))[1]
    assert difference(images[9], small.repeat(2, axis=0).repeat(2, axis=1)) < 25
    assert (np.diff(times) > 0).all() and times[-1] < 1
    assert "the frame size changes" in video.warnings[0]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two images in gray levels."""
    return float(np.abs(a.astype(int) - b).mean())
