"""A worker of a small training without Ray: engines of every kind, one after the other in one process, since each start
of DeepSpeed costs as much as hundreds of the steps taken here.

python -m tests.engines RANK WORKERS PORT FOLDER PRETRAINED CLIPS    writes FOLDER/losses-{workers}.json from rank 0

Two workers train each engine for 3 steps from the start, with a checkpoint after the first, one worker goes on from
that checkpoint, with another engine of the same precision too.
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
from pipelines.config_parser import load_config
from pipelines.train import checkpoint
from pipelines.train.data import ClipStore, Sampler
from pipelines.train.engine import create_engine, ema_weights, get_state, trained_parameters
from pipelines.train.model import batch_loss
from tcan.model import TCAN
from tcan.weights import load_pretrained

STEPS, SAVED = 3, 1
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
ENGINES = {
    **{f"zero{n}-fp32": (n, "fp32", {}) for n in range(4)},
    "zero2-bf16": (2, "bf16", {}),
    "zero2-fp32-offload": (2, "fp32", OFFLOAD),
}
RESUMED_AS = {name: [name] for name in ENGINES} | {"zero3-fp32": ["zero3-fp32", "zero2-fp32"]}


def names_in(checkpoint_folder: Path) -> set[str]:
    """Of the parameters, by reading the files."""
    return {
        key.rsplit(":", 2)[0] for path in checkpoint_folder.glob("*.safetensors") for key in load_file(path)
    }


def main(rank: int, workers: int, port: int, folder: Path, pretrained_folder: str, clips: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
    }  # DeepSpeed asks for them
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

    def engine_of(name: str):
        zero, precision, given = ENGINES[name]
        config = dataclasses.replace(load_config().train, zero_stage=zero, precision=precision, ema_decay=0.5)
        torch.manual_seed(0)
        model = TCAN(
            pretrained.unet, pretrained.controlnet, pretrained.motion_adapter, pretrained.empty_prompt, 2, 2
        )
        model.set_stage(2)
        model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
        return create_engine(model, config, stage, workers, given)

    def train(engine, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            total = torch.zeros(())
            batches = sampler.worker_batches(step, rank, workers, 1)
            for batch in batches:
                loss = batch_loss(engine, pretrained, batch, device)
                engine.backward(loss)
                engine.step()
                total += loss.detach() / len(batches) / workers
            dist.all_reduce(total)
            losses.append(total.item())
        return losses

    results: dict[str, dict] = {}
    for name in ENGINES:
        saved = folder / name
        if workers == 2:
            engine = engine_of(name)
            frozen = checkpoint.FrozenFingerprint(engine.module)
            losses = train(engine, 0, SAVED)
            dist.barrier()
            if rank == 0:
                saved.mkdir()
            dist.barrier()
            checkpoint.write(engine, saved, {"step": SAVED})
            losses += train(engine, SAVED, STEPS)
            frozen.check()
            results[name] = {
                "losses": losses,
                "in_optimizer": sum(
                    state["exp_avg"].numel() for state in engine.basic_optimizer.state.values()
                ),
                "in_checkpoint": sorted(names_in(saved)),
                "trained": {name: list(getattr(p, "ds_shape", p.shape)) for name, p in trained_parameters(engine)},
            }
            del engine
        else:
            for other in RESUMED_AS[name]:
                engine = engine_of(other)
                assert checkpoint.read(engine, saved)["step"] == SAVED
                key, parameter = trained_parameters(engine)[0]
                before = get_state(engine, parameter, "weight").clone()
                with ema_weights(engine):
                    pass
                assert torch.equal(before, get_state(engine, parameter, "weight")), key
                results[f"{name} as {other}"] = {"losses": train(engine, SAVED, STEPS)}
                del engine
        if rank == 0:
            (folder / f"losses-{workers}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    rank, workers, port, folder, pretrained, clips = sys.argv[1:]
    main(int(rank), int(workers), int(port), Path(folder), pretrained, clips)
