"""Training: deterministic sampling, loss guards and settings, and runs with Ray Train workers and DeepSpeed engines."""

import gzip
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from pipelines import tracking
from pipelines.config import Config
from pipelines.config.parser import load_config
from pipelines.dataset import CLIP_SCHEMA, SCHEMA_VERSION, clip_files
from pipelines.dataset_index import INDEX_FILE, WRITER_OPTIONS, write_index
from pipelines.preprocess.shards import ShardWriter, write_info
from pipelines.staging import local_input, upload
from pipelines.storage import read_bytes
from pipelines.train.checkpoint import FrozenFingerprint, remove_incomplete
from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler
from pipelines.train.engine import AdamW, deepspeed_settings, read_settings
from pipelines.train.heartbeat import RunMonitor
from pipelines.train.loss_guard import LossGuard, out_of_memory
from pipelines.train.progress import progress
from pipelines.train.throughput import FlopsMeter
from tcan.errors import UserError
from tcan.fingerprint import fingerprint
from tcan.memory_efficient import make_memory_efficient
from tcan.model import TCAN, diffusion_loss
from tcan.pose import PoseErrors, draw_poses
from tcan.weights import load_pretrained
from tests import compare_losses
from tests.pipelines.test_cli import error_of
from tests.runs import Stage1, workers_of

SIZE = 64
ROOT = Path(__file__).parents[2]


# --- dataset whose latents encode their origin -----------------------------------------------------------------------


