"""End-to-end demo with the shipped weights, few videos and few steps."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from pipelines import demo as demo_module
from pipelines.animate import Animation, animate
from pipelines.config import Config
from pipelines.config.parser import load_config
from pipelines.demo import demo
from pipelines.evaluate import evaluate
from pipelines.puppets.scene import sample_background
from pipelines.puppets.world import Clip, sample_clip, write_clip
from tcan.errors import UserError
from tcan.video import read_video

pytestmark = pytest.mark.slow


def small_config(*more: str) -> Config:
    steps = ["--train.stage1.steps", "3", "--train.stage2.steps", "2", "--animate.steps", "2"]
    return load_config(*steps, "--evaluate.frames", "4", *more)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TRAIN_CLIPS": 6,
            "TRAIN_FRAMES": 24,
            "HELD_OUT_CLIPS": 3,
            "HELD_OUT_FRAMES": 20,
        }.items():
            patch.setattr(demo_module, name, value)
        demo(out, small_config())
        modified = {path: path.stat().st_mtime_ns for path in (out / "run" / "model").rglob("*")}
        demo(out, small_config())  # everything is finished, so the rerun must not rewrite the model
        assert modified == {path: path.stat().st_mtime_ns for path in (out / "run" / "model").rglob("*")}
    return out


def test_demo_writes_videos_evaluations_and_contact_sheet(out: Path):
    for character in ("dance", "bizarre"):
        frames, fps = read_video(out / "animated" / f"{character}.mp4")
        assert frames.shape == (20, 128, 3 * 128, 3) and fps == 24
        report = json.loads((out / "evaluation" / character / "evaluation.json").read_text())
        assert report["videos"] == 3 and report["frames"] == 12
        controls = {"pose_5_mean_pose", "pose_5_other", "colour_distance_other", "flicker_source"}
        assert controls < report["metrics"].keys()
    assert np.asarray(Image.open(out / "sheet.png")).std() > 10


def test_mlflow_runs_are_linked_by_tags(out: Path):
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    by_kind = {run.data.tags["tcan.kind"]: run for run in runs if "tcan.kind" in run.data.tags}
    assert [run.info.status for run in runs] == ["FINISHED"] * 5  # preprocess, two stages, two evaluations
    stage1, stage2 = by_kind["stage1"], by_kind["stage2"]
    assert stage1.data.tags["tcan.dataset_run"] == by_kind["preprocess"].info.run_id
    assert stage2.data.tags["tcan.stage1_run"] == stage1.info.run_id
    assert by_kind["evaluate"].data.tags["tcan.model_run"] == stage2.info.run_id
    losses = client.get_metric_history(stage1.info.run_id, "loss")
    assert sorted(metric.step for metric in losses) == [1, 2, 3] and all(
        0 < metric.value < 2 for metric in losses
    )


def test_inputs_without_person_raise_user_error(out: Path, tmp_path: Path):
    clip = sample_clip("dance", 3, 16)
    background, _ = sample_background("dance", np.random.default_rng(3), clip.frames.shape[1])
    write_clip(clip, tmp_path / "person")
    write_clip(Clip(np.stack([background] * 16), clip.keypoints, clip.mask), tmp_path / "empty")
    Image.fromarray(background).save(tmp_path / "empty.png")
    Image.fromarray(clip.frames[0]).save(tmp_path / "person.png")
    model, target = out / "run" / "model", tmp_path / "result.mp4"
    with pytest.raises(UserError, match=r"empty\.png: no person"):
        animate(Animation(tmp_path / "empty.png", target, tmp_path / "person.mp4"), model, small_config())
    with pytest.raises(UserError, match=r"empty\.mp4: no person"):
        animate(Animation(tmp_path / "person.png", target, tmp_path / "empty.mp4"), model, small_config())
    assert not target.exists()
    with pytest.raises(UserError, match="none of the 1 videos can be used"):
        evaluate(
            tmp_path / "empty.mp4",
            model,
            tmp_path / "evaluation",
            small_config("--tracking.folder", f"{tmp_path}/runs"),
        )
    assert not (tmp_path / "evaluation" / "evaluation.json").exists()
