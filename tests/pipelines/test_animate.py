"""`tcan animate` and `tcan pose`: output, memory, and one-line user errors."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pipelines import cli, tracking
from pipelines.animate import Animation, animate, read_inputs, read_motion, side_by_side
from pipelines.config import Config
from pipelines.config.parser import load_config
from pipelines.inference import choose_device, load_pipeline
from pipelines.match import output_size
from pipelines.mlflow_model import save_model
from pipelines.pose import number_labels, overlay, pose
from pipelines.puppets.world import sample_clip, write_clip
from tcan.crop import fit_image
from tcan.errors import UserError
from tcan.pipeline import TCANPipeline
from tcan.pixels import to_uint8
from tcan.pose import draw_poses, read_poses, write_poses
from tcan.sampling import SamplingConfig
from tcan.video import VideoFrames, read_image, read_video, write_image, write_video
from tcan.weights import MINI_MODEL
from tests.pipelines.test_cli import error_of

STEP = ("--animate.steps", "1", "--animate.guidance_scale", "1")


def config(*options: str) -> Config:
    return load_config(*STEP, *options)


def images(folder: Path) -> np.ndarray:
    """Read the frames of a folder of PNG images, `[F, H, W, 3]`."""
    return np.stack([read_image(file) for file in sorted(folder.iterdir())])


@pytest.fixture(scope="module")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of hero.png, and dance.mp4 (6 frames) with its ground-truth keypoints in dance.json."""
    folder = tmp_path_factory.mktemp("puppets")
    write_image(sample_clip("dance", 1, 1).frames[0], folder / "hero.png")
    write_clip(sample_clip("dance", 2, 6, every=2), folder / "dance")
    return folder


