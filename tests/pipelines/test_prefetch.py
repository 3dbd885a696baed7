"""Batches created ahead by a thread or by processes: those of the sampler, in order."""

from dataclasses import fields

import psutil
import pytest
import torch

from pipelines.config.parser import load_config
from pipelines.train.data import Batch
from pipelines.train.prefetch import StepBatches, data_processes, prefetched
from tcan.errors import UserError
from tests.training import SIZE, make_sampler, write_dataset

STEPS = range(3, 8)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Batch))


def grandchildren() -> set[psutil.Process]:
    return {process for child in psutil.Process().children() for process in child.children()}


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_prefetched_batches_are_those_of_the_sampler_until_a_file_is_missing(tmp_path, processes):
    before = grandchildren()
    dataset = write_dataset(tmp_path / "dataset", {"a": [(0, 40)], "b": [(0, 30)]}, SIZE, SIZE)
    source = StepBatches(make_sampler(dataset, 1), rank=1, workers=2, micro_batch=1)
    expected = [make_sampler(dataset, 1).worker_batches(step, 1, 2, 1) for step in STEPS]
    random_state = torch.get_rng_state()
    with prefetched(source, STEPS, processes, pinned=False) as upcoming:
        found = [next(upcoming) for _ in STEPS]
        assert next(upcoming, None) is None
    for batches, others in zip(found, expected, strict=True):
        assert len(batches) == 2 and all(map(equal, batches, others))
    assert torch.equal(torch.get_rng_state(), random_state)

    for file in (dataset / "clips").glob("*.parquet"):
        file.unlink()
    unread = StepBatches(make_sampler(dataset, 1), rank=0, workers=1, micro_batch=2)
    with prefetched(unread, STEPS, processes, pinned=False) as upcoming, pytest.raises(UserError) as error:
        next(upcoming)
    assert "\n" not in str(error.value) and ".parquet" in str(error.value)
    # The server that forks the processes is a child and stays. It notices the end of a process a little later than `DataLoader`.
    assert not psutil.wait_procs(grandchildren() - before, timeout=60)[1]


def test_gpu_workers_create_batches_in_processes_by_default():
    assert data_processes(load_config().train) == 0
    assert data_processes(load_config("--config=sd15").train) == 3
    assert data_processes(load_config("--train.gpus_per_worker=1").train) == 1
    assert data_processes(load_config("--config=sd15", "--train.data_processes=0").train) == 0
