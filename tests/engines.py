"""Worker of a small training without Ray that runs every kind of DeepSpeed engine in sequence.

All engines run in one process, because each start of DeepSpeed costs as much as hundreds of these training steps.

python -m tests.engines RANK WORKERS PORT FOLDER PRETRAINED CLIPS

Rank 0 writes FOLDER/losses-{workers}.json. With two workers, each engine trains 3 steps from scratch and writes a
checkpoint after step 1. With one worker, each engine resumes from that checkpoint; some checkpoints are also resumed
by a different engine of the same precision.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pipelines.config import StageConfig
from pipelines.config.parser import load_config
from pipelines.train import checkpoint
from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler
from pipelines.train.engine import (
    create_engine,
    ema_weights,
    get_state,
    optimizer_step,
    trained_parameters,
)
from pipelines.train.model import batch_loss
from tcan.model import TCAN
from tcan.weights import load_pretrained

STEPS, CHECKPOINT_STEP = 3, 1
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
ENGINES = {
    **{f"zero{n}-fp32": (n, "fp32", {}) for n in range(4)},
    "zero0-bf16": (0, "bf16", {}),
    "zero2-bf16": (2, "bf16", {}),
    "zero2-fp32-offload": (2, "fp32", OFFLOAD),
}
RESUMED_AS = {name: [name] for name in ENGINES} | {"zero3-fp32": ["zero3-fp32", "zero2-fp32"]}


def parameter_names(folder: Path) -> set[str]:
    """Names of the parameters stored in the checkpoint files."""
    return {key.rsplit(":", 2)[0] for path in folder.glob("*.safetensors") for key in load_file(path)}


def main(rank: int, workers: int, port: int, folder: Path, pretrained_folder: str, clips: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
    }  # required by DeepSpeed
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    sources = dict.fromkeys(
        ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler"), pretrained_folder
    )
    pretrained = load_pretrained(**sources)
    stage = StageConfig(steps=STEPS, batch_size=2, micro_batch=1, lr=1e-3)
    sampler = Sampler(
        ClipStore(clips), 2, seed=0, batch_size=2, size=64, vae_scaling_factor=0.5, stick_width=2, frames=4,
        drop_reference=0.0,
    )  # fmt: skip
    device = torch.device("cpu")

    def build_engine(name: str):
        zero, precision, user_settings = ENGINES[name]
        config = dataclasses.replace(load_config().train, zero_stage=zero, precision=precision, ema_decay=0.5)
        torch.manual_seed(0)
        model = TCAN(
            pretrained.unet, pretrained.controlnet, pretrained.motion_adapter, pretrained.empty_prompt, 2, 2
        )
        model.set_stage(2)
        model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
        return create_engine(model, config, stage, workers, user_settings)

    def train(engine, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            total = torch.zeros(())
            batches = sampler.worker_batches(step, rank, workers, 1)
            for batch in batches:
                loss = batch_loss(engine, pretrained, batch, device)
                engine.backward(loss)
                if batch is batches[-1]:
                    optimizer_step(engine, torch.zeros((), dtype=torch.bool, device=device))
                else:
                    engine.step()  # counts the gradient accumulation
                total += loss.detach() / len(batches) / workers
            dist.all_reduce(total)
            losses.append(total.item())
        return losses

    def bad_step(engine) -> tuple[float, bool]:
        """A step whose loss is finite but whose gradient is inf on the last worker.

        Returns:
            the norm, and whether the step has changed any weight.
        """
        names_and_parameters = trained_parameters(engine)
        before = [
            get_state(engine, p, key).clone() for _, p in names_and_parameters for key in ("weight", "ema")
        ]
        poison = names_and_parameters[0][1].register_hook(
            lambda gradient: gradient * float("inf") if rank == workers - 1 else gradient
        )
        (batch,) = sampler.worker_batches(STEPS, rank, workers, 1)
        loss = batch_loss(engine, pretrained, batch, device)
        assert torch.isfinite(loss)
        engine.backward(loss)
        norm = float(optimizer_step(engine, torch.zeros((), dtype=torch.bool, device=device)))
        poison.remove()
        after = [get_state(engine, p, key) for _, p in names_and_parameters for key in ("weight", "ema")]
        return norm, not all(map(torch.equal, before, after))

    results: dict[str, dict] = {}
    for name in ENGINES:
        checkpoint_folder = folder / name
        if workers == 2:
            engine = build_engine(name)
            frozen = checkpoint.FrozenFingerprint(engine.module)
            losses = train(engine, 0, CHECKPOINT_STEP)
            dist.barrier()
            if rank == 0:
                checkpoint_folder.mkdir()
            dist.barrier()
            checkpoint.write(engine, checkpoint_folder, {"step": CHECKPOINT_STEP})
            losses += train(engine, CHECKPOINT_STEP, STEPS)
            frozen.check()
            norm, changed = bad_step(engine)
            results[name] = {
                "losses": losses,
                "bad_norm": str(norm),
                "bad_step_changed_weights": changed,
                "loss_after_bad_step": train(engine, STEPS, STEPS + 1)[0],
                "in_optimizer": sum(
                    state["exp_avg"].numel() for state in engine.basic_optimizer.state.values()
                ),
                "in_checkpoint": sorted(parameter_names(checkpoint_folder)),
                "trained": {
                    name: list(getattr(p, "ds_shape", p.shape)) for name, p in trained_parameters(engine)
                },
            }
            del engine
        else:
            for other in RESUMED_AS[name]:
                engine = build_engine(other)
                assert checkpoint.read(engine, checkpoint_folder)["step"] == CHECKPOINT_STEP
                key, parameter = trained_parameters(engine)[0]
                before = get_state(engine, parameter, "weight").clone()
                with ema_weights(engine):
                    pass
                assert torch.equal(before, get_state(engine, parameter, "weight")), key
                results[f"{name} as {other}"] = {"losses": train(engine, CHECKPOINT_STEP, STEPS)}
                del engine
        if rank == 0:
            (folder / f"losses-{workers}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    rank, workers, port, folder, pretrained, clips = sys.argv[1:]
    main(int(rank), int(workers), int(port), Path(folder), pretrained, clips)
