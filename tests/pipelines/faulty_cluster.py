"""Preprocessing jobs on a local multi-node Ray cluster with injected faults.

    python -m tests.pipelines.faulty_cluster VIDEOS OUT CONFIGURATION...

Creates these datasets: OUT/uninterrupted, OUT/FAULT for each of FAULTS, and OUT/store from VIDEOS/long.mp4 only. A fault
is injected after a decoder has sent a clip and before it has finished the video.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster
from ray.data._internal.logical.optimizers import FuseOperators, get_physical_ruleset
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config.parser import load_config
from pipelines.preprocess.decode import DECODER
from pipelines.preprocess.job import preprocess

STORE = 80 * 2**20  # bytes, near the minimum that Ray accepts
NODE = {"num_cpus": 1, "object_store_memory": STORE}
CLIP_BYTES = 16 * 64 * 64 * 3


def busy_decoder() -> psutil.Process:
    """Wait for and return a decoder process of this cluster that has sent a clip of its current video.

    It is the child of one that waits for videos, to which Linux adds the counters of its finished children.
    """
    while True:
        for process in psutil.Process().children(recursive=True):
            try:
                parent = process.parent()
                is_child = parent is not None and str(DECODER) in parent.cmdline()
                if is_child and process.io_counters().write_chars > CLIP_BYTES:
                    return process
            except psutil.Error:  # the process has just exited
                continue
        time.sleep(0.005)


def kill_decoder(cluster: Cluster) -> None:
    busy_decoder().kill()


def kill_actor(cluster: Cluster) -> None:
    """Kill the actor that reads from the decoder. Without GPUs, this actor also runs the models."""
    decoder = busy_decoder().parent()
    actor = decoder and decoder.parent()
    assert actor is not None and "MapWorker" in " ".join(actor.cmdline()), actor
    actor.kill()


def kill_node(cluster: Cluster) -> None:
    """Kill all processes on the node of a busy decoder."""
    ancestors = {process.pid for process in busy_decoder().parents()}
    for node in cluster.worker_nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        if raylet.pid in ancestors:
            for process in [*raylet.children(recursive=True), raylet]:
                with suppress(psutil.NoSuchProcess):  # it exited together with the previous process
                    process.kill()
            cluster.remove_node(node, allow_graceful=False)
            return
    raise RuntimeError("decoder not found on any node of this cluster")


FAULTS: dict[str, Callable[[Cluster], None]] = {
    "decoder": kill_decoder,
    "actor": kill_actor,
    "node": kill_node,
}


@contextmanager
def inject_fault(cluster: Cluster, inject: Callable[[Cluster], None]) -> Iterator[None]:
    """Inject the fault while the block runs.

    Raises:
        RuntimeError: the block finished before the fault occurred, or the injection failed.
    """
    injected = threading.Event()

    def run() -> None:
        inject(cluster)
        injected.set()

    threading.Thread(target=run, daemon=True).start()
    yield
    if not injected.is_set():
        raise RuntimeError(f"{inject.__name__}: the job finished before the fault occurred")


class StoreFiller:
    """Actor of another job that fills the object store of its node except for `free` bytes.

    It holds a reference to the stored array, so that Ray cannot spill the array to disk.
    """

    def __init__(self, free: int) -> None:
        self.used = ray.get(ray.put(np.ones(STORE - free, np.uint8)))

    def wait(self) -> None:
        """Return once the store is filled."""


@contextmanager
def limited_store(free: int) -> Iterator[None]:
    """Limit the free object store of each worker node to `free` bytes while the block runs."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    fillers = [
        ray.remote(num_cpus=0)(StoreFiller)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(free)
        for node in nodes
    ]
    ray.get([filler.wait.remote() for filler in fillers])
    yield
    for filler in fillers:
        ray.kill(filler)


def main() -> None:
    videos, out, *options = sys.argv[1:]
    config = load_config(*options)
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    preprocess(videos, f"{out}/uninterrupted", config)
    for name, inject in FAULTS.items():
        if name == "node":
            cluster.add_node(**NODE)
        with inject_fault(cluster, inject):
            preprocess(videos, f"{out}/{name}", config)
    # Without GPUs, Ray fuses decoding and models into one operator. Disabling fusion sends the frames through the object
    # store, as with GPUs. The 2.25 MiB of this video exceed the free space.
    cluster.add_node(**NODE)
    get_physical_ruleset().remove(FuseOperators)
    with limited_store(free=3 * 2**19):
        preprocess(f"{videos}/long.mp4", f"{out}/store", config)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