def write_dataset(
    folder: Path,
    videos: dict[str, list[tuple[int, int]]],
    height: int,
    width: int,
    vae: str = "",
    buckets: dict[str, tuple[int, int]] | None = None,
) -> Path:
    """Write a dataset whose latents encode frame, video and spatial position.

    Channels: 0 frame index, 1 video index, 2 row, 3 column. The variance is negligible. The reference latent has frame
    index -1.

    Args:
        videos: for each name, its clips as (first frame, number of frames).
        buckets: height and width of each video, instead of `height` and `width`.
    """
    clips = []
    for number, (name, spans) in enumerate(videos.items()):
        height, width = buckets[name] if buckets else (height, width)
        rows, columns = np.mgrid[: height // 8, : width // 8]
        for start, length in spans:
            shape = (length, *rows.shape)
            frames = np.broadcast_to(np.arange(start, start + length)[:, None, None], shape)
            origin = [np.broadcast_to(part, shape) for part in (number, rows, columns)]
            mean = np.stack([frames, *origin], axis=1).astype("<f2")
            reference = mean[0].copy()
            reference[0] = -1
            keypoints = np.zeros((length, 18, 3), "<f4")
            keypoints[:, 1] = (width / 2, height / 2, 1)  # neck
            keypoints[:, 2] = (width / 2 - 15, height / 2 + 5, 1)  # right shoulder
            clips.append(
                {
                    "clip_id": f"{name}-{start:06d}", "video_id": name, "source": name, "split": "train", "start": start,
                    "num_frames": length, "fps": 8.0, "height": height, "width": width, "crop": [0, 0, width, height],
                    "latent_mean": mean.tobytes(), "latent_logvar": np.full_like(mean, -30).tobytes(),
                    "keypoints": keypoints.tobytes(), "reference_latent_mean": reference.tobytes(),
                    "reference_keypoints": keypoints[0].tobytes(),
                }
            )  # fmt: skip
    (folder / "clips").mkdir(parents=True)
    writer = ShardWriter(str(folder), {}, 1 << 30, 1e9)
    middle = len(clips) // 2
    for part in filter(None, (clips[middle:], clips[:middle])):
        writer.add_video(dict.fromkeys(CLIP_SCHEMA.names) | clip for clip in part)
        writer.commit()
    files = {file.removeprefix(f"{folder}/"): 0 for file in clip_files(folder)}
    info = {
        "schema_version": SCHEMA_VERSION, "counts": {}, "files": files, "height": height, "width": width, "clip_frames": 16, "fps": 8,
        "vae_fingerprint": vae, "vae_scaling_factor": 0.5, "pose_fingerprint": "", "settings": {}, "mlflow_run_id": None,
    }  # fmt: skip
    if buckets:
        info |= {"height": None, "width": None, "buckets": sorted(set(buckets.values()))}
    write_info(str(folder), info)
    return folder


def changed_clips(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every row of a dataset, and write the changed rows back to the files."""
    tables = {path: pq.read_table(path).to_pylist() for path in (folder / "clips").glob("*.parquet")}
    for path, rows in sorted(tables.items(), key=lambda item: item[1][0]["clip_id"]):
        yield from rows
        pq.write_table(pa.Table.from_pylist(rows, CLIP_SCHEMA), path, **WRITER_OPTIONS)
    (folder / INDEX_FILE).unlink()
    write_index(str(folder))


def make_sampler(
    dataset: Path, stage: int, seed: int = 0, batch_size: int = 4, size: int | None = SIZE
) -> Sampler:
    return Sampler(
        ClipStore(dataset), stage, seed=seed, batch_size=batch_size, size=size, vae_scaling_factor=0.5, stick_width=2,
        frames=16, drop_reference=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    videos = {
        "long": [(0, 24), (24, 24), (48, 24), (72, 28)],
        "short": [(0, 24), (24, 16)],
        "gap": [(0, 24), (40, 17)],
    }
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset", videos, SIZE, SIZE)


def encoded_value(latents, channel: int) -> int:
    """Value that `write_dataset` encoded in a channel; the latents are scaled by 0.5."""
    return round(float(latents[channel].mean()) * 2)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 4), (2, 2), (2, 1), (4, 1), (1, 1)])
def test_worker_batches_form_the_same_global_batch(dataset, stage, workers, micro_batch):
    step = 5
    expected = [make_sampler(dataset, stage).sample(step, index) for index in range(4)]
    worker_batches = [
        make_sampler(dataset, stage).worker_batches(step, rank, workers, micro_batch)
        for rank in range(workers)
    ]
    # Order of the global batch: accumulation steps, then workers, then samples of the micro batch.
    batches = [
        worker_batches[rank][turn] for turn in range(len(worker_batches[0])) for rank in range(workers)
    ]
    for key in expected[0]:
        global_batch = torch.cat([getattr(batch, key) for batch in batches]).numpy()
        np.testing.assert_array_equal(global_batch, np.stack([sample[key] for sample in expected]))


def test_sample_depends_only_on_seed_step_and_index(dataset):
    used = make_sampler(dataset, 2)
    for step in range(6):
        used.batch(step, range(4))
    again, fresh, other = (
        used.sample(6, 1),
        make_sampler(dataset, 2).sample(6, 1),
        make_sampler(dataset, 2, seed=1).sample(6, 1),
    )
    for key in again:
        np.testing.assert_array_equal(again[key], fresh[key])
    assert not np.array_equal(again["noise"], other["noise"])
    assert not np.array_equal(again["noise"], used.sample(6, 2)["noise"])
    assert not np.array_equal(again["noise"], used.sample(7, 1)["noise"])


def test_stage1_reference_and_target_have_minimum_distance(dataset):
    source = make_sampler(dataset, 1, batch_size=1)
    frames = {
        0: [*range(100)],
        1: [*range(40)],
        2: [*range(24), *range(40, 57)],
    }  # by video, in dataset order
    distances: dict[int, Counter] = {0: Counter(), 1: Counter(), 2: Counter()}
    reference_masks = []
    for step in range(900):
        sample = source.sample(step, 0)
        video = encoded_value(sample["reference"], 1)
        assert encoded_value(sample["latents"][0], 1) == video
        reference, target = (
            frames[video].index(encoded_value(s, 0)) for s in (sample["reference"], sample["latents"][0])
        )
        distances[video][(target - reference) % len(frames[video])] += 1
        reference_masks.append(bool(sample["reference_mask"]))
        assert 0 <= sample["timestep"] < 1000
    assert set(distances[0]) == set(range(30, 70))  # U[30, L - 31], L = 100
    assert 0 not in distances[1] and len(distances[1]) > 35  # any other frame
    assert 0 not in distances[2] and len(distances[2]) > 35
    assert 0.06 < 1 - np.mean(reference_masks) < 0.14


def test_stage2_samples_consecutive_frames_with_first_frame_reference(dataset):
    source = make_sampler(dataset, 2, batch_size=1)
    starts: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for step in range(600):
        sample = source.sample(step, 0)
        numbers = [encoded_value(frame, 0) for frame in sample["latents"]]
        assert numbers == list(range(numbers[0], numbers[0] + 16))
        assert encoded_value(sample["reference"], 0) == -1
        assert encoded_value(sample["reference"], 1) == encoded_value(sample["latents"][0], 1)
        assert sample["reference_mask"]
        starts[encoded_value(sample["latents"][0], 1)].add(numbers[0])
    assert starts[0] <= set(range(85)) and len(starts[0]) > 60  # windows may cross clip boundaries
    assert starts[2] == {*range(9), 40, 41}  # windows must not cross the gap


def test_reference_option_selects_first_or_random_frame(dataset):
    def sampler_with(stage, reference):
        return Sampler(
            ClipStore(dataset), stage, seed=0, batch_size=1, size=SIZE, vae_scaling_factor=0.5, stick_width=2, frames=16,
            drop_reference=0.1, reference=reference,
        )  # fmt: skip

    first, random = sampler_with(1, "first"), sampler_with(2, "random")
    references = set()
    for step in range(60):
        sample = first.sample(step, 0)
        assert encoded_value(sample["reference"], 0) == -1  # first frame of the video
        assert encoded_value(sample["latents"][0], 0) > 0
        sample = random.sample(step, 0)
        # From the same video.
        assert encoded_value(sample["reference"], 1) == encoded_value(sample["latents"][0], 1)
        references.add(encoded_value(sample["reference"], 0))
    assert len(references) > 20 and min(references) >= 0


def test_noise_offset_adds_one_constant_per_channel(dataset):
    def noise(step, offset):
        source = Sampler(
            ClipStore(dataset), 2, seed=0, batch_size=1, size=SIZE, vae_scaling_factor=0.5, stick_width=2, frames=16,
            drop_reference=0.1, noise_offset=offset,
        )  # fmt: skip
        return source.sample(step, 0)

    shifts = []
    for step in range(100):
        baseline, shifted = noise(step, 0.0), noise(step, 0.05)
        shift = shifted["noise"] - baseline["noise"]
        np.testing.assert_allclose(
            shift, np.broadcast_to(shift[:1, :, :1, :1], shift.shape), rtol=0, atol=1e-6
        )
        shifts.append(shift[0, :, 0, 0])
        for key in baseline.keys() - {"noise"}:
            np.testing.assert_array_equal(baseline[key], shifted[key])
    assert np.std(shifts) == pytest.approx(0.05, rel=0.2) and abs(np.mean(shifts)) < 0.01


def sampler_with_pose_errors(dataset: Path, stage: int, **errors: float) -> Sampler:
    return Sampler(
        ClipStore(dataset), stage, seed=0, batch_size=1, size=SIZE, vae_scaling_factor=0.5, stick_width=2, frames=16,
        drop_reference=0.1, pose_errors=PoseErrors(**errors),
    )  # fmt: skip


def test_pose_errors_have_requested_rates_and_sizes(dataset):
    """The poses of the dataset have two joints at fixed positions: neck and right shoulder, connected by a limb."""

    def drawn(**errors: float) -> np.ndarray:
        """Centres of the two drawn joints in 640 frames, [640, 2, (y, x)]; NaN where a joint is not drawn."""
        source, centres = sampler_with_pose_errors(dataset, 2, **errors), []
        for frame in np.concatenate([source.sample(step, 0)["pose"] for step in range(40)]):
            positions = [np.argwhere((frame == colour).all(-1)) for colour in ((255, 85, 0), (255, 170, 0))]
            centres.append([pixels.mean(0) if len(pixels) else (np.nan, np.nan) for pixels in positions])
        return np.array(centres)

    true = np.array([[SIZE / 2, SIZE / 2], [SIZE / 2 + 5, SIZE / 2 - 15]])
    np.testing.assert_allclose(drawn(), np.broadcast_to(true, (640, 2, 2)), atol=0.5)

    missing = np.isnan(drawn(dropout=0.3)).any(-1)
    assert missing.mean(0) == pytest.approx([0.3, 0.3], abs=0.06)
    # Joints are dropped independently.
    assert (missing[:, 0] & missing[:, 1]).mean() == pytest.approx(0.09, abs=0.04)

    moved = drawn(jitter=0.03) - true
    assert np.nanstd(moved, (0, 1)) == pytest.approx([0.03 * SIZE] * 2, rel=0.1)
    assert abs(np.corrcoef(moved[:, 0, 0], moved[:, 1, 0])[0, 1]) < 0.1
    # Jitter is independent between frames.
    assert abs(np.corrcoef(moved[:-1, 0, 0], moved[1:, 0, 0])[0, 1]) < 0.1

    positions = drawn(outliers=0.4)
    missing = np.isnan(positions).all((1, 2))
    swapped = (abs(positions - true[::-1]) < 0.5).all((1, 2))
    # 50% of the outlier poses are empty; the others are permuted, and 50% of the permutations of two joints are swaps.
    assert (missing.mean(), swapped.mean()) == pytest.approx((0.2, 0.1), abs=0.05)
    assert (abs(positions[~missing & ~swapped] - true) < 0.5).all()


def test_pose_errors_depend_only_on_seed_and_step_and_change_only_poses(dataset):
    errors = {"dropout": 0.2, "jitter": 0.05, "outliers": 0.2}
    used = sampler_with_pose_errors(dataset, 2, **errors)
    used.sample(4, 0)
    again, fresh, clean = (
        used.sample(5, 0),
        sampler_with_pose_errors(dataset, 2, **errors).sample(5, 0),
        sampler_with_pose_errors(dataset, 2).sample(5, 0),
    )
    np.testing.assert_array_equal(again["pose"], fresh["pose"])
    assert not np.array_equal(again["pose"], clean["pose"])
    for key in clean.keys() - {"pose"}:
        np.testing.assert_array_equal(again[key], clean[key])
    stage1, baseline = (
        sampler_with_pose_errors(dataset, 1, **errors).sample(5, 0),
        sampler_with_pose_errors(dataset, 1).sample(5, 0),
    )
    np.testing.assert_array_equal(stage1["pose"], baseline["pose"])  # pose errors apply to stage 2 only


def test_every_video_is_sampled_once_per_epoch(dataset):
    source = make_sampler(dataset, 1, batch_size=2)
    ids = [source.video(*divmod(n, 2)).video_id for n in range(30)]
    epochs = [tuple(ids[n : n + 3]) for n in range(0, 30, 3)]
    assert all(sorted(epoch) == ["gap", "long", "short"] for epoch in epochs)
    assert len(set(epochs)) > 1


def test_crop_is_identical_for_latents_reference_and_pose(tmp_path):
    wide = write_dataset(tmp_path / "wide", {"a": [(0, 40)]}, SIZE + 32, SIZE + 64)
    source, corners = make_sampler(wide, 1), set()
    for step in range(40):
        sample = source.sample(step, 0)
        y, x = (round(float(sample["reference"][channel, 0, 0]) * 2) for channel in (2, 3))
        rows, columns = np.mgrid[y : y + 8, x : x + 8]
        for part in (sample["reference"], sample["latents"][0]):
            np.testing.assert_allclose(part[2:] * 2, [rows, columns], atol=1e-4)
        keypoints = np.zeros((1, 18, 3), np.float32)
        keypoints[0, 1] = (64 - 8 * x, 48 - 8 * y, 1)
        keypoints[0, 2] = (49 - 8 * x, 53 - 8 * y, 1)
        np.testing.assert_array_equal(sample["pose"], draw_poses(keypoints, SIZE, SIZE, 2))
        corners.add((y, x))
    assert {y for y, _ in corners} == set(range(5)) and {x for _, x in corners} == set(range(9))


def test_latents_are_sampled_from_the_posterior(tmp_path):
    folder = write_dataset(tmp_path / "set", {"a": [(0, 40)]}, SIZE, SIZE)
    for row in changed_clips(folder):
        row["latent_mean"] = np.full((40, 4, 8, 8), 3, "<f2").tobytes()
        row["latent_logvar"] = np.full((40, 4, 8, 8), np.log(4), "<f2").tobytes()
    source = make_sampler(folder, 1)
    values = np.stack([source.sample(step, 0)["latents"] for step in range(100)])
    assert values.mean() == pytest.approx(3 * 0.5, abs=0.05)  # scaled by the VAE scaling factor
    assert values.std() == pytest.approx(2 * 0.5, abs=0.05)


# --- guards, settings ------------------------------------------------------------------------------------------------


def test_loss_guard_detects_spikes_also_after_restart():
    def is_bad(guard: LossGuard, loss: float) -> bool:
        return bool(guard.check(torch.tensor(loss)))

    guard = LossGuard(10.0, {})
    assert not is_bad(guard, 1e9) and is_bad(guard, float("nan"))
    guard = LossGuard(10.0, {})
    assert not any(is_bad(guard, 0.1) for _ in range(25))
    restored = LossGuard(10.0, json.loads(json.dumps(guard.state)))
    for current in (guard, restored):
        assert is_bad(current, 2.0) and is_bad(current, float("inf"))
        assert not is_bad(current, 0.9)  # below 10 times the mean, which excludes the spike
        assert current.state == {"loss_mean": pytest.approx(0.1 + 0.8 / 26), "loss_steps": 26}
    assert not is_bad(LossGuard(0.0, guard.state), 1e9)
    assert LossGuard.reason(2.0, 0.1) == "the loss is 2, 20 times its running mean"
    assert LossGuard.reason(float("nan"), 0.1) == "the loss is nan"


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_optimizer_step_is_skipped_on_the_device(ema_decay):
    """With `found_inf` the step changes nothing, even if gradients are NaN; without it equals a step of plain AdamW."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    optimizers = [AdamW([weight], ema_decay, lr=0.1) for weight in weights]
    for optimizer, weight in zip(optimizers, weights, strict=True):
        optimizer.init_state([weight])
    for gradient in (torch.ones(5), torch.full((5,), torch.nan), torch.ones(5)):
        skipped = bool(gradient.isnan().any())
        weights[0].grad, optimizers[0].found_inf = gradient.clone(), torch.tensor(float(skipped))
        optimizers[0].step()
        if not skipped:
            weights[1].grad = gradient.clone()
            optimizers[1].step()
        assert torch.equal(*weights)
        for key in (*optimizers[0].state_keys, "step"):
            assert torch.equal(*(o.state[w][key] for o, w in zip(optimizers, weights, strict=True)))


def test_deepspeed_json_is_merged_and_conflicts_are_reported(tmp_path):
    keys = "--train.workers=2", "--train.zero_stage=2", f"--train.deepspeed={tmp_path / 'ds.json'}"
    config = load_config(*keys).train
    given = {
        "train_batch_size": "auto", "gradient_clipping": 1.0, "communication_data_type": "fp32",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(given))
    merged = deepspeed_settings(config, config.stage1, 2, read_settings(config.deepspeed))
    assert merged["zero_optimization"].items() >= {"stage": 2, "reduce_bucket_size": 1000}.items()
    assert merged["train_batch_size"] == 16 and merged["communication_data_type"] == "fp32"
    given = {"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}, "fp16": {"enabled": True}}
    with pytest.raises(UserError) as error:
        deepspeed_settings(config, config.stage1, 2, given)
    for part in (
        "zero_optimization.stage is 3, not 2",
        "train.zero_stage",
        "optimizer",
        "fp16.enabled",
        "ds.json",
    ):
        assert part in str(error.value)
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match=r"ds.json: cannot be read"):
        read_settings(config.deepspeed)


def test_flops_of_frozen_and_trained_layers_match_closed_form():
    """The closed form counts multiplications and additions of forward pass, input gradients and weight gradients."""
    batch, channels, side, classes = 2, 8, 6, 4
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, channels, 1),
        torch.nn.Conv2d(channels, channels, 3, padding=1),
        torch.nn.Flatten(),
        torch.nn.Linear(channels * side * side, classes),
    )
    network.requires_grad_(False)
    network[3].weight.requires_grad_(True)
    make_memory_efficient(network)  # replaces the backward pass of the convolutions
    x = torch.randn(batch, 3, side, side, requires_grad=True)

    def products(convolution: torch.nn.Conv2d) -> int:
        return batch * side**2 * convolution.weight.numel()

    frozen = products(network[0]) + products(network[1])
    linear = batch * network[3].weight.numel()
    expected = 6 * 2 * (2 * frozen + 3 * linear)

    meter = FlopsMeter(micro_batches=6, workers=2, peak_flops=1e9)
    for _ in range(2):
        with meter.counted((1,)):
            network(x).sum().backward()
    found = meter.metrics(0.5, (1,))
    assert found["tflops_per_second"] == pytest.approx(expected / 0.5 / 1e12, rel=1e-12)
    assert found["mfu"] == pytest.approx(expected / 0.5 / 2e9, rel=1e-12)


