"""A folder of all that people have under a video's name: good files of many kinds, odd ones and broken ones."""

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
    """uint8 RGB [height, width, 3] each: a disc that moves over a plain ground; the upper left quarter is brighter."""
    colours = np.random.default_rng(seed).integers(40, 175, (2, 3))
    rows, columns = np.mgrid[:height, :width]
    bright = 40 * ((rows < height // 2) & (columns < width // 2))[..., None]
    frames = []
    for i in range(num_frames):
        disc = (rows - height / 2) ** 2 + (columns - 8 - i) ** 2 < 100
        frames.append((np.where(disc[..., None], colours[0], colours[1]) + bright).astype(np.uint8))
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
    sound: bool = False,
    index_first: bool = True,
    enlarged: int = 1,
    **options: str,
) -> Path:
    """`disc_frames` as a file of the kind that its suffix says.

    times: of the frames, in ms, for a variable frame rate. index_first: so that an mp4 cut short still has its index.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mp4 = path.suffix.lower() in (".mp4", ".mov")
    with av.open(
        str(path), "w", options={"movflags": "faststart"} if mp4 and index_first else {}
    ) as container:
        if codec == "libx264":
            options = {"crf": "10"} | options
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width * enlarged, height * enlarged, pix_fmt
        stream.gop_size = 12
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            hum = container.add_stream("aac", rate=44100)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
            silence.sample_rate = 44100
            container.mux(hum.encode(silence))
            container.mux(hum.encode())
        for i, image in enumerate(disc_frames(num_frames, height, width, seed)):
            image = image.repeat(enlarged, axis=0).repeat(enlarged, axis=1)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rotate(path: Path) -> Path:
    """Marks an mp4 as filmed with the camera on its side: its images are to be shown turned by 90 degrees clockwise."""
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd")
    matrix = header + 4 + 40  # version 0: 40 bytes of times, ids and volume come first
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
    """Cuts off an mp4's beginning as phones do: what later images refer to stays in the file, marked as not to be shown."""
    trimmed = path.with_stem(f"{path.stem} trimmed")
    with (
        av.open(str(path)) as whole,
        av.open(str(trimmed), "w", options={"avoid_negative_ts": "disabled"}) as container,
    ):
        stream = container.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.pts is not None:
                earlier = round(seconds / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, stream
                container.mux(packet)
    return trimmed


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_corpus(folder: Path) -> dict[str, tuple[str, str]]:
    """Writes the files; returns {name: ("kept", "")} or, of a rejection, {name: (stage, how the reason begins)}."""
    expected: dict[str, tuple[str, str]] = {}

    def good(name: str, num_frames: int = 20, **options: object) -> Path:
        expected[name] = KEPT
        return write_video(folder / name, num_frames, seed=len(expected), **options)  # type: ignore[arg-type]

    def bad(name: str, stage: str, reason: str = "") -> Path:
        expected[name] = (stage, reason)
        return folder / name

    twin = good("a.mp4", 40)
    good("with space/танец 舞 'quoted' #1.MP4", height=80, width=96)
    good("vp9.webm", codec="libvpx-vp9", **{"deadline": "realtime", "cpu-used": "8"})
    good("av1.mkv", codec="libsvtav1", preset="12")
    good("mpeg4.avi", codec="mpeg4")
    good("mjpeg.mov", codec="mjpeg", pix_fmt="yuvj420p")
    good("ten bits.mp4", pix_fmt="yuv420p10le")
    good("no subsampling.mp4", pix_fmt="yuv444p")
    good("grey.mkv", pix_fmt="gray")
    good("odd size.mkv", height=49, width=71, pix_fmt="yuv444p")
    good("tiny.mp4", height=16, width=16)
    good("tall.mp4", height=320, width=64)
    good("8K.mp4", 8, height=144, width=256, enlarged=30, codec="mpeg4")
    good("with sound.mp4", sound=True)
    good("index last.mp4", index_first=False)
    good("transport.ts")
    good("variable rate.mp4", times=[0, 40, 80, *range(400, 400 + 17 * 100, 100)])
    rotate(good("turned.mp4", height=64, width=128))

    write_video(bad("one frame.mp4", "decode", "too short: 1 frames, fewer than 8"), 1, seed=50)
    write_video(bad("seven frames.mp4", "decode", "too short: 7 frames"), 7, seed=51)
    bad("empty.mp4", "list", "empty file").touch()
    bad("a (1).mp4", "list", "empty file").touch()  # a download that broke off, beside its good twin
    bad("b copy.mp4", "duplicate", str(twin)).write_bytes(twin.read_bytes())
    bad("text.mp4", "decode", "not a video").write_text("not a video\n" * 50)
    bad("error page.mp4", "decode", "not a video").write_text("<html><body>404</body></html>")
    bad("noise.mp4", "decode", "not a video").write_bytes(np.random.default_rng(0).bytes(20_000))
    for share in (0.5, 0.9):
        long = write_video(bad(f"cut at {share}.mp4", "decode"), 60, seed=int(60 * share))
        long.write_bytes(long.read_bytes()[: int(share * long.stat().st_size)])
    headless = write_video(
        bad("cut before its index.mp4", "decode", "not a video"), 60, seed=52, index_first=False
    )
    headless.write_bytes(headless.read_bytes()[: headless.stat().st_size // 2])
    stub = write_video(bad("only a header.mp4", "decode", "not a video"), 20, seed=53)
    stub.write_bytes(stub.read_bytes()[:40])
    write_sound(bad("only sound.mp4", "decode"))
    Image.fromarray(disc_frames(1)[0]).save(bad("image.mp4", "decode", "too short"), format="png")
    bad("nowhere.mp4", "list", "broken symbolic link").symlink_to(folder / "gone.mp4")
    latin = bad("caf\\xe9.mp4", "list", "file name is not UTF-8").with_name(os.fsdecode(b"caf\xe9.mp4"))
    write_video(folder / "café.mp4", 20, seed=54).rename(latin)
    os.mkfifo(bad("pipe.mp4", "list", "not a regular file"))
    (folder / "notes.json").write_text("{}")  # no source
    return expected
