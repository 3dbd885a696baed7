"""Compilation in the jobs: configuration, DeepSpeed engines, counted operations; `micro_batch: auto`."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler

from pipelines.config.parser import load_config
from pipelines.memory import fits, training_estimate
from pipelines.train.data import Batch
from pipelines.train.engine import deepspeed_settings
from pipelines.train.micro_batch import largest_micro_batch, with_micro_batch
from pipelines.train.throughput import FlopsMeter
from tcan.errors import UserError
from tcan.model import diffusion_loss
from tests.tiny import tiny_batch, tiny_tcan

GIB = 2**30


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2])
def test_deepspeed_trains_a_compiled_model_like_an_eager_one(zero_stage: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.compiled_engine", str(zero_stage), str(port)]
    output = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert output.returncode == 0, output.stderr[-3000:]
    found = json.loads(output.stdout.splitlines()[-1])
    assert found["losses"]["compiled"] == pytest.approx(found["losses"]["eager"], rel=1e-4)
    assert found["losses"]["eager"][0] != pytest.approx(found["losses"]["eager"][4], rel=1e-4)
    assert set(found["compilations"].values()) == {1}


def test_zero_3_cannot_be_compiled() -> None:
    with pytest.raises(UserError, match=r"^train\.compile = True: not supported with ZeRO 3"):
        load_config("--train.compile=true", "--train.zero_stage=3")
    assert load_config("--train.zero_stage=3").train.compile == "auto"


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_accumulates_gradients_in_fp32_and_gpus_overlap_communication(
    zero_stage: int, gpus: int
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    train = load_config(
        "--train.precision=bf16", f"--train.zero_stage={zero_stage}", f"--train.gpus_per_worker={gpus}"
    ).train
    settings = deepspeed_settings(train, train.stage1, 1, {})
    parsed = DeepSpeedConfig(settings | {"train_batch_size": 8, "gradient_accumulation_steps": 1})
    assert parsed.grad_accum_dtype == ("fp32" if zero_stage >= 2 else None)
    assert parsed.zero_config.overlap_comm == (gpus == 1 or zero_stage == 3)
    settings = deepspeed_settings(train, train.stage1, 1, {"zero_optimization": {"overlap_comm": False}})
    assert settings["zero_optimization"]["overlap_comm"] is False


def test_operations_counted_on_fake_tensors_equal_those_of_a_step() -> None:
    tcan = tiny_tcan()
    tcan.set_stage(1)
    tcan.train()
    data = tiny_batch(2, 1)
    real, fake = (FlopsMeter(1, 1, None) for _ in range(2))
    shape = data["latents"].shape
    with real.counted(shape):
        diffusion_loss(tcan, DDIMScheduler(), **data).backward()
    batch = Batch(
        latents=data["latents"], noise=data["noise"], timestep=data["timestep"], pose=torch.empty(0),
        reference=data["reference_latent"], reference_mask=torch.ones(2, dtype=torch.bool),
    )  # fmt: skip
    tcan.zero_grad()
    fake.count_fake(tcan, batch)
    assert fake.metrics(1.0, shape) == real.metrics(1.0, shape)
    assert fake.metrics(1.0, shape)["tflops_per_second"] > 0
    assert all(parameter.grad is None for parameter in tcan.parameters())


@pytest.mark.slow
def test_micro_batch_auto_is_the_largest_divisor_that_fits() -> None:
    config = load_config("--train.stage1.micro_batch=auto", "--train.stage1.batch_size=12", "--size=64")
    estimate = training_estimate(config, 1, (64, 64), False)
    zero = config.train.zero_stage
    for gibibytes in (0.8, 0.9, 1.0, 1.2, 4.0):
        chosen, size = largest_micro_batch(config, 1, (64, 64), 2, gibibytes)
        fitting = [n for n in (1, 2, 3, 6) if fits(estimate.per_device(zero, 2, n)["sum"], gibibytes)]
        assert chosen == max(fitting, default=1)
        assert size == estimate.per_device(zero, 2, chosen)["sum"]
    assert largest_micro_batch(config, 1, (64, 64), 2, 4.0, limit=5)[0] == 3
    assert with_micro_batch(config, 1, 3).train.stage1 == dataclasses.replace(
        config.train.stage1, micro_batch=3
    )


def test_micro_batch_auto_keeps_the_rule_for_the_global_batch() -> None:
    with pytest.raises(UserError, match=r"^train\.stage1\.batch_size = 7: not a multiple"):
        load_config("--train.stage1.micro_batch=auto", "--train.stage1.batch_size=7", "--train.workers=2")
