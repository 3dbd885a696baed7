"""The simulation of infra/SCALING.md, on cases with known results."""

from dataclasses import replace

import numpy as np
import pytest

from tests.benchmarks.scaling import (
    STEPS,
    Cluster,
    Data,
    StepLoad,
    frame_reads,
    preempted_seconds,
    simulate,
)

CLUSTER = Cluster(
    "", node_network=10e9, storage=np.inf, inside_node=100e9, one_reader=1e9, data_processes=1, backward=0.6
)
LOAD = StepLoad(
    samples=2,
    seconds=0.1,
    flops=1e11,
    gradients=10**9,
    frame_bytes=10**6,
    read_seconds=0.0,
    sample_seconds=0.0,
    reads=np.zeros((1, STEPS), np.int64),
)


def test_step_time_is_compute_plus_communication_or_loading():
    """0.1 s of compute, of which 0.06 s hide the exchange of the gradients, twice 1 GB. Then 1 GB of weights is sent."""
    one_node, two_nodes = (simulate(LOAD, CLUSTER, gpus) for gpus in (8, 16))
    assert one_node.step_seconds == pytest.approx(0.1 + 7 / 8 * 0.01)
    assert two_nodes.step_seconds == pytest.approx(0.1 + (15 / 16 * 0.2 - 0.06) + 15 / 16 * 0.1)
    assert two_nodes.samples_per_second == pytest.approx(32 / two_nodes.step_seconds)
    assert two_nodes.ideal == pytest.approx(320)

    reading = replace(LOAD, reads=np.full((1, STEPS), 400))  # 0.4 GB at 1 GB/s of one process
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


def test_preemption_costs_the_restart_and_without_notice_the_steps_since_the_checkpoint():
    """100 steps of 10 s, preempted after each 250 s: after 25 steps. Checkpoints take no time."""
    options = {"steps": 100, "step": 10.0, "checkpoint": 0.0, "restart": 30.0, "interval": 250.0}
    assert preempted_seconds(checkpoint_every=10, notice=True, **options) == 1000 + 3 * 30
    # 20 of 25 steps are saved each time: 4 restarts, then the last 20 steps.
    assert preempted_seconds(checkpoint_every=10, notice=False, **options) == 4 * (250 + 30) + 200
    assert preempted_seconds(checkpoint_every=10, notice=False, **options | {"interval": np.inf}) == 1000
    with pytest.raises(ValueError, match="no checkpoint in 250 s"):
        preempted_seconds(checkpoint_every=50, notice=False, **options)
