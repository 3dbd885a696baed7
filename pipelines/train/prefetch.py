"""Batches that are created ahead of the training loop, by a thread or by processes."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import torch
from torch.utils.data import DataLoader, Dataset

from pipelines.config import TrainConfig
from pipelines.train.data import Batch, Sampler
from tcan.errors import UserError


class StepBatches(Dataset[list[Batch]]):
    """The micro-batches of one training worker, by the number of the step.

    sampler: of the global batch.
    """

    def __init__(self, sampler: Sampler, rank: int, workers: int, micro_batch: int):
        self._sampler, self._rank, self._workers, self._micro_batch = sampler, rank, workers, micro_batch

    def __getitem__(self, step: int) -> list[Batch]:
        return self._sampler.worker_batches(step, self._rank, self._workers, self._micro_batch)


def data_processes(config: TrainConfig) -> int:
    """Resolve `train.data_processes`; "auto" leaves one CPU to the training worker that feeds the GPU."""
    if config.data_processes != "auto":
        return config.data_processes
    return max(1, config.cpus_per_worker - 1) if config.gpus_per_worker else 0


@contextmanager
def prefetched(
    source: Dataset[list[Batch]], steps: Sequence[int], processes: int, pinned: bool
) -> Iterator[Iterator[list[Batch]]]:
    """Context with an iterator over the batches of these steps, in their order.

    Args:
        processes: number of processes, each of which creates complete steps, two in advance. They do not compete with the training
            loop for Python's interpreter lock, as a thread does. 0: a thread, one step in advance.
        pinned: copy the batches to pinned memory, from which a GPU copies them without making the host wait.
    """
    if processes:
        with closing(_by_processes(source, steps, processes, pinned)) as batches:
            yield batches
        return
    executor = ThreadPoolExecutor(1, "data")
    try:
        yield _by_thread(source, steps, executor, pinned)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _by_thread(
    source: Dataset[list[Batch]], steps: Sequence[int], executor: ThreadPoolExecutor, pinned: bool
) -> Iterator[list[Batch]]:
    def create(step: int) -> list[Batch]:
        return [batch.pin_memory() if pinned else batch for batch in source[step]]

    upcoming = [executor.submit(create, step) for step in steps[:1]]
    for position in range(len(steps)):
        batches = upcoming.pop().result()
        upcoming += [executor.submit(create, step) for step in steps[position + 1 : position + 2]]
        yield batches


def _by_processes(
    source: Dataset[list[Batch]], steps: Sequence[int], processes: int, pinned: bool
) -> Generator[list[Batch], None, None]:
    loader = DataLoader(
        _WithErrors(source),
        batch_size=None,  # an item is the batches of a step
        sampler=steps,
        num_workers=processes,
        pin_memory=pinned,
        # A fork would copy locks that Ray's and Arrow's threads hold.
        multiprocessing_context="forkserver",
        # Seeds of the processes, which they do not use. From the global generator, they would change its numbers.
        generator=torch.Generator(),
    )
    for batches in loader:
        if isinstance(batches, UserError):
            raise batches
        yield batches


class _WithErrors(Dataset[list[Batch] | UserError]):
    """Returns a UserError as an item: `DataLoader` would put the traceback of its process into the message."""

    def __init__(self, source: Dataset[list[Batch]]):
        self._source = source

    def __getitem__(self, step: int) -> list[Batch] | UserError:
        try:
            return self._source[step]
        except UserError as error:
            return error