class LiveArrays:
    """Counts the arrays that passed, and the largest number of them that existed at once."""

    def __init__(self) -> None:
        self.alive = self.peak = self.total = 0

    def watch(self, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for array in arrays:
            self.alive, self.total = self.alive + 1, self.total + 1
            self.peak = max(self.peak, self.alive)
            weakref.finalize(array, self._release)
            yield array

    def _release(self) -> None:
        self.alive -= 1


def test_long_video_is_streamed_with_identical_frames(
    model_folder: Path, puppets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the input nor the output frames are ever all in memory, and the result is bit-identical to that of one
    pipeline call with all frames."""
    dance, _ = read_video(puppets / "dance.mp4")
    write_video((dance[i % 10 if i % 10 < 6 else 10 - i % 10] for i in range(50)), tmp_path / "long.mp4", 30)
    inputs, outputs = LiveArrays(), LiveArrays()
    iterate, decode = VideoFrames.__iter__, TCANPipeline.decode
    with monkeypatch.context() as patch:
        patch.setattr(VideoFrames, "__iter__", lambda self: inputs.watch(iterate(self)))
        patch.setattr(TCANPipeline, "decode", lambda *arguments: outputs.watch(decode(*arguments)))
        animate(
            Animation(puppets / "hero.png", tmp_path / "result", tmp_path / "long.mp4"),
            model_folder,
            config(),
        )
    assert inputs.total >= 50 and inputs.peak <= 2 * 16  # a batch of the detector, and the next one
    assert outputs.total == 7 and outputs.peak <= 2  # batches of 8

    frames, fps = read_video(tmp_path / "long.mp4")
    pipe = load_pipeline(model_folder, config())
    generator = torch.Generator().manual_seed(0)
    hero = read_image(puppets / "hero.png")
    expected = pipe(hero, frames, sampling=config().animate, generator=generator).frames
    np.testing.assert_array_equal(images(tmp_path / "result"), to_uint8(expected))
    assert fps == 30 and expected.shape == (50, 64, 64, 3)


def test_pose_file_drives_the_same_animation_as_the_video(
    model_folder: Path, puppets: Path, tmp_path: Path
) -> None:
    pose(puppets / "dance.mp4", tmp_path / "dance.json", config())
    pose(puppets / "hero.png", tmp_path / "hero.json", config())
    found, truth = read_poses(tmp_path / "dance.json"), read_poses(puppets / "dance.json")
    assert (found.height, found.width, found.fps) == (128, 128, 24)
    torso = [1, 2, 5, 8, 11]  # joints that the detector finds reliably
    distances = np.stack(found.people)[:, 0, torso, :2] - np.stack(truth.people)[:, 0, torso, :2]
    assert np.median(np.linalg.norm(distances, axis=-1)) < 4
    assert read_video(tmp_path / "dance.preview.mp4")[0].shape == (6, 128, 128, 3)
    assert read_image(tmp_path / "hero.preview.png").shape == (128, 128, 3)

    hero = puppets / "hero.png"
    files = {"poses": tmp_path / "dance.json", "character": tmp_path / "hero.json"}
    animate(Animation(hero, tmp_path / "a", puppets / "dance.mp4"), model_folder, config())
    animate(Animation(hero, tmp_path / "b", **files), model_folder, config())
    np.testing.assert_array_equal(images(tmp_path / "a"), images(tmp_path / "b"))

    corrected = json.loads((tmp_path / "dance.json").read_text())
    corrected["frames"][0]["people"][0]["pose_keypoints_2d"][3 * 4 + 1] -= 30  # raise the right wrist
    (tmp_path / "dance.json").write_text(json.dumps(corrected))
    animate(Animation(hero, tmp_path / "c", **files), model_folder, config())
    assert (images(tmp_path / "c") != images(tmp_path / "a")).any()


def test_registered_model_predicts_with_sampling_params(
    model_folder: Path, puppets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc

    model = shutil.copytree(model_folder, tmp_path / "model")
    info = json.loads((model / "tcan.json").read_text())
    info["pretrained"]["pose"] = {"source": "mini"}  # as in a model that was trained with it
    (model / "tcan.json").write_text(json.dumps(info))
    settings = config(f"--tracking.folder={tmp_path / 'runs'}")
    with tracking.run("stage2", "stage 2", settings.tracking, {}, tmp_path) as run:
        sampling = SamplingConfig(steps=2, guidance_scale=2.0, start_from_reference=True)
        run.model(model, "tcan", "ours", sampling)

    # Not set_tracking_uri, which would change the environment of later tests.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.resolve_uri(settings.tracking))
    registered = mlflow.pyfunc.load_model("models:/tcan@ours")
    row = {"image": str(puppets / "hero.png"), "driving": str(puppets / "dance.mp4")}
    first, second = registered.predict(pd.DataFrame([row, row]), params={"seed": 3})
    unguided = registered.predict([row], params={"guidance_scale": 1.0, "seed": 3})[0]
    not_retargeted = registered.predict([row], params={"retarget": "none", "seed": 3})[0]
    frames = TCANPipeline.from_pretrained(model)(
        read_image(row["image"]),
        read_video(row["driving"])[0],
        generator=torch.Generator().manual_seed(3),
        steps=2,
        guidance_scale=2,
        start_from_reference=True,
    ).frames
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, np.asarray(frames) * 255, atol=0.5001)
    assert first.dtype == np.uint8 and first.shape == (6, 64, 64, 3)
    assert not np.array_equal(first, unguided) and not np.array_equal(first, not_retargeted)


@pytest.mark.slow
def test_registered_model_predicts_in_an_environment_of_its_own_requirements(
    puppets: Path, tmp_path: Path
) -> None:
    uv = Path(sys.prefix, "uv/bin/uv")
    if not uv.exists():
        pytest.skip("needs the environment of `make install`, which contains uv")
    save_model(MINI_MODEL, tmp_path / "model", asdict(SamplingConfig(steps=1, guidance_scale=1.0)))
    code = f"""
import mlflow.pyfunc, sys
row = {{"image": {str(puppets / "hero.png")!r}, "driving": {str(puppets / "dance.mp4")!r}}}
frames = mlflow.pyfunc.load_model("model").predict([row])[0]
import tcan
assert frames.shape == (6, 128, 128, 3) and tcan.__file__.startswith({str(tmp_path)!r}) and "ray" not in sys.modules
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for command in (
        [uv, "venv", "--python", sys.executable, "environment"],
        [uv, "pip", "install", "--python", "environment/bin/python", "-r", "model/requirements.txt"],
        ["environment/bin/python", "-c", code],
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_poses_from_file_without_retargeting_are_only_cropped(
    model_folder: Path, puppets: Path, tmp_path: Path
) -> None:
    """With a rectangular output; the drawn poses are in the middle column of the side-by-side video."""
    hero, poses = puppets / "hero.png", puppets / "dance.json"
    animation = Animation(hero, tmp_path / "wide", poses=poses, fps=12, side_by_side=True)
    wide = config("--animate.retarget", "none", "--animate.height", "64", "--animate.width", "128")
    assert read_inputs(animation, wide).fps == 12
    animate(animation, model_folder, wide)
    frames = images(tmp_path / "wide")
    assert frames.shape == (6, 64, 3 * 128, 3)
    keypoints = np.concatenate(read_poses(poses).people)
    keypoints[..., 1] -= 32  # the center crop of 128 x 128 (height x width) is 64 x 128
    np.testing.assert_array_equal(frames[:, :, 128:256], draw_poses(keypoints, 64, 128, 2))


def test_person_at_the_side_of_the_image_is_in_the_crop(
    model_folder: Path, puppets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The detected person chooses the crop, which the reference column of the side-by-side video shows."""
    hero = read_image(puppets / "hero.png")
    wide = np.concatenate([np.repeat(hero[:, :1], 256, axis=1), hero], axis=1)  # 128 x 384
    write_image(wide, tmp_path / "wide.png")
    animation = Animation(tmp_path / "wide.png", tmp_path / "out", puppets / "dance.mp4", side_by_side=True)
    animate(animation, model_folder, config("--animate.height", "64", "--animate.width", "64"))
    x0, y0, x1, y1 = map(
        int, re.findall(r"cropped to (\d+),(\d+),(\d+),(\d+) around the person", caplog.text)[0]
    )
    assert abs(x0 - 256) < 24 and x1 - x0 == 128 and (y0, y1) == (0, 128)
    reference = images(tmp_path / "out")[0, :, :64].astype(int)
    shifted = fit_image(np.ascontiguousarray(wide[:, x0:x1]), 64, 64)
    assert np.abs(reference - shifted).mean() < 8  # the crop starts at a fraction of a pixel
    assert np.abs(reference - fit_image(wide, 64, 64)).mean() > 16  # the centered crop shows only background


@pytest.mark.parametrize(
    ("height", "width", "options", "expected"),
    [
        (1080, 1920, [], (384, 704)),
        (4032, 3024, [], (576, 448)),
        (1000, 1010, [], (512, 512)),
        (500, 5000, [], (384, 768)),
        (1920, 1080, ["--animate.width", "288"], (512, 288)),
        (1080, 1920, ["--animate.height", "512"], (512, 912)),
        (500, 5000, ["--animate.height", "64"], (64, 128)),
        (1080, 1920, ["--animate.height", "512", "--animate.width", "256"], (512, 256)),
    ],
)
def test_output_has_the_aspect_ratio_of_the_image(
    height: int, width: int, options: list[str], expected: tuple[int, int]
) -> None:
    image = np.broadcast_to(np.uint8(0), (height, width, 3))
    assert output_size(image, (512, 512), config(*options)) == expected


def similarity(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Scale and shift from keypoints to keypoints, `[..., 3]`, fitted to x alone; they must also map y."""
    x, y = source[..., 0].ravel(), target[..., 0].ravel()
    scale, shift_x = np.polyfit(x, y, 1)
    shift_y = target[..., 1].mean() - scale * source[..., 1].mean()
    return float(scale), np.array([shift_x, shift_y])


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("retarget", ["robust", "none"])
def test_image_driver_and_output_of_different_aspect_ratios_do_not_stretch_bodies(
    puppets: Path, tmp_path: Path, fit: str, retarget: str
) -> None:
    """The poses in landscape and portrait outputs are those of the square one, scaled and shifted."""
    hero, file = read_image(puppets / "hero.png"), read_poses(puppets / "dance.json")
    poses = np.concatenate(file.people)
    poses[..., 2] = 1  # all joints are visible, so that all are compared
    write_poses(poses, tmp_path / "dance.json", 128, 128, 12)
    write_poses(poses + np.float32([50, 0, 0]), tmp_path / "wide.json", 128, 228, 12)

    def motion(image: np.ndarray, left: int, driving: str, size: tuple[int, int]) -> np.ndarray:
        write_image(image, tmp_path / "image.png")
        write_poses(poses[:1] + np.float32([left, 0, 0]), tmp_path / "hero.json", *image.shape[:2], 12)
        files = {"poses": tmp_path / driving, "out": tmp_path / "out", "image": tmp_path / "image.png"}
        if retarget == "robust":
            files["character"] = tmp_path / "hero.json"
        options = config("--animate.fit", fit, "--animate.retarget", retarget)
        inputs = read_inputs(Animation(**files), options)
        found = read_motion(None, Animation(**files), inputs, options, size)
        assert found.image.shape == (*size, 3)
        return found.poses[:, 0]

    square = motion(hero, 0, "dance.json", (64, 64))
    wide_hero = np.pad(hero, ((0, 0), (50, 50), (0, 0)), mode="edge")
    for size in ((48, 88), (88, 48)):
        for image, left in ((hero, 0), (wide_hero, 50)):
            for driving in ("dance.json", "wide.json"):
                found = motion(image, left, driving, size)
                scale, shift = similarity(square, found)
                np.testing.assert_allclose(found[..., :2], scale * square[..., :2] + shift, atol=0.02)
                if (
                    fit == "pad"
                ):  # the entire image, and without retargeting the entire driving frame, is visible
                    shown = {"dance.json": (128, 128), "wide.json": (128, 228)}[driving]
                    shown = shown if retarget == "none" else image.shape[:2]
                    assert 0.5 * scale == pytest.approx(min(size[0] / shown[0], size[1] / shown[1]), rel=1e-4)


def test_landscape_image_gives_a_landscape_video(model_folder: Path, puppets: Path, tmp_path: Path) -> None:
    """With --animate.fit pad, the reference shows the entire image, and its border pixels where it is too narrow."""
    hero = read_image(puppets / "hero.png")
    write_image(np.pad(hero, ((0, 0), (40, 60), (0, 0)), mode="edge"), tmp_path / "wide.png")
    files = {"driving": puppets / "dance.mp4", "side_by_side": True}
    animate(Animation(tmp_path / "wide.png", tmp_path / "wide", **files), model_folder, config())
    assert images(tmp_path / "wide").shape == (6, 48, 3 * 88, 3)
    tall = config("--animate.fit", "pad", "--animate.height", "96", "--animate.width", "40")
    animate(Animation(puppets / "hero.png", tmp_path / "tall", **files), model_folder, tall)
    frames = images(tmp_path / "tall")
    assert frames.shape == (6, 96, 3 * 40, 3)
    reference = frames[0, :, :40].astype(int)
    assert np.abs(reference[28:68] - fit_image(hero, 40, 40)).mean() < 2
    assert np.ptp(reference[:24], axis=0).max() <= 1 and np.ptp(reference[72:], axis=0).max() <= 1


def pair(folder: Path) -> None:
    """duo.png and duo.mp4 (8 frames): two puppets next to each other, on the right one of another character."""
    clips = [sample_clip("dance", seed, 8, every=2) for seed in (2, 5)]
    write_video(np.concatenate([clip.frames for clip in clips], axis=2), folder / "duo.mp4", 12)
    heroes = [sample_clip("dance", seed, 1).frames[0] for seed in (1, 7)]
    write_image(np.concatenate(heroes, axis=1), folder / "duo.png")


def test_dry_run_prints_the_verdict_and_writes_only_a_preview(
    model_folder: Path, puppets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"image": puppets / "hero.png", "out": tmp_path / "out.mp4", "driving": puppets / "dance.mp4"}
    animate(Animation(**files), model_folder, config(), dry_run=True)
    verdict = re.findall(r"^(?:ok|problem) +(\w+)  .*", text := capsys.readouterr().out, re.MULTILINE)
    assert verdict == ["frame", "limbs", "scale", "missing", "flips"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.preview.png"]
    sheet = read_image(tmp_path / "out.preview.png")
    assert sheet.shape == (3 * 336, 3 * 336, 3)  # the image and 6 frames; a margin of 20% around 240 pixels
    assert (sheet[:336, :336].max(axis=2) > 200).any() and not (sheet[-336:, 336:] != 32).any()

    animate(Animation(**files), model_folder, config())
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*text.splitlines()[:5], f"{tmp_path / 'out.mp4'}: 6 frames at 24 frames/s"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--animate.window", "33"], "animate.window = 33: the model's motion modules have 32 positions"),
        (["--animate.scheduler", "NoScheduler"], "scheduler NoScheduler: not supported"),
        (["--animate.scheduler", "LCMScheduler", "--animate.steps", "51"], "steps = 51: not supported"),
        (["--animate.lora", "no-lora.safetensors"], "LoRA no-lora.safetensors: cannot be read"),
        (
            ["--animate.pretrained", "config", "--pretrained.vae", "no-vae.ckpt"],
            "vae: no such file: no-vae.ckpt",
        ),
        (["--animate.device", "cuda"], "animate.device = cuda: no GPU"),
    ],
)
def test_dry_run_refuses_the_settings_that_the_job_refuses(
    model_folder: Path, puppets: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    files = {"image": puppets / "hero.png", "out": tmp_path / "out.mp4", "driving": puppets / "dance.mp4"}
    for dry_run in (False, True):
        with pytest.raises(UserError, match=re.escape(reason)):
            animate(Animation(**files), model_folder, config(*options), dry_run)
    assert not list(tmp_path.iterdir())


def test_dry_run_refuses_an_incomplete_model(model_folder: Path, puppets: Path, tmp_path: Path) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    (model / "motion_adapter" / "diffusion_pytorch_model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1"
    )
    files = {"image": puppets / "hero.png", "out": tmp_path / "out.mp4", "driving": puppets / "dance.mp4"}
    for dry_run in (False, True):
        with pytest.raises(UserError, match=r"motion_adapter.*: a Git LFS pointer"):
            animate(Animation(**files), model, config(), dry_run)


def test_match_reports_without_a_model(
    puppets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pose", str(puppets / "dance.mp4"), "--match", str(puppets / "hero.png")]
    assert cli.main([*arguments, "--out", str(tmp_path / "match.png")]) == 0
    assert "match.png: 6 frames, 0 problems" in capsys.readouterr().out
    assert read_image(tmp_path / "match.png").shape == (3 * 336, 3 * 336, 3)
    assert "missing --out" in error_of(capsys, "pose", str(puppets / "dance.mp4"))


def test_driver_who_leaves_the_frame_is_refused_by_strict_and_named_by_the_verdict(
    model_folder: Path, puppets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver is 20% of the character's height and walks across the frame: its movement is scaled up."""
    walk = np.concatenate(read_poses(puppets / "dance.json").people)
    walk[..., :2] = (walk[..., :2] - walk[:1, 1:2, :2]) / 5 + (20, 60)
    walk[..., 0] += 16 * np.arange(len(walk))[:, None]
    write_poses(walk, tmp_path / "walk.json", 128, 128, 12)
    files = {"image": puppets / "hero.png", "poses": tmp_path / "walk.json", "out": tmp_path / "out"}
    with pytest.raises(UserError, match=r"out: \d+% of the joints are outside"):
        animate(Animation(**files, strict=True), model_folder, config())
    assert not (tmp_path / "out").exists()
    animate(Animation(**files), model_folder, config())
    assert re.search(r"^problem frame .*% of the joints are outside", capsys.readouterr().out, re.MULTILINE)
    assert len(images(tmp_path / "out")) == len(walk)


def test_two_people_get_the_motions_that_are_mapped_to_them(model_folder: Path, tmp_path: Path) -> None:
    """The left person of the image gets the motion of the right person of the video, and the reverse; the drawn poses are
    those of two animations of one person each."""
    pair(tmp_path)
    wide = config("--animate.width", "128")
    files = {"image": tmp_path / "duo.png", "driving": tmp_path / "duo.mp4"}
    inputs = read_inputs(Animation(**files, out=tmp_path / "out"), wide)
    detector = load_pipeline(model_folder, wide).pose_detector

    def motion(person: str, driving_person: str) -> np.ndarray:
        animation = Animation(**files, out=tmp_path / "out", person=person, driving_person=driving_person)
        return read_motion(detector, animation, inputs, wide, (64, 128)).poses

    both = motion("left+right", "right+left")
    assert both.shape == (8, 2, 18, 3)
    necks = both[:, :, 1, 0].mean(axis=0)
    assert necks[0] < 64 < necks[1]
    for index, selection in enumerate((("left", "right"), ("right", "left"))):
        np.testing.assert_array_equal(both[:, index : index + 1], motion(*selection))
    with pytest.raises(UserError, match=r"duo\.png: 1 people selected, but 2 in the driving motion"):
        motion("left", "left+right")
    selection = Animation(**files, out=tmp_path / "out", person="left", driving_person="left+right")
    with pytest.raises(
        UserError, match=r"--person left: 1 of the image, but --driving_person left\+right are 2"
    ):
        read_inputs(selection, wide)

    animation = Animation(
        **files, out=tmp_path / "out", person="left+right", driving_person="2+1", side_by_side=True
    )
    animate(animation, model_folder, wide)
    frames = images(tmp_path / "out")
    assert frames.shape == (8, 64, 3 * 128, 3)
    drawn = frames[:, :, 128:256].reshape(8, 64, 2, 64, 3).max(axis=(1, 3, 4))
    assert (drawn > 100).all()  # a skeleton on both sides of each frame


def test_pose_preview_shows_numbers_and_the_selected_person(tmp_path: Path) -> None:
    pair(tmp_path)
    pose(tmp_path / "duo.mp4", tmp_path / "right.json", config(), "right")
    poses = np.stack(read_poses(tmp_path / "right.json").people)[:, 0]
    assert (poses[:, 1, 0] > 128).all()
    without = overlay(read_image(tmp_path / "duo.png"), 0 * poses[0])
    numbered = overlay(read_image(tmp_path / "duo.png"), 0 * poses[0], [(1, (60, 30)), (2, (190, 30))])
    changed = np.flatnonzero((without != numbered).any(axis=(0, 2)))
    assert changed.min() > 40 and changed.max() < 220 and not np.isin(np.arange(100, 170), changed).any()
    labels = number_labels([np.stack([body, body + np.float32([128, 0, 0])]) for body in poses], 128, 384)
    assert [[number for number, _ in frame] for frame in labels] == [[1, 2]] * len(poses)


def test_invalid_animate_input_is_one_line_user_error(
    puppets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "renamed.mp4").write_text("text")
    (tmp_path / "renamed.png").write_text("text")
    body = read_poses(puppets / "dance.json").people[0][0]
    faceless = body.copy()
    faceless[0] = 0
    Image.new("RGB", (64, 64)).save(tmp_path / "hero.png")
    for name, pose_ in (("one", body), ("faceless", faceless), ("nobody", 0 * body)):
        frame = {"people": [{"pose_keypoints_2d": pose_.ravel().tolist()}]}
        (tmp_path / f"{name}.json").write_text(json.dumps([frame]))
    good = {
        "image": puppets / "hero.png",
        "driving": puppets / "dance.mp4",
        "model": tmp_path / "model",
        "out": tmp_path / "out.mp4",
    }
    for change, reason in (
        ({"image": None, "out": None}, "missing --image, --out; see tcan animate --help"),
        ({"image": "missing.png"}, "no such image"),
        ({"image": "renamed.png"}, "cannot be read as an image"),
        ({"fps": 0}, "--fps 0: must be from 0.1 to 1000"),
        ({"fps": 1e-6}, "--fps 1e-06: must be from 0.1 to 1000"),
        ({"fps": float("inf")}, "fps: expected float, got inf"),
        ({"driving": None}, "no driving motion; pass a video with --driving or poses with --poses"),
        ({"driving": "missing.mp4"}, "no such video"),
        ({"driving": "renamed.mp4"}, "cannot be read as a video"),
        ({"model": "missing"}, "not a model folder"),
        ({"driving": "hero.png"}, "hero.png: an image, not a video; pass a driving video"),
        ({"out": "renamed.png/out.mp4"}, "renamed.png is not a writable folder"),
        ({"out": "out.avi"}, "unsupported suffix; use .mp4, .webm, .gif, or no suffix"),
        ({"out": "out.gif", "audio": True}, "this format has no audio"),
        (
            {"driving": None, "poses": "one.json", "audio": True},
            "--audio copies the audio of the driving video",
        ),
        ({"poses": "missing.json"}, "cannot read the poses"),
        ({"poses": "renamed.png"}, "not JSON"),
        ({"poses": "one.json"}, f"one.json: 1 frames, but {good['driving']} has 6"),
        ({"driving": None, "poses": "one.json"}, "one.json: no frame rate; pass --fps"),
        ({"driving": None, "poses": "nobody.json", "fps": 24}, "nobody.json: no person found"),
        (
            {"driving": None, "poses": "one.json", "fps": 24, "animate.retarget": "none"},
            "one.json: no height and width of the image",
        ),
        ({"character": "faceless.json"}, "faceless.json: no person found with visible neck and nose"),
        (
            {"character": "one.json", "animate.retarget": "none"},
            "--character has no effect without retargeting",
        ),
        ({"animate.smoothing_window": 4}, "animate.smoothing_window = 4: must be odd"),
        ({"animate.width": 100}, "animate.width = 100: must be above 0 and a multiple of 8"),
        ({"animate.overlap": 16}, "animate.overlap = 16"),
        ({"person": 1.5}, "--person 1.5: invalid person; use largest"),
        ({"driving_person": 0}, "--driving_person 0: invalid person"),
        ({"pairs": "pairs.csv"}, "remove --image, --driving, --out"),
    ):
        arguments = []
        for key, value in (good | change).items():
            if isinstance(value, str) and "." not in key:
                value = tmp_path / value
            if value is not None:
                arguments += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        assert reason in error_of(capsys, "animate", *arguments)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(UserError, match="foo: no such device"):
        choose_device(load_config("--animate.device=foo"))


def test_invalid_pose_input_is_one_line_user_error(
    puppets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "renamed.mp4").write_text("text")
    write_image(np.zeros((64, 64, 3), np.uint8), tmp_path / "nobody.png")
    for source, out, reason in (
        ("missing.mp4", "poses.json", "no such video"),
        ("renamed.mp4", "poses.json", "cannot be read as a video"),
        ("nobody.png", "poses.json", "nobody.png: no person found"),
        ("nobody.png", "poses.txt", "use a name that ends in .json"),
    ):
        assert reason in error_of(capsys, "pose", str(tmp_path / source), "--out", str(tmp_path / out))
    assert not list(tmp_path.glob("poses*"))


def test_side_by_side_concatenates_reference_pose_and_frame() -> None:
    reference, poses, generated = (np.full((n, 2, 3, 3), n, np.uint8) for n in (1, 5, 5))
    frames = list(side_by_side(reference[0], poses, iter(generated + 1)))
    assert len(frames) == 5
    np.testing.assert_array_equal(frames[4][0, :, 0], [1] * 3 + [5] * 3 + [6] * 3)
