"""Small video files of all kinds, made by the ffmpeg program, and their linear decoding by it."""

import subprocess
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SOURCE = "-f lavfi -i testsrc2=s=64x64:r=24 -frames:v 20"
X264 = "-c:v libx264 -crf 12 -preset ultrafast -pix_fmt yuv420p"
AUDIO = "-f lavfi -i testsrc2=s=64x64:r=24 -f lavfi -i sine -frames:v 20 -shortest"
BLUR = "-vf gblur=sigma=3"  # where frames are scaled or of 10 bits: versions of swscale differ at edges of colors
CUT = "-i {folder}/long_gop.mp4"
STALL = "setpts='if(lt(N,10),N/24,(N+12)/24)/TB'"
MPEG4 = "-c:v mpeg4 -q:v 2"
MPEG2 = "-c:v mpeg2video -q:v 2 -g 6 -bf 2"


@dataclass
class Truth:
    frames: np.ndarray  # uint8 RGB [F, H, W, 3]
    times: list[float]  # seconds after the first frame


# Name -> ffmpeg's options. Files that others are cut from are in the first group.
BASE = {
    "long_gop.mp4": f"{SOURCE} {X264} -g 250 -bf 2 -frames:v 48",
    "short_gop.mp4": f"{SOURCE} {X264} -g 6 -bf 2 -frames:v 48",
    "no_b.mp4": f"{SOURCE} {X264} -g 12 -bf 0 -frames:v 48",
    "sound.mp4": f"{AUDIO} {X264} -c:a aac",
    "complete.ts": f"{SOURCE} {X264} -g 12 -bf 2 -frames:v 48",
    "small.mkv": "-f lavfi -i testsrc2=s=32x32:r=24 -frames:v 10 -c:v mpeg2video -q:v 2",
}
FILES = {
    "plain.mkv": f"{SOURCE} {X264}",
    "plain.mov": f"{SOURCE} {X264}",
    "plain.flv": f"{SOURCE} {X264}",
    "plain.3gp": f"{SOURCE} {X264}",
    "hevc.mp4": f"{SOURCE} -c:v libx265 -x265-params log-level=0 -pix_fmt yuv420p",
    "hevc.mkv": f"{SOURCE} -c:v libx265 -x265-params log-level=0 -pix_fmt yuv420p10le {BLUR}",
    "vp8.webm": f"{SOURCE} -c:v libvpx -b:v 2M -deadline realtime",
    "vp9.webm": f"{SOURCE} -c:v libvpx-vp9 -b:v 2M -deadline realtime -cpu-used 8",
    "av1.mkv": f"{SOURCE} -c:v libsvtav1 -preset 12 -pix_fmt yuv420p",
    "theora.ogv": f"{SOURCE} -c:v libtheora -q:v 8",
    "mpeg4.mp4": f"{SOURCE} {MPEG4}",
    "mpeg4.avi": f"{SOURCE} {MPEG4}",
    "b_frames.avi": f"{SOURCE} {MPEG4} -bf 2",
    "packed.avi": f"{SOURCE} -c:v libxvid -bf 2 -q:v 2",
    "h264.avi": f"{SOURCE} {X264} -bf 0",
    "xvid_sound.avi": f"{AUDIO} {MPEG4} -vtag XVID -c:a libmp3lame",
    "mjpeg.avi": f"{SOURCE} -c:v mjpeg -q:v 2 -pix_fmt yuvj420p",
    "mjpeg.mov": f"{SOURCE} -c:v mjpeg -q:v 2 -pix_fmt yuvj420p",
    "ffv1.mkv": f"{SOURCE} -c:v ffv1",
    "huffyuv.avi": f"{SOURCE} -c:v huffyuv",
    "raw.avi": f"{SOURCE} -c:v rawvideo -pix_fmt bgr24",
    "prores.mov": f"{SOURCE} -c:v prores_ks",
    "wmv1.wmv": f"{SOURCE} -c:v wmv1 -q:v 2",
    "wmv2.wmv": f"{AUDIO} -c:v wmv2 -q:v 2 -c:a wmav2",
    "mpeg1.mpg": f"{SOURCE} -c:v mpeg1video -q:v 2",
    "mpeg2.mpg": f"{SOURCE} {MPEG2}",
    "mpeg2.ts": f"{SOURCE} {MPEG2}",
    "mpeg2.m2ts": f"{AUDIO} {MPEG2} -c:a ac3",
    "mpeg2.vob": f"{SOURCE} {MPEG2} -f vob",
    "offset.ts": f"{AUDIO} {X264} -c:a aac -output_ts_offset 95440 -f mpegts",
    "anim.gif": f"{SOURCE} -c:v gif",
    "anim.apng": f"{SOURCE} -c:v apng -f apng",
    "gray.mkv": f"{SOURCE} {X264} -pix_fmt gray",
    "yuv444.mp4": f"{SOURCE} {X264} -pix_fmt yuv444p",
    "yuv422.mp4": f"{SOURCE} {X264} -pix_fmt yuv422p",
    "ten_bits.mp4": f"{SOURCE} {X264} -pix_fmt yuv420p10le {BLUR}",
    "full_range.mp4": f"{SOURCE} {X264} -vf scale=out_range=pc -color_range pc",
    "bt709.mp4": f"{SOURCE} {X264} -vf scale=out_color_matrix=bt709 -colorspace bt709 -color_primaries bt709 -color_trc bt709",
    "bt601.mp4": f"{SOURCE} {X264} -colorspace smpte170m -color_primaries smpte170m -color_trc smpte170m",
    "odd.mkv": "-f lavfi -i testsrc2=s=63x49:r=24 -frames:v 20 -c:v ffv1 -pix_fmt yuv444p",
    "bt2020c.mp4": f"{SOURCE} -c:v libx265 -x265-params log-level=0:colormatrix=bt2020c -pix_fmt yuv420p {BLUR}",
    "ycgco.mp4": f"{SOURCE} -c:v libx265 -x265-params log-level=0:colormatrix=ycgco -pix_fmt yuv420p {BLUR}",
    "still_and_sequence.avif": f"{SOURCE} -c:v libsvtav1 -preset 12 -pix_fmt yuv420p",
    "faststart.mp4": f"{SOURCE} {X264} -g 6 -bf 2 -movflags faststart",
    "ntsc.mp4": f"-f lavfi -i testsrc2=s=64x64:r=30000/1001 -frames:v 20 {X264}",
    "film.mkv": f"-f lavfi -i testsrc2=s=64x64:r=24000/1001 -frames:v 20 {X264}",
    "sar_wide.mp4": f"{SOURCE} {X264} {BLUR},scale=48:64,setsar=4/3",
    "sar_tall.mkv": f"{SOURCE} {X264} {BLUR},scale=64:48,setsar=3/4",
    "sar_dvd.mpg": f"{SOURCE} {MPEG2} -aspect 16:9 {BLUR}",
    "sar_stream.avi": f"{SOURCE} {MPEG4} {BLUR},setsar=8/9",
    "stall.mp4": f"{SOURCE} {X264} -vf {STALL} -vsync vfr -enc_time_base 1:1000",
    "stall.mkv": f"{SOURCE} {X264} -vf {STALL} -vsync vfr -enc_time_base 1:1000",
    "stall.webm": f"{SOURCE} -c:v libvpx -b:v 2M -vf {STALL} -vsync vfr -enc_time_base 1:1000",
    "gaps.avi": f"{SOURCE} {MPEG4} -vf setpts=2*N/24/TB -vsync vfr -r 24",
    "fragmented.mp4": f"{AUDIO} {X264} -bf 2 -c:a aac -movflags frag_keyframe+empty_moov",
    "interlaced.mpg": f"{SOURCE} -vf tinterlace=interleave_top,setfield=tff -flags +ilme+ildct {MPEG2}",
    "interlaced.mp4": f"{SOURCE} -vf tinterlace=interleave_top -c:v libx264 -crf 12 -preset ultrafast -flags +ilme+ildct -pix_fmt yuv420p",
}
DERIVED = {
    "rotate90.mp4": f"{CUT} -c copy -metadata:s:v:0 rotate=90",
    "rotate180.mp4": f"{CUT} -c copy -metadata:s:v:0 rotate=180",
    "rotate270.mov": f"{CUT} -c copy -metadata:s:v:0 rotate=270",
    "cut_long.mp4": "-ss 1.3 -i {folder}/long_gop.mp4 -c copy",
    "cut_short.mp4": "-ss 1.3 -i {folder}/short_gop.mp4 -c copy",
    "cut_no_b.mp4": "-ss 1.3 -i {folder}/no_b.mp4 -c copy",
    "cut_both_ends.mp4": "-ss 0.7 -i {folder}/short_gop.mp4 -t 0.8 -c copy",
    "cut.mkv": "-ss 1.3 -i {folder}/short_gop.mp4 -c copy",
    "copied.ts": "-i {folder}/short_gop.mp4 -c copy",
    "cover.mkv": "-i {folder}/small.mkv -i {folder}/long_gop.mp4 -map 0 -map 1 -c copy",
    "cover.mp4": "-i {folder}/cover.png -i {folder}/sound.mp4 -map 0 -map 1 -c copy -disposition:v:0 attached_pic",
}
BYTES = {  # name -> (file, first byte, last byte) as fractions
    "begins_inside_gop.ts": ("complete.ts", 0.3, 1.0),
    "ends_inside_frame.ts": ("complete.ts", 0.0, 0.8),
    "ends_inside_frame.mkv": ("plain.mkv", 0.0, 0.8),
    "ends_inside_frame.mp4": ("faststart.mp4", 0.0, 0.8),
    "ends_inside_frame.flv": ("plain.flv", 0.0, 0.8),
    "ends_inside_frame.mpg": ("mpeg2.mpg", 0.0, 0.8),
}
FILTERS = dict.fromkeys(("interlaced.mpg", "interlaced.mp4"), "yadif=deint=interlaced")
ROUNDED = ("hevc.mkv", "ten_bits.mp4", "sar_wide.mp4", "sar_tall.mkv", "sar_dvd.mpg", "sar_stream.avi")
"""Scaled or of 10 bits. Versions of swscale interpolate chroma differently: ffmpeg 5.1 is 2.7 levels off the exact conversion
of `ten_bits.mp4`, the library of PyAV 18 is 2.5 off."""
LATE = {"packed.avi": 1 / 24}
"""ffmpeg's times omit the chunks without a frame that the container counts: seconds of difference."""
WARNINGS = {
    "packed.avi": "declares 20 frames, but 18 can be decoded",
    "xvid_sound.avi": "declares 21 frames, but 20 can be decoded",
    "gaps.avi": "declares 39 frames, but 20 can be decoded",
    "ends_inside_frame.mp4": "declares 20 frames, but 16 can be decoded",
    "bt2020c.mp4": "color matrix 10 is not supported",
    "ycgco.mp4": "color matrix 8 is not supported",
    "interlaced.mpg": "interlaced",
    "interlaced.mp4": "interlaced",
}
"""Part of the only warning about a file; all other files have none."""
GROUPS = ("mpeg2.mpg", "mpeg2.ts", "offset.ts", "wmv2.wmv", "cut_long.mp4")
"""Read at several rates: seeking to a frame of them gives one of another GOP."""
NAMES = [*BASE, *FILES, *DERIVED, *BYTES]


