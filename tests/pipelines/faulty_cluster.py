"""A cluster of several nodes on this machine, and jobs on it while its parts die.

    python -m tests.pipelines.faulty_cluster VIDEOS OUT CONFIGURATION...

makes the datasets OUT/calm, OUT/FAULT for each of FAULTS, and OUT/store of VIDEOS/long.mp4 alone. A fault strikes once a
decoder has handed on a clip and has more to come: in the middle of a video.
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

from pipelines.config_parser import load_config
from pipelines.preprocess.decode import DECODER
from pipelines.preprocess.job import preprocess

STORE = 80 * 2**20  # about the least that Ray takes
NODE = {"num_cpus": 1, "object_store_memory": STORE}
A_CLIP = 16 * 64 * 64 * 3  # bytes


def decoder_at_work() -> psutil.Process:
    """A process that decodes a video for this one's cluster and has sent a clip, once there is one."""
    while True:
        for process in psutil.Process().children(recursive=True):
            try:
                if str(DECODER) in process.cmdline() and process.io_counters().write_chars > A_CLIP:
                    return process
            except psutil.Error:  # it has just ended
                continue
        time.sleep(0.005)


def kill_decoder(cluster: Cluster) -> None:
    decoder_at_work().kill()


def kill_actor(cluster: Cluster) -> None:
    """The process that reads from the decoder: without GPUs that is where the models are."""
    decoder = decoder_at_work().parent()
    actor = decoder and decoder.parent()
    assert actor is not None and "MapWorker" in " ".join(actor.cmdline()), actor
    actor.kill()


def kill_node(cluster: Cluster) -> None:
    """Everything on the node where a decoder is."""
    ancestors = {process.pid for process in decoder_at_work().parents()}
    for node in cluster.worker_nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        if raylet.pid in ancestors:
            for process in [*raylet.children(recursive=True), raylet]:
                with suppress(psutil.NoSuchProcess):  # it ended with the one before
                    process.kill()
            cluster.remove_node(node, allow_graceful=False)
            return
    raise RuntimeError("the decoder is on no node of this cluster")


FAULTS: dict[str, Callable[[Cluster], None]] = {
    "decoder": kill_decoder,
    "actor": kill_actor,
    "node": kill_node,
}


@contextmanager
def fault(cluster: Cluster, strike: Callable[[Cluster], None]) -> Iterator[None]:
    """Strikes while the block runs.

    Raises:
        RuntimeError: the block was over before, or the fault failed.
    """
    struck = threading.Event()

    def run() -> None:
        strike(cluster)
        struck.set()

    threading.Thread(target=run, daemon=True).start()
    yield
    if not struck.is_set():
        raise RuntimeError(f"{strike.__name__}: nothing happened before the job was over")


class Neighbour:
    """Another job's actor, which fills its node's object store but for `free` bytes, and uses what it put there, so that
    Ray cannot move it to disk."""

    def __init__(self, free: int) -> None:
        self.used = ray.get(ray.put(np.ones(STORE - free, np.uint8)))

    def wait(self) -> None:
        """Until it is there."""


@contextmanager
def crowded(free: int) -> Iterator[None]:
    """Leaves `free` bytes of each worker node's object store while the block runs."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    neighbours = [
        ray.remote(num_cpus=0)(Neighbour)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(free)
        for node in nodes
    ]
    ray.get([neighbour.wait.remote() for neighbour in neighbours])
    yield
    for neighbour in neighbours:
        ray.kill(neighbour)


def main() -> None:
    videos, out, *options = sys.argv[1:]
    config = load_config(*options)
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    preprocess(videos, f"{out}/calm", config)
    for name, strike in FAULTS.items():
        if name == "node":
            cluster.add_node(**NODE)
        with fault(cluster, strike):
            preprocess(videos, f"{out}/{name}", config)
    # Without GPUs decoder and models are fused. As where there are some, the frames now cross the object store: 2.25 MiB
    # of this video, which do not fit.
    cluster.add_node(**NODE)
    get_physical_ruleset().remove(FuseOperators)
    with crowded(free=3 * 2**19):
        preprocess(f"{videos}/long.mp4", f"{out}/store", config)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
