"""The simulation of infra/SCALING.md, on cases with known results."""

from dataclasses import replace

import numpy as np
import pytest

from tests.benchmarks.scaling import STEPS, Cluster, Data, StepLoad, frame_reads, simulate

CLUSTER = Cluster(
    "", node_network=10e9, storage=np.inf, gpu_peak_flops=1e12, inside_node=100e9, one_reader=1e9
)
LOAD = StepLoad(
    samples=2,
    flops=1e11,
    communicated=10**9,
    frame_bytes=10**6,
    read_seconds=0.0,
    sample_seconds=0.0,
    reads=np.zeros((1, STEPS), np.int64),
)


def test_step_time_is_compute_plus_communication_or_loading():
    """0.1 s of compute, and 15/16 of 1 GB through the slowest link of 16 GPUs; loading dominates when it is slower."""
    one_node, two_nodes = (simulate(LOAD, CLUSTER, gpus) for gpus in (8, 16))
    assert one_node.step_seconds == pytest.approx(0.1 + 7 / 8 * 0.01)
    assert two_nodes.step_seconds == pytest.approx(0.1 + 15 / 16 * 0.1)
    assert two_nodes.samples_per_second == pytest.approx(32 / two_nodes.step_seconds)
    assert two_nodes.ideal == pytest.approx(320)

    reading = replace(LOAD, reads=np.full((1, STEPS), 400))  # 0.4 GB at 1 GB/s of one thread
    assert simulate(reading, CLUSTER, 16).step_seconds == pytest.approx(0.4)
    shared = simulate(reading, replace(CLUSTER, storage=4e9), 16)  # 6.4 GB at 4 GB/s of the storage
    assert shared.step_seconds == pytest.approx(1.6)
    assert shared.read_rate == pytest.approx(4e9)


@pytest.mark.parametrize("stage", [1, 2])
def test_worker_reads_only_frames_that_are_not_cached(stage):
    data = Data(videos=2, clips=2, clip_frames=64)
    cached, uncached = frame_reads(stage, 2, data, 256), frame_reads(stage, 2, data, 0)
    assert sum(next(cached) for _ in range(1000)) == 256  # each frame is read once
    reads = np.mean([next(uncached) for _ in range(500)]) / 2  # per sample
    assert reads == 2 if stage == 1 else 16 <= reads <= 17