def test_progress_bar_keeps_printed_lines_intact():
    """Emulates a terminal: after a carriage return, new text replaces the line."""
    reader_fd, terminal_fd = pty.openpty()
    termios.tcsetwinsize(terminal_fd, (24, 80))
    with os.fdopen(terminal_fd, "w") as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        with progress("stage 1", 12) as show:
            show(4, "loss 0.5000")
            print("stage 1, step 5: the loss is nan: step skipped", flush=True)
            time.sleep(0.2)
            show(8, "loss 0.2500")
            show(6, "loss 0.3000")  # resumed from an older checkpoint
            print("output of a worker", file=sys.stderr)
            show(12, "loss 0.1250")
        print("stage 1: finished")
    shown = ""
    with suppress(OSError):  # end of the stream
        while True:
            shown += os.read(reader_fd, 1 << 16).decode(errors="ignore")
    os.close(reader_fd)
    lines = [line.rstrip().split("\r")[-1].rstrip() for line in shown.split("\n")]
    assert lines[:2] == ["stage 1, step 5: the loss is nan: step skipped", "output of a worker"]
    assert re.fullmatch(r"stage 1: 100%\|█+\| 12/12, 00:00 remaining, loss 0.1250", lines[2])
    assert lines[3:] == ["stage 1: finished", ""]
    assert re.search(r"\r *stage 1:  33%\|█+.? +\| 4/12, .* remaining, loss 0.5000", shown)


