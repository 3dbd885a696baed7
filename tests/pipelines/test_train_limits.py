"""Limits of the motion modules and of the dataset are checked for both stages before anything runs."""

import json
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, MotionAdapter

from pipelines.config.parser import load_config
from pipelines.inference import load_pipeline
from pipelines.train.job import train
from tcan.errors import UserError
from tcan.fingerprint import fingerprint
from tests.pipelines.test_cli import error_of
from tests.training import write_dataset


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (33, "train.clip_frames = 33: the motion modules of .* have 32 positions; set at most 32"),
        (30, "stage 2: no video of the split has 30 consecutive frames"),
    ],
)
def test_clip_frames_beyond_the_limits_are_refused_before_stage_1(
    pretrained_folder: Path, tmp_path: Path, frames: int, reason: str
) -> None:
    vae = fingerprint(AutoencoderKL.from_pretrained(pretrained_folder / "vae"))
    dataset = write_dataset(tmp_path / "dataset", {"video": [(0, 20)]}, 64, 64, vae)
    parts = [part.name for part in pretrained_folder.iterdir()]
    sources = [x for part in parts for x in (f"--pretrained.{part}", str(pretrained_folder))]
    config = load_config("--size", "64", "--train.clip_frames", str(frames), *sources)
    with pytest.raises(UserError, match=reason):
        train(dataset, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_limit_follows_the_motion_modules(
    pretrained_folder: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MotionAdapter.load_config(pretrained_folder / "motion_adapter")
    MotionAdapter.from_config({**config, "motion_max_seq_length": 24}).save_pretrained(tmp_path / "short")
    parts = ("unet", "controlnet", "text_encoder")
    message = error_of(
        capsys, "memory", "--stage", "1", "--size", "64", "--train.clip_frames", "25",
        f"--pretrained.motion_adapter={tmp_path / 'short'}", *(f"--pretrained.{part}={pretrained_folder}" for part in parts),
    )  # fmt: skip
    assert "have 24 positions; set at most 24" in message
    assert (
        json.loads((model_folder / "motion_adapter" / "config.json").read_text())["motion_max_seq_length"]
        == 32
    )
    for options, reason in (
        (("--animate.window", "33"), "animate.window = 33: the model's motion modules have 32 positions"),
        ((), None),
    ):
        arguments = load_config(*options)
        if reason is None:
            assert load_pipeline(model_folder, arguments).tcan.max_frames == 32
            continue
        with pytest.raises(UserError, match=reason):
            load_pipeline(model_folder, arguments)


@pytest.mark.parametrize(("offload", "hook"), [("model", "CpuOffload"), ("sequential", "SequentialHook")])
def test_offload_and_tiling_are_configured(model_folder: Path, offload: str, hook: str) -> None:
    pipe = load_pipeline(
        model_folder, load_config("--animate.offload", offload, "--animate.vae_tiling", "true")
    )
    assert type(pipe.tcan._hf_hook).__name__ == hook and pipe.vae.use_tiling
