"""`tcan animate` and `tcan pose`: what they write, what they hold in memory, and what they refuse, each in one line."""

import json
import shutil
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pipelines import tracking
from pipelines.animate import Animation, animate, beside, find_device, load_pipeline, read_inputs, to_uint8
from pipelines.config import Config, load_config
from pipelines.pose import pose
from pipelines.puppets.world import sample_clip, write_clip
from tcan.errors import UserError
from tcan.pipeline import TCANPipeline
from tcan.pose import draw_poses, read_poses
from tcan.video import VideoFrames, read_image, read_video, write_image, write_video
from tests.pipelines.test_cli import error_of

STEP = ("--animate.steps", "1", "--animate.guidance_scale", "1")


def config(*more: str) -> Config:
    return load_config(*STEP, *more)


def images(folder: Path) -> np.ndarray:
    """The frames of a folder of PNG, `[F, H, W, 3]`."""
    return np.stack([read_image(file) for file in sorted(folder.iterdir())])


@pytest.fixture(scope="module")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hero.png, and dance.mp4 (6 frames) with its true keypoints in dance.json."""
    folder = tmp_path_factory.mktemp("puppets")
    write_image(sample_clip("dance", 1, 1).frames[0], folder / "hero.png")
    write_clip(sample_clip("dance", 2, 6, every=2), folder / "dance")
    return folder


class Alive:
    """How many of the arrays that went by are still held somewhere, at most."""

    def __init__(self) -> None:
        self.now = self.most = self.all = 0

    def watch(self, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for array in arrays:
            self.now, self.all = self.now + 1, self.all + 1
            self.most = max(self.most, self.now)
            weakref.finalize(array, self._gone)
            yield array

    def _gone(self) -> None:
        self.now -= 1


def test_a_long_video_passes_through_in_pieces(
    model_folder: Path, puppets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its frames nor those of the result are ever all there, and yet the result is, bit for bit, that of all
    frames at once."""
    dance, _ = read_video(puppets / "dance.mp4")
    write_video((dance[i % 10 if i % 10 < 6 else 10 - i % 10] for i in range(50)), tmp_path / "long.mp4", 30)
    decoded, made = Alive(), Alive()
    as_read, as_made = VideoFrames.__iter__, TCANPipeline.decode
    with monkeypatch.context() as patch:
        patch.setattr(VideoFrames, "__iter__", lambda self: decoded.watch(as_read(self)))
        patch.setattr(TCANPipeline, "decode", lambda *arguments: made.watch(as_made(*arguments)))
        animate(
            Animation(puppets / "hero.png", tmp_path / "result", tmp_path / "long.mp4"),
            model_folder,
            config(),
        )
    assert decoded.all >= 50 and decoded.most <= 2 * 16  # a batch of the detector, and the next being read
    assert made.all == 7 and made.most <= 2  # batches of 8

    frames, fps = read_video(tmp_path / "long.mp4")
    pipe = load_pipeline(model_folder, config())
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 1, "guidance_scale": 1, "generator": generator}
    options["start_from_reference"] = True  # mini.yaml's
    whole = pipe(read_image(puppets / "hero.png"), frames, **options).frames
    np.testing.assert_array_equal(images(tmp_path / "result"), to_uint8(whole))
    assert fps == 30 and whole.shape == (50, 64, 64, 3)


def test_the_file_of_tcan_pose_drives_as_the_video_does(
    model_folder: Path, puppets: Path, tmp_path: Path
) -> None:
    pose(puppets / "dance.mp4", tmp_path / "dance.json", config())
    pose(puppets / "hero.png", tmp_path / "hero.json", config())
    found, truth = read_poses(tmp_path / "dance.json"), read_poses(puppets / "dance.json")
    assert (found.height, found.width, found.fps) == (128, 128, 24)
    torso = [1, 2, 5, 8, 11]  # the detector is right where it is easy
    distances = np.stack(found.people)[:, 0, torso, :2] - np.stack(truth.people)[:, 0, torso, :2]
    assert np.median(np.linalg.norm(distances, axis=-1)) < 4
    assert read_video(tmp_path / "dance.preview.mp4")[0].shape == (6, 128, 128, 3)
    assert read_image(tmp_path / "hero.preview.png").shape == (128, 128, 3)

    hero, by_hand = (
        puppets / "hero.png",
        {"poses": tmp_path / "dance.json", "character": tmp_path / "hero.json"},
    )
    animate(Animation(hero, tmp_path / "a", puppets / "dance.mp4"), model_folder, config())
    animate(Animation(hero, tmp_path / "b", **by_hand), model_folder, config())
    np.testing.assert_array_equal(images(tmp_path / "a"), images(tmp_path / "b"))

    corrected = json.loads((tmp_path / "dance.json").read_text())
    corrected["frames"][0]["people"][0]["pose_keypoints_2d"][3 * 4 + 1] -= 30  # the right wrist, up
    (tmp_path / "dance.json").write_text(json.dumps(corrected))
    animate(Animation(hero, tmp_path / "c", **by_hand), model_folder, config())
    assert (images(tmp_path / "c") != images(tmp_path / "a")).any()