def test_monitor_reports_the_hung_worker(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monitor = RunMonitor()
    for rank in range(3):
        assert monitor.register(rank, 3) is None
    assert monitor.hung_workers(10) is None
    for rank, step in ((0, 5), (1, 5), (2, 5), (0, 6), (2, 6)):
        assert not monitor.heartbeat(rank, step, f"machine {rank}")
    now = 9.0
    assert monitor.hung_workers(10) is None
    now = 10.0
    assert monitor.hung_workers(10) == "no step for 10 s; worker 1 (machine 1) hung after step 5"
    assert monitor.hung_workers(10) is None
    monitor.stop()
    monitor.abort("first")
    monitor.abort("second")
    assert monitor.heartbeat(0, 7, "") and monitor.abort_reason() == monitor.register(0, 3) == "first"


def test_out_of_memory_message_lists_settings_to_change():
    config = load_config("--train.zero_stage=1").train
    message = out_of_memory(torch.OutOfMemoryError("CUDA out of memory"), config, config.stage1, 1)
    for key in ("train.stage1.micro_batch (8)", "train.gradient_checkpointing", "train.zero_stage (1)"):
        assert key in message
    assert out_of_memory(RuntimeError("something else"), config, config.stage1, 1) is None
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)  # message of the CPU allocator
    assert out_of_memory(error.value, config, config.stage1, 1)


