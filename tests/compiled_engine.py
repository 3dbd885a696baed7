"""Losses of a DeepSpeed engine around a compiled model and around an eager one, printed as JSON.

python -m tests.compiled_engine ZERO_STAGE PORT
"""

import dataclasses
import json
import os
import sys

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

import torch.distributed as dist
from diffusers import DDIMScheduler
from torch._dynamo.testing import CompileCounterWithBackend

from pipelines.config import StageConfig
from pipelines.config.parser import load_config
from pipelines.train.engine import create_engine
from tcan.acceleration import TCAN_NETWORKS, compile_tcan
from tcan.model import diffusion_loss
from tests.tiny import tiny_batch, tiny_tcan


def main(zero_stage: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    config = dataclasses.replace(load_config().train, zero_stage=zero_stage, gradient_checkpointing=True)
    stage = StageConfig(steps=3, batch_size=4, micro_batch=2, lr=1e-2)
    counted = {method: CompileCounterWithBackend("aot_eager") for method in TCAN_NETWORKS}
    losses: dict[str, list[float]] = {}
    for name in ("eager", "compiled"):
        tcan = tiny_tcan()
        tcan.set_stage(1)
        tcan.enable_gradient_checkpointing()
        engine = create_engine(tcan.train(), config, stage, 1, {})
        if name == "compiled":
            compile_tcan(engine.module, counted)
        losses[name] = []
        for micro_step in range(6):  # three optimizer steps of two micro-batches
            loss = diffusion_loss(
                engine,
                DDIMScheduler(),
                **tiny_batch(2, 1, micro_step),
                reference_mask=[True, micro_step % 2 == 0],
            )
            engine.backward(loss)
            engine.step()
            losses[name].append(loss.item())
    compilations = {method: counter.frame_count for method, counter in counted.items()}
    print(json.dumps({"losses": losses, "compilations": compilations}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