def make(folder: Path, names: Collection[str] = NAMES) -> None:
    """Write files by their names, and those that others are made from, with two processes of ffmpeg at a time."""

    def one(item: tuple[str, str]) -> None:
        name, options = item
        _ffmpeg(*options.format(folder=folder).split(), str(folder / name))

    sources = {BYTES[name][0] for name in names if name in BYTES}
    files = {name: options for name, options in FILES.items() if name in {*names, *sources}}
    cover = {"cover.png": "-f lavfi -i testsrc2=s=128x128 -frames:v 1"}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, {**BASE, **files, **cover}.items()))
        list(pool.map(one, ((name, DERIVED[name]) for name in names if name in DERIVED)))
    for name in names:
        if name in BYTES:
            source, begin, end = BYTES[name]
            content = (folder / source).read_bytes()
            (folder / name).write_bytes(content[int(begin * len(content)) : int(end * len(content))])


def make_hdr(path: Path, transfer: str, frames: int) -> None:
    """Write gray frames (0xB0) in HDR with a transfer function by its name in ffmpeg."""
    hdr = f"zscale=tin=bt709:pin=bt709:min=bt709:t={transfer}:p=bt2020:m=bt2020nc:npl=203,format=yuv420p10le"
    tags = f"log-level=0:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    _ffmpeg(
        *("-f", "lavfi", "-i", "color=0xb0b0b0:s=64x64", "-frames:v", str(frames), "-vf", hdr),
        *("-c:v", "libx265", "-x265-params", tags, str(path)),
    )