def test_changed_frozen_tensor_is_reported_by_name():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    module[0].requires_grad_(False)
    frozen = FrozenFingerprint(module)
    with torch.no_grad():
        module[1].weight += 1  # trained
        frozen.check()
        module[0].weight[1, 0] += 1e-6
    with pytest.raises(RuntimeError, match=r"1 frozen tensors have changed, such as 0\.weight"):
        frozen.check()


def test_incomplete_checkpoints_are_removed(tmp_path):
    import ray

    names = ["step_000003_aa", "step_000006_bb"]
    known = [{"version": 0, "checkpoint_dir_name": name, "metrics": {}} for name in names]
    snapshot = {
        "ray_version": ray.__version__, "checkpoint_results": known, "latest_checkpoint_result": known[-1],
        "checkpoint_report_indices": [0, 1], "current_report_index": 2, "pending_training_results": [],
        "pending_validation_specs": [],
        **{f"{how}_checkpoint_dir_names": [] for how in ("validated", "timed_out_validation", "failed_validation")},
    }  # fmt: skip
    incomplete, others = "step_000009_cc", ["model", "run.json"]
    for name in (*names, incomplete, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    remove_incomplete(str(tmp_path))
    assert {path.name for path in tmp_path.glob("*/")} == {*names, *others}


@pytest.mark.parametrize("snapshot", [None, "", '{"ray_version": "2'])
def test_truncated_checkpoint_list_is_regenerated(tmp_path, snapshot):
    import ray.train

    def write_shard(folder: str, rank: int, size: int | None = None) -> None:
        path = tmp_path / folder / f"trained-{rank:05d}-of-00002.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({"weight": torch.zeros(99)}, path)
        os.truncate(path, size or path.stat().st_size)
        (path.parent / "state.json").write_text(json.dumps({"step": 3}))

    for folder in ("step_000003_aa", "step_000006_bb", "step_000009_cc", "step_000012_dd"):
        write_shard(folder, 0)
    for folder in ("step_000003_aa", "step_000006_bb"):
        write_shard(folder, 1)
    write_shard("step_000009_cc", 1, size=200)
    if snapshot is not None:
        (tmp_path / "checkpoint_manager_snapshot.json").write_text(snapshot)
    remove_incomplete(str(tmp_path))
    assert {path.name for path in tmp_path.glob("*/")} == {"step_000003_aa", "step_000006_bb"}
    known = ray.train.Result.from_path(str(tmp_path))
    assert known.checkpoint.path.endswith("step_000006_bb") and len(known.best_checkpoints) == 2


def test_ema_matches_reference_and_ignores_skipped_steps():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = AdamW([weight], 0.9, lr=0.1)
    optimizer.init_state([weight])
    expected = 1.0
    for step in range(1, 30):
        weight.grad = torch.tensor([1.0])
        optimizer.skip = step % 5 == 0
        before = weight.item()
        optimizer.step()
        if optimizer.skip:
            assert weight.item() == before
            continue
        num_updates = step - step // 5
        decay = min(0.9, (1 + num_updates) / (10 + num_updates))
        expected = decay * expected + (1 - decay) * weight.item()
    assert optimizer.state[weight]["ema"].item() == pytest.approx(expected, rel=1e-5)


def test_compare_losses_exit_status_depends_on_tolerance(tmp_path, monkeypatch, capsys):
    for name, values in (("a", {1: 0.5, 2: 0.25}), ("b", {1: 0.5, 2: 0.2501, 3: 0.1})):
        (tmp_path / name).write_text(json.dumps(values))
    for tolerance, status in (("1e-3", 0), ("1e-4", 1)):
        files = [str(tmp_path / "a"), str(tmp_path / "b")]
        monkeypatch.setattr(sys, "argv", ["compare_losses", *files, "--tolerance", tolerance])
        assert compare_losses.main() == status
        assert "2 common steps, 1 in one run only; largest difference at step 2" in capsys.readouterr().out


# --- complete runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """Pretrained models with random weights, smaller than the shipped `mini` models."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    channels = (16, 32, 32, 32)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5,
    ).save_pretrained(folder / "vae")  # fmt: skip
    unet = UNet2DConditionModel(
        layers_per_block=1,
        block_out_channels=channels,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=16,
    )
    unet.save_pretrained(folder / "unet")
    controlnet = ControlNetModel.from_unet(unet)
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    controlnet.save_pretrained(folder / "controlnet")
    MotionAdapter(
        block_out_channels=channels, motion_layers_per_block=1, motion_num_attention_heads=4, motion_norm_num_groups=8,
        use_motion_mid_block=False,
    ).save_pretrained(folder / "motion_adapter")  # fmt: skip
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=4,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory, pretrained) -> Path:
    vae = fingerprint(AutoencoderKL.from_pretrained(pretrained / "vae"))
    folder = tmp_path_factory.mktemp("clips") / "dataset"
    write_dataset(folder, {name: [(0, 16), (16, 16)] for name in "abcdefgh"}, SIZE, SIZE, vae)
    rng = np.random.default_rng(0)
    for row in changed_clips(folder):
        row["split"] = "validation" if row["video_id"] in "gh" else "train"
        row["latent_mean"] = rng.normal(0, 2, (16, 4, 8, 8)).astype("<f2").tobytes()
        row["latent_logvar"] = rng.normal(-3, 1, (16, 4, 8, 8)).astype("<f2").tobytes()
        row["reference_latent_mean"] = rng.normal(0, 2, (4, 8, 8)).astype("<f2").tobytes()
    return folder


