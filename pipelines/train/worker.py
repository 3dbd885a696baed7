"""The training function that Ray Train runs in every worker."""

import logging

import ray
import ray.train
import torch

from pipelines.train.loss_guard import disarm_watchdog, is_out_of_memory, out_of_memory
from pipelines.train.micro_batch import choose_micro_batch
from pipelines.train.task import Task
from pipelines.train.trainer import Trainer
from tcan.errors import UserError


def run_worker(settings: dict[str, Task]) -> None:
    """Trains from the last checkpoint, if any, to the end of the stage.

    Errors for the user that a worker finds are also reported to `Task.monitor`, from which the driver raises them.

    Raises:
        UserError: out of memory.
        RuntimeError: a frozen parameter has changed.
    """
    logging.getLogger().setLevel(logging.WARNING)  # otherwise Ray Train logs every report
    task = settings["task"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if ray.get(task.monitor.register.remote(rank, workers)):
        return
    is_auto = task.stage_config.micro_batch == "auto"
    task = choose_micro_batch(task, rank, workers, ray.get(task.monitor.micro_batch_limit.remote()))
    try:
        Trainer(task, rank, workers).run()
    except (RuntimeError, torch.OutOfMemoryError) as error:
        if is_auto and task.micro_batch > 1 and is_out_of_memory(error):
            # All workers restart from the last checkpoint, with the same samples in more accumulation steps.
            ray.get(task.monitor.limit_micro_batch.remote(task.micro_batch // 2))
            print(
                f"stage {task.stage}: out of memory; restarting with micro_batch <= {task.micro_batch // 2}",
                flush=True,
            )
            raise
        if reason := out_of_memory(error, task.config.train, task.stage_config, task.stage):
            ray.get(task.monitor.abort.remote(reason))  # a restart would end in the same way
            raise UserError(reason) from error
        raise
    finally:
        disarm_watchdog()