def decode(path: Path, height: int, width: int) -> Truth:
    """Decode linearly with ffmpeg. It chooses the stream, rotates, and scales to the displayed size."""
    filters = ",".join(filter(None, [FILTERS.get(path.name), f"scale={width}:{height}", "showinfo"]))
    done = _ffmpeg(
        *("-loglevel", "info", "-i", str(path), "-an", "-vf", filters, "-vsync", "passthrough"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-"),
    )
    times = [
        float(line.split(b"pts_time:")[1].split()[0])
        for line in done.stderr.splitlines()
        if b"pts_time:" in line
    ]
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
    return Truth(frames, [time - times[0] for time in times])


def displayed_size(path: Path) -> tuple[int, int]:
    """Height and width by ffmpeg, after rotation, with square pixels (the shorter side of a pixel is scaled up)."""
    square = "scale='round(iw*max(sar,1))':'round(ih/min(sar,1))'"
    done = _ffmpeg(
        *("-i", str(path), "-an", "-frames:v", "1", "-vf", square, "-c:v", "ppm", "-f", "image2pipe", "-")
    )
    width, height = done.stdout.split(maxsplit=3)[1:3]
    return int(height), int(width)


def _ffmpeg(*options: str) -> subprocess.CompletedProcess:
    command = ["ffmpeg", "-hide_banner", "-nostdin", "-loglevel", "error", "-y", "-threads", "1", *options]
    return subprocess.run(command, capture_output=True, check=True)