STEPS = {1: 12, 2: 4}


def arguments(pretrained: Path, folder: Path, *more: str) -> list[str]:
    keys = {
        "size": SIZE, "tracking.folder": folder / "mlflow", "train.log_every": 3, "train.workers": 2, "train.clip_frames": 8,
        **{f"pretrained.{part}": pretrained for part in ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")},
        "train.stage1.steps": STEPS[1], "train.stage1.checkpoint_every": 3, "train.stage1.sample_every": 0,
        "train.stage2.steps": STEPS[2], "train.stage2.checkpoint_every": 2, "train.stage2.sample_every": 4,
        "train.stage1.validate_every": 6, "train.stage2.validate_every": 4, "train.validation_samples": 3,
        **{f"train.stage{n}.batch_size": 4 for n in (1, 2)}, **{f"train.stage{n}.micro_batch": 2 for n in (1, 2)},
    }  # fmt: skip
    return [*(f"--{key}={value}" for key, value in keys.items()), *more]


def make_config(pretrained: Path, folder: Path, *more: str) -> Config:
    return load_config(*arguments(pretrained, folder, *more))


def weights(model: Path) -> dict[str, bytes]:
    """Raw bytes of each tensor, by part/tensor name."""
    return {
        f"{path.parent.name}/{name}": tensor.numpy().tobytes()
        for path in model.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def losses(config: Config, out: Path, stage: int, key: str = "loss") -> dict[int, list[float]]:
    """All recorded values of a metric in the MLflow run of a stage, by step, in ascending order of steps.

    The history of MLflow is in the order of arrival.
    """
    from mlflow import MlflowClient

    run_id = json.loads((out / f"stage{stage}" / "run.json").read_text())["mlflow_run_id"]
    history = MlflowClient(tracking.resolve_uri(config.tracking)).get_metric_history(run_id, key)
    values: dict[int, list[float]] = {}
    for metric in history:
        values.setdefault(metric.step, []).append(metric.value)
    return dict(sorted(values.items()))


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


@pytest.fixture(scope="module")
def engine_results(tmp_path_factory, pretrained, clips) -> dict[int, dict[str, dict]]:
    """Results of `tests.engines`, by number of workers and engine."""
    folder = tmp_path_factory.mktemp("engines")
    found = {}
    for workers in (2, 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "tests.engines"]
        worker_args = [workers, port, folder, pretrained, clips]
        processes = [
            subprocess.Popen(
                [*command, *map(str, [rank, *worker_args])], cwd=ROOT, stderr=subprocess.PIPE, text=True
            )
            for rank in range(workers)
        ]
        errors = [process.communicate()[1] for process in processes]
        assert not any(process.returncode for process in processes), "\n".join(errors)
        found[workers] = json.loads((folder / f"losses-{workers}.json").read_text())
    return found


@pytest.mark.slow
def test_all_zero_stages_produce_the_same_losses(engine_results):
    for name, found in engine_results[2].items():
        # fp32 differs only in summation order. bf16 has an 8-bit mantissa.
        # The measured bf16 losses differ from fp32 by 5e-4.
        tolerance = 1e-5 if "fp32" in name else 2e-3
        assert found["losses"] == pytest.approx(engine_results[2]["zero2-fp32"]["losses"], rel=tolerance), (
            name
        )


@pytest.mark.slow
def test_steps_with_non_finite_gradients_change_nothing(engine_results):
    """On two workers, with a gradient of inf on one of them, and a finite loss."""
    for name, found in engine_results[2].items():
        assert found["bad_norm"] in ("inf", "nan") and not found["bad_step_changed_weights"], name
        assert np.isfinite(found["loss_after_bad_step"]), name


@pytest.mark.slow
def test_optimizer_and_checkpoints_contain_only_trained_parameters(engine_results, pretrained):
    for name, found in engine_results[2].items():
        assert found["in_checkpoint"] == sorted(found["trained"]), name
        assert found["trained"] and all(
            "motion_modules" in key or "temporal" in key for key in found["trained"]
        ), name
        numel = sum(int(np.prod(shape)) for shape in found["trained"].values())
        # With sharding, each of the two workers stores 50%; a shard may be padded.
        stored = found["in_optimizer"] * (1 if "zero0" in name else 2)
        assert numel <= stored < 1.05 * numel + 64 * len(found["trained"]), name


@pytest.mark.slow
def test_checkpoint_of_two_workers_resumes_with_one_worker(engine_results):
    assert len(engine_results[1]) > len(engine_results[2])  # some are also resumed with another ZeRO stage
    for name, found in engine_results[1].items():
        tolerance = 1e-5 if "fp32" in name else 2e-3
        before = engine_results[2][name.split(" as ")[0]]["losses"]
        assert found["losses"] == pytest.approx(before[-len(found["losses"]) :], rel=tolerance), name


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


@pytest.mark.slow
def test_rerun_after_sigterm_sigint_and_sigkill_resumes(uninterrupted, tmp_path, pretrained, clips, bucket):
    """Dataset, checkpoints and model are in a bucket."""
    from mlflow import MlflowClient

    upload(clips, f"{bucket}/clips")
    training = Stage1(f"{bucket}/clips", tmp_path, arguments(pretrained, tmp_path), f"{bucket}/run")

    def wait_for(driver: psutil.Popen, condition: Callable[[], Any]) -> None:
        while not condition():
            assert driver.poll() is None, training.output()
            time.sleep(0.05)

    last_checkpoint = 0
    for count, (number, status) in enumerate(((signal.SIGTERM, 143), (signal.SIGINT, 130)), 1):
        # Sample images at every step slow training down, so that the signal arrives before its end.
        keys = (
            "--train.stage1.checkpoint_every=1000",
            "--train.stage1.sample_every=1",
            "--train.log_every=1",
        )
        reported = training.output().count("samples/s") if count > 1 else 0
        driver = training.start(2, *keys)
        wait_for(driver, lambda reported=reported: training.output().count("samples/s") > reported)
        driver.send_signal(number)
        assert driver.wait() == status, training.output()
        assert training.output().count("stopped; rerun the command to resume") == count
        previous, last_checkpoint = last_checkpoint, max(checkpoints(f"{bucket}/run"))
        assert previous < last_checkpoint < STEPS[1]  # written on the signal: no periodic checkpoint was due
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
    began = time.monotonic()
    assert driver.wait(60) == 143, training.output()
    assert time.monotonic() - began < 20


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


# --- invalid input ---------------------------------------------------------------------------------------------------


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


def test_field_added_after_the_start_of_a_run_has_its_default():
    from pipelines.train.run_file import check_same_settings, settings_of_config

    config = load_config()
    new = settings_of_config(config, 1)
    old = {key: value for key, value in new.items() if key != "noise_offset"}
    check_same_settings(Path("out/stage1"), old, new)
    config.train.noise_offset = 0.05
    with pytest.raises(UserError, match=r"started with noise_offset = 0\.0, not 0\.05"):
        check_same_settings(Path("out/stage1"), old, settings_of_config(config, 1))
