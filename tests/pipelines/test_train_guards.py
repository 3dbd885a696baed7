"""Parts of the training loop: loss guard, optimizer, DeepSpeed settings, progress, monitor, checkpoints."""

import json
import os
import pty
import re
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.config.parser import load_config
from pipelines.train.checkpoint import FrozenFingerprint, remove_incomplete
from pipelines.train.engine import AdamW, deepspeed_settings, read_settings
from pipelines.train.heartbeat import RunMonitor
from pipelines.train.loss_guard import LossGuard, out_of_memory
from pipelines.train.progress import progress
from pipelines.train.throughput import FlopsMeter
from tcan.errors import UserError
from tcan.memory_efficient import make_memory_efficient
from tests import compare_losses


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


def test_field_added_after_the_start_of_a_run_has_its_default():
    from pipelines.train.run_file import check_same_settings, settings_of_config

    config = load_config()
    new = settings_of_config(config, 1)
    old = {key: value for key, value in new.items() if key != "noise_offset"}
    check_same_settings(Path("out/stage1"), old, new)
    config.train.noise_offset = 0.05
    with pytest.raises(UserError, match=r"started with noise_offset = 0\.0, not 0\.05"):
        check_same_settings(Path("out/stage1"), old, settings_of_config(config, 1))
