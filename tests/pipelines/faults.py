"""Corpus of valid, unusual and broken video files for the preprocessing tests."""

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SIZE = 64
KEPT = ("kept", "")


def disc_frames(num_frames: int, height: int = SIZE, width: int = SIZE, seed: int = 0) -> list[np.ndarray]:
    """Frames of a disc that moves over a uniform background, each uint8 RGB [height, width, 3].

    The upper left quarter is brighter, so that flips and rotations are detectable.
    """
    colours = np.random.default_rng(seed).integers(40, 175, (2, 3))
    rows, columns = np.mgrid[:height, :width]
    brightness = 40 * ((rows < height // 2) & (columns < width // 2))[..., None]
    frames = []
    for i in range(num_frames):
        disc = (rows - height / 2) ** 2 + (columns - 8 - i) ** 2 < 100
        frames.append((np.where(disc[..., None], colours[0], colours[1]) + brightness).astype(np.uint8))
    return frames


def write_video(
    path: Path,
    num_frames: int,
    height: int = SIZE,
    width: int = SIZE,
    seed: int = 0,
    fps: int = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: list[int] | None = None,
    audio: bool = False,
    index_first: bool = True,
    upscale: int = 1,
    **options: str,
) -> Path:
    """Write `disc_frames` in the container format given by the suffix.

    Args:
        times: timestamps of the frames in ms, for a variable frame rate.
        audio: add one second of silence.
        index_first: write the index of an mp4 at the beginning, so that a truncated file still contains it.
        upscale: factor by which each frame is enlarged.
        options: options of the codec.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mp4 = path.suffix.lower() in (".mp4", ".mov")
    with av.open(
        str(path), "w", options={"movflags": "faststart"} if mp4 and index_first else {}
    ) as container:
        if codec == "libx264":
            options = {"crf": "10"} | options
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width * upscale, height * upscale, pix_fmt
        stream.gop_size = 12
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            audio_stream = container.add_stream("aac", rate=44100)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
            silence.sample_rate = 44100
            container.mux(audio_stream.encode(silence))
            container.mux(audio_stream.encode())
        for i, image in enumerate(disc_frames(num_frames, height, width, seed)):
            image = image.repeat(upscale, axis=0).repeat(upscale, axis=1)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rotate(path: Path) -> Path:
    """Set the display matrix of an mp4 to a clockwise rotation by 90 degrees."""
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd")
    matrix = header + 4 + 40  # version 0: the matrix follows 40 bytes of times, ids and volume
    assert struct.unpack(">9i", content[matrix : matrix + 36]) == (
        1 << 16,
        0,
        0,
        0,
        1 << 16,
        0,
        0,
        0,
        1 << 30,
    )
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def trim(path: Path, seconds: float) -> Path:
    """Trim the beginning of an mp4 without re-encoding, as phones do.

    Frames that later frames refer to stay in the file with negative timestamps, which excludes them from display.
    """
    trimmed = path.with_stem(f"{path.stem} trimmed")
    with (
        av.open(str(path)) as original,
        av.open(str(trimmed), "w", options={"avoid_negative_ts": "disabled"}) as container,
    ):
        stream = container.add_stream_from_template(original.streams.video[0])
        for packet in original.demux(video=0):
            if packet.pts is not None:
                offset = round(seconds / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, stream
                container.mux(packet)
    return trimmed


def write_audio(path: Path) -> None:
    """Write one second of silence without a video stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_corpus(folder: Path) -> dict[str, tuple[str, str]]:
    """Write the corpus and return the expected outcome of each file by name.

    Outcomes: ("kept", "") or, for a rejected file, (step, prefix of the reason).
    """
    expected: dict[str, tuple[str, str]] = {}

    def good(name: str, num_frames: int = 20, **options: object) -> Path:
        expected[name] = KEPT
        return write_video(folder / name, num_frames, seed=len(expected), **options)  # type: ignore[arg-type]

    def bad(name: str, step: str, reason: str = "") -> Path:
        expected[name] = (step, reason)
        return folder / name

    original = good("a.mp4", 40)
    good("with space/танец 舞 'quoted' #1.MP4", height=80, width=96)
    good("vp9.webm", codec="libvpx-vp9", **{"deadline": "realtime", "cpu-used": "8"})
    good("av1.mkv", codec="libsvtav1", preset="12")
    # As root, this encoder has given the thread a real-time priority. Programs started later would inherit it, and libvpx then
    # waits forever.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    good("mpeg4.avi", codec="mpeg4")
    good("mjpeg.mov", codec="mjpeg", pix_fmt="yuvj420p")
    good("ten bits.mp4", pix_fmt="yuv420p10le")
    good("no subsampling.mp4", pix_fmt="yuv444p")
    good("grey.mkv", pix_fmt="gray")
    good("odd size.mkv", height=49, width=71, pix_fmt="yuv444p")
    good("tiny.mp4", height=16, width=16)
    good("tall.mp4", height=320, width=64)
    good("8K.mp4", 8, height=144, width=256, upscale=30, codec="mpeg4")
    good("with audio.mp4", audio=True)
    good("index last.mp4", index_first=False)
    good("transport.ts")
    good("variable rate.mp4", times=[0, 40, 80, *range(400, 400 + 17 * 100, 100)])
    rotate(good("rotated.mp4", height=64, width=128))

    write_video(bad("one frame.mp4", "decode", "too short: 1 frames, fewer than 8"), 1, seed=50)
    write_video(bad("seven frames.mp4", "decode", "too short: 7 frames"), 7, seed=51)
    bad("empty.mp4", "list", "empty file").touch()
    bad("a (1).mp4", "list", "empty file").touch()  # an interrupted download next to the complete file
    bad("b copy.mp4", "duplicate", str(original)).write_bytes(original.read_bytes())
    bad("text.mp4", "decode", "not a video").write_text("not a video\n" * 50)
    bad("error page.mp4", "decode", "an HTML page, not a video").write_text("<html><body>404</body></html>")
    bad("noise.mp4", "decode", "not a video").write_bytes(np.random.default_rng(0).bytes(20_000))
    for fraction in (0.5, 0.9):
        long = good(f"cut at {fraction}.mp4", 60)  # the frames before the cut are used
        long.write_bytes(long.read_bytes()[: int(fraction * long.stat().st_size)])
    no_index = write_video(
        bad("cut before its index.mp4", "decode", "not a video"), 60, seed=52, index_first=False
    )
    no_index.write_bytes(no_index.read_bytes()[: no_index.stat().st_size // 2])
    header_only = write_video(bad("only a header.mp4", "decode", "not a video"), 20, seed=53)
    header_only.write_bytes(header_only.read_bytes()[:40])
    write_audio(bad("only audio.mp4", "decode"))
    Image.fromarray(disc_frames(1)[0]).save(bad("image.mp4", "decode", "too short"), format="png")
    bad("dangling.mp4", "list", "broken symbolic link").symlink_to(folder / "gone.mp4")
    latin1_name = bad("caf\\xe9.mp4", "list", "file name is not UTF-8").with_name(os.fsdecode(b"caf\xe9.mp4"))
    write_video(folder / "café.mp4", 20, seed=54).rename(latin1_name)
    os.mkfifo(bad("pipe.mp4", "list", "not a regular file"))
    (folder / "notes.json").write_text("{}")  # not a video suffix, so not listed as a source
    return expected