def test_a_registered_model_animates_through_pyfunc(
    model_folder: Path, puppets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc

    model = shutil.copytree(model_folder, tmp_path / "model")
    info = json.loads((model / "tcan.json").read_text())
    info["pretrained"]["pose"] = {"source": "mini"}  # as training writes it
    (model / "tcan.json").write_text(json.dumps(info))
    settings = config(f"--tracking.folder={tmp_path / 'runs'}")
    with tracking.run("stage2", "stage 2", settings.tracking, {}) as run:
        run.model(
            model,
            "tcan",
            "ours",
            {"num_inference_steps": 2, "guidance_scale": 2.0, "start_from_reference": True},
        )

    # Not by set_tracking_uri, which all later tests would inherit through the environment.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.resolve_uri(settings.tracking))
    served = mlflow.pyfunc.load_model("models:/tcan@ours")
    row = {"image": str(puppets / "hero.png"), "driving": str(puppets / "dance.mp4")}
    first, second = served.predict(pd.DataFrame([row, row]), params={"seed": 3})
    again = served.predict([row], params={"guidance_scale": 1.0, "seed": 3})[0]
    frames = TCANPipeline.from_pretrained(model)(
        read_image(row["image"]),
        read_video(row["driving"])[0],
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=2,
        guidance_scale=2,
        start_from_reference=True,
    ).frames
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, np.asarray(frames) * 255, atol=0.5001)
    assert first.dtype == np.uint8 and first.shape == (6, 64, 64, 3)
    assert not np.array_equal(first, again)


def test_poses_by_hand_without_retargeting_in_a_rectangle(
    model_folder: Path, puppets: Path, tmp_path: Path
) -> None:
    """Drawn where they are, at the result's size, between the image and the result."""
    hero, poses = puppets / "hero.png", puppets / "dance.json"
    animation = Animation(hero, tmp_path / "wide", poses=poses, fps=12, side_by_side=True)
    wide = config("--animate.retarget", "false", "--animate.width", "128")
    assert read_inputs(animation, wide).fps == 12
    animate(animation, model_folder, wide)
    shown = images(tmp_path / "wide")
    assert shown.shape == (6, 64, 3 * 128, 3)
    placed = np.concatenate(read_poses(poses).people)
    placed[..., 1] -= 32  # the middle half of 128 x 128 is 128 x 64
    np.testing.assert_array_equal(shown[:, :, 128:256], draw_poses(placed, 64, 128, 2))


def test_bad_input(puppets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        ({"image": None, "out": None}, "missing: --image, --out; tcan animate --help explains"),
        ({"image": "missing.png"}, "no such image"),
        ({"image": "renamed.png"}, "cannot be read as a image"),
        ({"fps": 0}, "--fps 0: must be more than 0"),
        ({"driving": None}, "needs a motion; give a video with --driving or poses with --poses"),
        ({"driving": "missing.mp4"}, "no such video"),
        ({"driving": "renamed.mp4"}, "cannot be read as a video"),
        ({"model": "missing"}, "no model folder"),
        ({"driving": "hero.png"}, "hero.png: is a image; give a video"),
        ({"out": "renamed.png/out.mp4"}, "renamed.png is no folder that can be written to"),
        ({"out": "out.avi"}, "name it .mp4, .webm, .gif, or without a suffix"),
        ({"out": "out.gif", "audio": True}, "cannot hold sound"),
        ({"driving": None, "poses": "one.json", "audio": True}, "--audio copies the sound"),
        ({"poses": "missing.json"}, "cannot read these poses"),
        ({"poses": "renamed.png"}, "not JSON"),
        ({"poses": "one.json"}, f"one.json: 1 frames, but {good['driving']} has 6"),
        ({"driving": None, "poses": "one.json"}, "one.json: holds no frame rate; give it with --fps"),
        ({"driving": None, "poses": "nobody.json", "fps": 24}, "nobody.json: no person found"),
        (
            {"driving": None, "poses": "one.json", "fps": 24, "animate.retarget": "false"},
            "doesn't say of which height and width",
        ),
        ({"character": "faceless.json"}, "faceless.json: no person found with neck and nose"),
        ({"character": "one.json", "animate.retarget": "false"}, "--character is for fitting"),
        ({"animate.smooth": 4}, "animate.smooth = 4: must be odd"),
        ({"animate.width": 100}, "animate.width = 100: must be above 0 and a multiple of 64"),
        ({"animate.overlap": 16}, "animate: overlap = 16"),
        ({"pairs": "pairs.csv"}, "leave out --image, --driving, --out"),
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
        find_device(load_config("--animate.device=foo"))


def test_bad_input_of_pose(puppets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "renamed.mp4").write_text("text")
    write_image(np.zeros((64, 64, 3), np.uint8), tmp_path / "nobody.png")
    for source, out, reason in (
        ("missing.mp4", "poses.json", "no such video"),
        ("renamed.mp4", "poses.json", "cannot be read as a video"),
        ("nobody.png", "poses.json", "nobody.png: no person found"),
        ("nobody.png", "poses.txt", "name it .json"),
    ):
        assert reason in error_of(capsys, "pose", str(tmp_path / source), "--out", str(tmp_path / out))
    assert not list(tmp_path.glob("poses*"))


def test_side_by_side() -> None:
    reference, poses, result = (np.full((n, 2, 3, 3), n, np.uint8) for n in (1, 5, 5))
    frames = list(beside(reference[0], poses, iter(result + 1)))
    assert len(frames) == 5
    np.testing.assert_array_equal(frames[4][0, :, 0], [1] * 3 + [5] * 3 + [6] * 3)
