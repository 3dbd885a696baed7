"""Complete trainings with Ray Train workers and DeepSpeed engines: results, faults, resuming, invalid input."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines import tracking
from pipelines.cli import main
from pipelines.config import Config
from pipelines.config.parser import load_config
from pipelines.staging import local_input, upload
from pipelines.storage import read_bytes
from tcan.errors import UserError
from tcan.model import TCAN, diffusion_loss
from tcan.weights import load_pretrained, read_model_info
from tests import compare_losses
from tests.pipelines.test_cli import error_of
from tests.runs import Stage1, workers_of
from tests.training import SIZE, STEPS, arguments, changed_clips, losses, make_config, weights, write_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, pretrained, clips, ray_cluster) -> tuple[Config, Path]:
    """Both stages trained with two workers, without faults."""
    from pipelines.train.job import train

    folder = tmp_path_factory.mktemp("uninterrupted")
    config = make_config(pretrained, folder, "--train.profile_steps=2")
    assert train(clips, folder / "out", config) == f"{folder}/out/model"
    return config, folder / "out"


def signal_workers(storage: Path, signals: list[signal.Signals], finished: threading.Event) -> None:
    """Send the next signal to a worker after each new checkpoint, until all are sent or training is finished."""
    seen = ""
    while signals and not finished.wait(0.05):
        snapshot = storage / "checkpoint_manager_snapshot.json"
        if snapshot.exists() and (now := snapshot.read_text()) != seen:
            seen = now
            if workers := workers_of(psutil.Process()):
                workers[-1].send_signal(signals.pop(0))


@pytest.mark.slow
def test_each_stage_trains_only_its_own_parts(uninterrupted):
    config, out = uninterrupted
    for stage in (1, 2):
        curve = losses(config, out, stage)
        assert sorted(curve) == list(range(1, STEPS[stage] + 1))
        assert all(len(values) == 1 and np.isfinite([*values]).all() for values in curve.values())
        bands = ["", "_t000-249", "_t250-499", "_t500-749", "_t750-999"]
        validation_losses = [
            losses(config, out, stage, f"validation_loss{band}")[STEPS[stage]][0] for band in bands
        ]
        assert validation_losses[0] == pytest.approx(np.mean(validation_losses[1:]), rel=1e-5)
    first, final = weights(out / "stage1" / "model"), weights(out / "model")
    of_stage1 = {"appa", "appearance_unet"}
    assert {name.split("/")[0] for name in first} == of_stage1
    assert {name.split("/")[0] for name in final} == of_stage1 | {"motion_adapter", "temporal_controlnet"}
    assert all(final[name] == first[name] for name in first)  # stage 2 does not change the stage 1 weights
    assert json.loads((out / "model" / "tcan.json").read_text())["stage"] == 2
    assert len([*(out / "stage1").glob("step_*")]) == config.train.num_checkpoints


@pytest.mark.slow
def test_losses_match_golden_files(uninterrupted):
    """After an intended change, regenerate tests/golden from the run `uninterrupted`: one `{step: loss}` file per stage."""
    config, out = uninterrupted
    for stage in (1, 2):
        golden = compare_losses.losses(ROOT / "tests" / "golden" / f"stage{stage}.json", store="")
        found = {step: values[0] for step, values in losses(config, out, stage).items()}
        assert found.keys() == golden.keys()
        difference, step = compare_losses.largest_difference(found, golden)
        assert difference < 1e-3, (stage, step)  # rounding differences between CPUs are much smaller


@pytest.mark.slow
def test_recorded_flops_match_flop_counter(uninterrupted, pretrained):
    config, out = uninterrupted
    parts = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")
    known = load_pretrained(**dict.fromkeys(parts, str(pretrained)))
    model = TCAN(known.unet, known.controlnet, known.motion_adapter, known.empty_prompt)
    for stage, frames in ((1, 1), (2, config.train.clip_frames)):
        model.set_stage(stage)
        latents, pose = torch.randn(1, frames, 4, 8, 8), torch.zeros(1, frames, 3, SIZE, SIZE)
        with FlopCounterMode(display=False) as counter:
            diffusion_loss(
                model, known.scheduler, latents, latents, torch.tensor([5]), pose, latents[:, 0]
            ).backward()
        tflops, seconds = (losses(config, out, stage, key) for key in ("tflops_per_second", "step_seconds"))
        flops_per_step = [1e12 * tflops[step][0] * seconds[step][0] for step in range(1, STEPS[stage] + 1)]
        assert flops_per_step == pytest.approx(flops_per_step[:1] * STEPS[stage], rel=1e-9)
        # Stage-1 samples with a dropped reference need slightly fewer FLOPs.
        assert flops_per_step[0] == pytest.approx(4 * counter.get_total_flops(), rel=0.02)
        assert not losses(config, out, stage, "mfu")  # the peak FLOP/s of a CPU is unknown


@pytest.mark.slow
def test_profiler_trace_contains_the_requested_steps(uninterrupted, tmp_path):
    from mlflow import MlflowClient

    config, out = uninterrupted
    client = MlflowClient(tracking.resolve_uri(config.tracking))
    for stage in (1, 2):
        run_id = json.loads((out / f"stage{stage}" / "run.json").read_text())["mlflow_run_id"]
        (trace,) = client.list_artifacts(run_id, "profile")
        assert trace.path == "profile/from_step_000003.json.gz"
        with gzip.open(client.download_artifacts(run_id, trace.path, str(tmp_path))) as file:
            names = Counter(event["name"] for event in json.load(file)["traceEvents"])
        assert [name for name in names if name.startswith("ProfilerStep")] == [
            "ProfilerStep#2",
            "ProfilerStep#3",
        ]
        assert names["aten::convolution_backward"] > 0


@pytest.mark.slow
def test_finished_models_are_registered(uninterrupted):
    config, out = uninterrupted
    found = {}
    for stage, name in ((1, "tcan-stage1"), (2, "tcan")):
        run_id = json.loads((out / f"stage{stage}" / "run.json").read_text())["mlflow_run_id"]
        for reference in (f"models:/{name}@latest", f"models:/{name}@out", f"models:/{name}/1", run_id):
            found[reference] = weights(tracking.local_model(reference, config.tracking))
            assert found[reference] == weights(out / "stage1" / "model" if stage == 1 else out / "model")
    with pytest.raises(UserError, match="models:/tcan@other: not found in"):
        tracking.local_model("models:/tcan@other", config.tracking)


@pytest.mark.slow
def test_nan_loss_stops_with_video_names_or_skips_the_step(tmp_path, pretrained, clips, ray_cluster):
    from pipelines.train.job import train

    bad = shutil.copytree(clips, tmp_path / "bad")
    for row in changed_clips(bad):
        if row["video_id"] == "c":
            row["latent_mean"] = np.full((16, 4, 8, 8), np.nan, "<f2").tobytes()
    keys = ("--train.workers=1", "--train.stage1.batch_size=2", "--train.stage1.checkpoint_every=1")
    with pytest.raises(UserError, match=r"the loss is nan; videos .*c.*; .*train.on_bad_loss") as error:
        train(bad, tmp_path / "out", make_config(pretrained, tmp_path, *keys), stage="1")
    step = int(re.search(r"step (\d+)", str(error.value))[1])
    assert ("no checkpoint yet" if step == 1 else f"checkpoint is of step {step - 1}") in str(error.value)
    # Each video is sampled once in three steps of two samples, so 2 of 6 steps are skipped.
    keys += ("--train.on_bad_loss=skip", "--train.stage1.validate_every=0", "--train.stage1.steps=6")
    config = make_config(pretrained, tmp_path, *keys)
    train(bad, tmp_path / "out", config, stage="1")
    curve = losses(config, tmp_path / "out", 1)
    assert sorted(curve) == list(range(1, 7)) and sum(np.isnan(v).any() for v in curve.values()) == 2
    assert all(np.isfinite(np.frombuffer(w, np.float32)).all() for w in weights(tmp_path / "out").values())


@pytest.mark.slow
def test_rerun_of_finished_training_changes_no_file(uninterrupted, clips, capsys):
    from pipelines.train.job import train

    config, out = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    train(clips, out, config)
    assert capsys.readouterr().out.count("skipped") == 2
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    config.seed = 1
    with pytest.raises(UserError, match="started with seed = 0, not 1"):
        train(clips, out, config)


@pytest.mark.slow
def test_killed_and_hung_workers_leave_results_unchanged(
    uninterrupted, tmp_path, pretrained, clips, ray_cluster, capfd
):
    from pipelines.train.job import train

    # Sample images at every step slow training down, so that Ray Train registers a checkpoint before the run ends.
    slow_keys = "--train.hang_timeout=30", "--train.stage1.sample_every=1"
    config, finished = make_config(pretrained, tmp_path, *slow_keys), threading.Event()
    signals = [signal.SIGKILL, signal.SIGSTOP]
    watcher = threading.Thread(target=signal_workers, args=(tmp_path / "out" / "stage1", signals, finished))
    watcher.start()
    try:
        train(clips, tmp_path / "out", config, stage="1")
    finally:
        finished.set()
        watcher.join()
    assert not signals
    assert "hung after step" in capfd.readouterr().out
    # Identical, and each step recorded once.
    assert losses(config, tmp_path / "out", 1) == losses(*uninterrupted, 1)
    assert weights(tmp_path / "out" / "stage1" / "model") == weights(uninterrupted[1] / "stage1" / "model")


def checkpoints(storage: str) -> list[int]:
    """Steps of the complete checkpoints that Ray Train has registered."""
    try:
        snapshot = json.loads(read_bytes(f"{storage}/stage1/checkpoint_manager_snapshot.json"))
    except FileNotFoundError:
        return []
    return [int(known["checkpoint_dir_name"].split("_")[1]) for known in snapshot["checkpoint_results"]]


def test_dataset_and_results_are_in_a_bucket(tmp_path, pretrained, clips, bucket, ray_cluster) -> None:
    upload(clips, f"{bucket}/short")
    keys = "--train.workers=1", "--train.stage1.steps=2", "--train.stage1.batch_size=2", "--train.log_every=1"
    keys += "--train.stage1.validate_every=0", "--stage=1"
    command = "train", f"{bucket}/short", "--out", f"{bucket}/short-run"
    assert main([*command, *arguments(pretrained, tmp_path, *keys)]) == 0
    config, out = make_config(pretrained, tmp_path), local_input(f"{bucket}/short-run")
    curve = losses(config, out, 1)
    assert list(curve) == [1, 2] and all(len(values) == 1 for values in curve.values())
    assert read_model_info(out / "stage1" / "model")["stage"] == 1
    assert len([*(out / "stage1").glob("step_*/state.json")]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rerun_after_sigterm_and_sigkill_resumes(
    uninterrupted, tmp_path, pretrained, clips, bucket, gcs_bucket
):
    """The dataset is on Google Cloud Storage, checkpoints and model are on S3."""
    from mlflow import MlflowClient

    upload(clips, f"{gcs_bucket}/clips")
    training = Stage1(f"{gcs_bucket}/clips", tmp_path, arguments(pretrained, tmp_path), f"{bucket}/run")

    def wait_for(driver: psutil.Popen, condition: Callable[[], Any]) -> None:
        while not condition():
            assert driver.poll() is None, training.output()
            time.sleep(0.05)

    # Sample images at every step slow training down, so that the signal arrives before its end.
    keys = "--train.stage1.checkpoint_every=1000", "--train.stage1.sample_every=1", "--train.log_every=1"
    driver = training.start(2, *keys)
    wait_for(driver, lambda: "samples/s" in training.output())
    driver.send_signal(signal.SIGTERM)
    assert driver.wait() == 143, training.output()
    assert training.output().count("stopped; rerun the command to resume") == 1
    last_checkpoint = max(checkpoints(f"{bucket}/run"))
    assert 0 < last_checkpoint < STEPS[1]  # written on the signal: no periodic checkpoint was due
    driver = training.start(2)
    wait_for(driver, lambda: max(checkpoints(f"{bucket}/run")) > last_checkpoint)
    driver.kill()
    driver.wait()
    training.finish(training.start(2))

    config, out = load_config(*arguments(pretrained, tmp_path)), local_input(f"{bucket}/run")
    assert losses(config, out, 1) == losses(*uninterrupted, 1)
    assert weights(out / "stage1" / "model") == weights(uninterrupted[1] / "stage1" / "model")
    assert len([*(out / "stage1").glob("step_*/state.json")]) == config.train.num_checkpoints
    client = MlflowClient(tracking.resolve_uri(config.tracking))
    assert client.get_model_version_by_alias("tcan-stage1", "run").run_id
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == 1


def test_first_signal_is_collected_and_the_second_ends_the_job() -> None:
    from pipelines.train.job import _signals

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_sigterm_while_workers_start_ends_the_job_and_a_second_job_is_refused(tmp_path, pretrained, clips):
    training = Stage1(clips, tmp_path, arguments(pretrained, tmp_path))
    driver = training.start(2)
    while not (tmp_path / "out" / "stage1" / "run.json").exists():  # written before the workers start
        assert driver.poll() is None, training.output()
        time.sleep(0.05)
    second = subprocess.run(training.command(2), capture_output=True, text=True)
    assert second.returncode == 2
    assert f"{tmp_path}/out: another train job is writing here (process {driver.pid} on" in second.stderr
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(180) == 143, training.output()


@pytest.mark.slow
def test_full_disk_preserves_the_last_complete_checkpoint(
    uninterrupted, tmp_path, pretrained, clips, small_disk
):
    """The disk has space for 1.5 checkpoints."""
    checkpoint = next((uninterrupted[1] / "stage1").glob("step_*"))
    size = 3 * sum(file.stat().st_size for file in checkpoint.glob("trained-*")) // 2
    subprocess.run(["mount", "-o", f"remount,size={size}", small_disk], check=True)
    keys = arguments(pretrained, tmp_path, f"--train.storage={small_disk}")
    training = Stage1(clips, tmp_path, keys)

    assert training.start(2, "--train.max_failures=0").wait() == 2, training.output()
    assert training.output().splitlines()[-1].startswith("tcan: error: the disk is full"), training.output()
    assert checkpoints(str(small_disk)) == [3]
    assert [folder.name.split("_")[1] for folder in (small_disk / "stage1").glob("step_*")] == ["000003"]

    subprocess.run(["mount", "-o", "remount,size=1g", small_disk], check=True)
    training.finish(training.start(2))
    assert losses(load_config(*keys), tmp_path / "out", 1) == losses(*uninterrupted, 1)
    assert weights(tmp_path / "out" / "stage1" / "model") == weights(uninterrupted[1] / "stage1" / "model")


@pytest.mark.slow
def test_fewer_workers_produce_the_same_losses(uninterrupted, tmp_path, pretrained, clips, ray_cluster):
    """Allows one or two workers of two CPUs each on two CPUs in total, so one starts.

    Checkpoints are in a separate storage, and a process creates the batches.
    """
    from pipelines.train.job import train

    keys = (
        "--train.min_workers=1",
        "--train.cpus_per_worker=2",
        "--train.data_processes=1",
        f"--train.storage=file://{tmp_path}/storage",
    )
    config = make_config(pretrained, tmp_path, *keys)
    train(clips, tmp_path / "out", config)
    checkpoints = [*(tmp_path / "storage" / "stage1").glob("step_*")]
    assert len(checkpoints) == config.train.num_checkpoints
    for folder in checkpoints:
        assert [file.name for file in folder.glob("trained-*")] == ["trained-00000-of-00001.safetensors"]
    for stage in (1, 2):
        for key in ("loss", "validation_loss"):
            one_worker, two_workers = (
                losses(config, tmp_path / "out", stage, key),
                losses(*uninterrupted, stage, key),
            )
            assert one_worker.keys() == two_workers.keys()
            assert [*map(max, one_worker.values())] == pytest.approx(
                [*map(max, two_workers.values())], rel=1e-4
            )


@pytest.mark.slow
def test_invalid_input_raises_user_error_before_training(tmp_path, pretrained, clips, capsys):
    from pipelines.train.job import train

    config = make_config(pretrained, tmp_path)
    other = write_dataset(tmp_path / "other", {"a": [(0, 16)]}, SIZE, SIZE, vae="0123456789abcdef")
    with pytest.raises(UserError, match="another VAE"):
        train(other, tmp_path / "out", config)
    with pytest.raises(UserError, match="no dataset"):
        train(tmp_path / "nothing", tmp_path / "out", config)
    with pytest.raises(UserError, match="smaller than the training size"):
        train(clips, tmp_path / "out", make_config(pretrained, tmp_path, "--size=128"))
    with pytest.raises(UserError, match="train stage 1 first"):
        train(clips, tmp_path / "out", config, stage="2")
    for text, message in ((None, "cannot be read"), ("{", "cannot be read"), ("[1]", "not a JSON object")):
        file = tmp_path / "deepspeed.json"
        if text:
            file.write_text(text)
        keys = arguments(pretrained, tmp_path, f"--train.deepspeed={file}")
        line = error_of(capsys, "train", str(clips), "--out", str(tmp_path / "out"), *keys)
        assert line.startswith(f"train.deepspeed = {file}: {message}")
    for name in ("missing", "foreign"):
        broken = shutil.copytree(clips, tmp_path / name)
        files = sorted((broken / "clips").glob("*.parquet"))
        names = [f"clips/{file.name}" for file in files]
        if name == "missing":
            for file in files:
                file.unlink()
            message = f"{broken}: {', '.join(names)} are missing; restore the files, or rerun"
        else:
            shutil.copy(files[0], broken / "clips" / "copied.parquet")
            message = f"{broken}: clips/copied.parquet is not listed in dataset.json; remove the files"
        with pytest.raises(UserError, match=re.escape(message)):
            train(broken, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "stage1").mkdir(parents=True)
    for text in (
        "",
        '{"settings": ',
        "[]",
        "{}",
        '{"settings": [], "finished_steps": 1, "mlflow_run_id": "a"}',
    ):
        (tmp_path / "out" / "stage1" / "run.json").write_text(text)
        with pytest.raises(
            UserError, match=r"out/stage1/run.json: cannot be read, or is not a file of tcan train; "
        ):
            train(clips, tmp_path / "out", config)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written: file exists; choose another OUT"):
        train(clips, tmp_path / "file", config)
