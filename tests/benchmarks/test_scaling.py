"""The simulation behind infra/SCALING.md, where its answer is known."""

from dataclasses import replace

import numpy as np
import pytest

from tests.benchmarks.scaling import STEPS, Cluster, Data, Share, clip_reads, simulate

CLUSTER = Cluster(
    "", node_network=10e9, storage=np.inf, gpu_peak_flops=1e12, inside_node=100e9, one_reader=1e9
)
SHARE = Share(
    samples=2,
    flops=1e11,
    exchanged=10**9,
    clip_bytes=10**6,
    read_seconds=0.0,
    sample_seconds=0.0,
    reads=np.zeros((1, STEPS), np.int64),
)


def test_what_a_step_waits_for():
    """0.1 s of arithmetic; 1 GB through 16 GPUs' slowest link, 15/16 of it; loading when it takes longer than both."""
    one_node, two_nodes = (simulate(SHARE, CLUSTER, gpus) for gpus in (8, 16))
    assert one_node.step_seconds == pytest.approx(0.1 + 7 / 8 * 0.01)
    assert two_nodes.step_seconds == pytest.approx(0.1 + 15 / 16 * 0.1)
    assert two_nodes.samples_per_second == pytest.approx(32 / two_nodes.step_seconds)
    assert two_nodes.ideal == pytest.approx(320)

    reading = replace(SHARE, reads=np.full((1, STEPS), 400))  # 0.4 GB of one thread's 1 GB/s
    assert simulate(reading, CLUSTER, 16).step_seconds == pytest.approx(0.4)
    shared = simulate(reading, replace(CLUSTER, storage=4e9), 16)  # 6.4 GB of all readers' 4 GB/s
    assert shared.step_seconds == pytest.approx(1.6)
    assert shared.read_rate == pytest.approx(4e9)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_worker_reads_what_it_does_not_remember(stage):
    data = Data(videos=20, clips=4)
    remembered, forgotten = clip_reads(stage, 2, data, 80), clip_reads(stage, 2, data, 0)
    assert sum(next(remembered) for _ in range(500)) == 80  # each clip once
    assert 1 <= np.mean([next(forgotten) for _ in range(500)]) / 2 <= 3  # of a sample
