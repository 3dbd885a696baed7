"""`micro_batch: auto`: the largest micro-batch that fits into the memory of every worker by the estimate of `tcan memory`.

The global batch and the samples of a step do not depend on it: fewer samples per pass mean more accumulation steps.
"""

import dataclasses

import psutil
import torch
import torch.distributed as dist

from pipelines.config import Config
from pipelines.memory import GIB, fits, training_estimate
from pipelines.train.task import Task
from tcan.crop import Size

CPU_SHARE = 0.5
"""Fraction of the free main memory for the workers of a machine without GPUs; data and object store need memory too."""


def choose_micro_batch(task: Task, rank: int, workers: int, limit: int | None) -> Task:
    """The task with a number in place of "auto". Called by all workers, after the process group has started.

    limit: upper bound, after a step ran out of memory.
    """
    if task.stage_config.micro_batch != "auto":
        return task
    gibibytes = torch.tensor(
        _device_memory(task.config) / GIB, device="cuda" if _has_gpu(task.config) else "cpu"
    )
    dist.all_reduce(gibibytes, dist.ReduceOp.MIN)
    chosen, size = largest_micro_batch(
        task.config, task.stage, task.largest_size, workers, float(gibibytes), limit
    )
    if rank == 0:
        print(
            f"stage {task.stage}: micro_batch {chosen}, estimated {size / GIB:.1f} of {float(gibibytes):.1f} GiB per worker",
            flush=True,
        )
    return dataclasses.replace(task, config=with_micro_batch(task.config, task.stage, chosen))


def largest_micro_batch(
    config: Config, stage: int, size: Size, workers: int, gibibytes: float, limit: int | None = None
) -> tuple[int, int]:
    """The largest divisor of a worker's share of the batch that fits, at least 1, and the estimated bytes.

    size: of the training images.
    """
    train = config.train
    settings = train.stage1 if stage == 1 else train.stage2
    share = settings.batch_size // workers
    estimate = training_estimate(config, stage, size, train.gradient_checkpointing)
    sizes = {
        batch: estimate.per_device(train.zero_stage, workers, batch)["sum"]
        for batch in range(min(share, limit or share), 0, -1)
        if share % batch == 0
    }
    return next(((batch, size) for batch, size in sizes.items() if fits(size, gibibytes)), (1, sizes[1]))


def with_micro_batch(config: Config, stage: int, micro_batch: int) -> Config:
    """A copy of the configuration with this micro-batch in a stage."""
    train = config.train
    if stage == 1:
        train = dataclasses.replace(train, stage1=dataclasses.replace(train.stage1, micro_batch=micro_batch))
    else:
        train = dataclasses.replace(train, stage2=dataclasses.replace(train.stage2, micro_batch=micro_batch))
    return dataclasses.replace(config, train=train)


def _has_gpu(config: Config) -> bool:
    return config.train.gpus_per_worker > 0


def _device_memory(config: Config) -> float:
    if _has_gpu(config):
        return torch.cuda.mem_get_info()[0]
    return CPU_SHARE * psutil.virtual_memory().available / config.train.workers
