"""Preprocessing jobs on Ray: their results for real video files, reruns, kills, crops and buckets."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import av
import decord
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from mlflow import MlflowClient
from PIL import Image

from pipelines import cli
from pipelines.config import Config
from pipelines.config.parser import load_config
from pipelines.dataset import decode_row, read_info
from pipelines.mlflow_store import resolve_uri
from pipelines.preprocess.job import preprocess
from pipelines.preprocess.latents import EncodedFrames
from pipelines.preprocess.models import PoseAndLatents
from pipelines.preprocess.sources import list_sources
from pipelines.puppets.world import Clip, sample_clip, write_clip
from tcan.errors import UserError
from tcan.weights import load_part
from tests.pipelines.faults import KEPT, SIZE, write_corpus, write_video

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


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_people_found_in_half_precision_stay_within_one_pixel(precision: str) -> None:
    clip = sample_clip("dance", seed=3, num_frames=4)
    full, half = (
        PoseAndLatents(load_config().pretrained, 4, "cpu", precision=p) for p in ("fp32", precision)
    )
    expected, found = (np.concatenate(actor.detector.detect(clip.frames)) for actor in (full, half))
    assert expected.shape == (4, 18, 3) and np.array_equal(expected[..., 2] > 0, found[..., 2] > 0)
    assert np.abs(expected[..., :2] - found[..., :2]).max() <= 1
    assert half.vae.dtype == half.detector.network.dtype != torch.float32


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


def test_invalid_output_folder_raises_user_error(tmp_path: Path, pretrained_folder: Path) -> None:
    write_video(tmp_path / "a.mp4", 8)
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        with pytest.raises(UserError, match=r"is a file|cannot be written"):
            preprocess(str(tmp_path / "a.mp4"), str(tmp_path / out), make_config(pretrained_folder, tmp_path))


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


END_SECONDS = 60  # for the end of a job after a signal, on a busy machine


@pytest.fixture
def drivers(tmp_path: Path, pretrained_folder: Path) -> Iterator[Callable[[], subprocess.Popen]]:
    """Starts preprocessing jobs with their own Ray; they commit each video once it is finished. Their output is in `log`."""
    for i in range(12):
        write_video(tmp_path / "videos" / f"{i}.mp4", 48, seed=20 + i)
    # A copy of the last video in the sorted list, which is not finished when the job is killed.
    shutil.copyfile(tmp_path / "videos" / "9.mp4", tmp_path / "videos" / "9 again.mp4")
    options = [
        *OPTIONS,
        f"--pretrained.vae={pretrained_folder}",
        f"--pretrained.pose={pretrained_folder / 'pose'}",
        f"--tracking.folder={tmp_path / 'mlflow'}",
        "--preprocess.commit_seconds=0",
    ]
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "preprocess",
        tmp_path / "videos",
        tmp_path / "out",
        *options,
    ]
    started = []

    def start() -> subprocess.Popen:
        with (tmp_path / "log").open("w") as log:
            started.append(
                subprocess.Popen(
                    command, cwd=Path(__file__).parents[2], stdout=log, stderr=log, start_new_session=True
                )
            )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_rerun_after_interrupt_and_kill_completes_the_dataset(
    drivers: Callable[[], subprocess.Popen], tmp_path: Path, pretrained_folder: Path, ray_cluster: None
) -> None:
    out = tmp_path / "out"
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        committed = set(out.glob("clips/*.parquet"))
        job = drivers()
        while set(out.glob("clips/*.parquet")) <= committed:
            assert job.poll() is None, "the job ended before its signal"
            time.sleep(0.05)
        if number == signal.SIGINT:
            os.killpg(job.pid, number)  # Ctrl-C reaches all processes of a terminal
        else:
            job.send_signal(number)
        assert job.wait(END_SECONDS) == status
        assert not (out / "dataset.json").exists()
        if number != signal.SIGKILL:
            output = (tmp_path / "log").read_text()
            assert f"{out}: interrupted; rerun the same command to resume\n" in output
            assert "Traceback" not in output and not (out / ".lock").exists(), output
    left = files_of(out)
    # The next job delivers the records of the killed one and deletes them.
    survived = {
        name: left[name]
        for name in left
        if ".partial" not in name and ".spool" not in name and name != ".lock"
    }
    assert not (out / "dataset.json").exists()
    (out / "clips" / ".clips-0.parquet.partial").write_text("incomplete")

    config = make_config(pretrained_folder, tmp_path)
    summary = preprocess(str(tmp_path / "videos"), str(out), config)
    clean = preprocess(str(tmp_path / "videos"), str(tmp_path / "clean"), config)
    after = files_of(out)
    assert {name: after[name] for name in survived} == survived
    assert not [name for name in after if ".partial" in name or ".spool" in name]
    assert 0 < summary["new_videos"] < 12 and summary["videos"] == clean["videos"] == 12
    assert summary["duplicates"] == clean["duplicates"] == 1
    rows, truth = read_clips(out), read_clips(tmp_path / "clean")
    assert [row["clip_id"] for row in rows] == [row["clip_id"] for row in truth]
    assert len({row["clip_id"] for row in rows}) == 36
    for row, other in zip(rows, truth, strict=True):
        a, b = decode_row(row), decode_row(other)
        assert all(np.allclose(a[name], b[name], atol=2e-3) for name in a), row["clip_id"]
    assert json.loads((out / "dataset.json").read_text())["counts"]["clips"] == 36
    client = MlflowClient(resolve_uri(config.tracking))
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert Counter(run.info.status for run in runs) == {"KILLED": 3, "FINISHED": 2}
