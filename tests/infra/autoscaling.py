"""Jobs on a Ray cluster that begins without any CPU or GPU. Ray's own autoscaler adds nodes, which are processes.

    python -m tests.infra.autoscaling FOLDER

It runs in namespaces of its own (see `test_autoscaling.py`), whose end ends all nodes. The GPU of a simulated node has no CUDA, so only
the request for it is tested.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ray

from pipelines import cli
from pipelines.dataset import read_info
from pipelines.puppets.world import sample_clip, write_clip
from tcan.video import read_video

ROOT = Path(__file__).parents[2]
NODE = {"object_store_memory": 100 * 2**20}
TYPES = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "cpu": {"resources": {"CPU": 1, **NODE}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    "gpu": {"resources": {"CPU": 2, "GPU": 1, **NODE}, "node_config": {}, "min_workers": 0, "max_workers": 1},
}
GPU_SECONDS = 120


def start_head(folder: Path) -> None:
    file = folder / "autoscaler.json"
    provider = {"type": "fake_multinode", "disable_node_updaters": True, "disable_launch_config_check": True}
    settings = {
        "cluster_name": "simulated",
        "provider": provider,
        "head_node_type": "ray.head.default",
        "max_workers": 3,
    }
    settings |= {"available_node_types": TYPES, "idle_timeout_minutes": 10, "upscaling_speed": 1, "auth": {}}
    lists = (
        "initialization_commands",
        "setup_commands",
        "cluster_synced_files",
        "rsync_exclude",
        "rsync_filter",
    )
    lists += tuple(
        f"{node}_{kind}_commands" for node in ("head", "worker") for kind in ("setup", "start_ray")
    )
    settings |= {"file_mounts": {}, "file_mounts_sync_continuously": False} | {key: [] for key in lists}
    file.write_text(json.dumps(settings))
    subprocess.run(
        [f"{sys.prefix}/bin/ray", "start", "--head", "--port=6379", "--num-cpus=0", f"--autoscaling-config={file}"],
        env=os.environ | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def nodes(resource: str) -> int:
    return sum(node["Alive"] and node["Resources"].get(resource, 0) > 0 for node in ray.nodes())


def run(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0, arguments


def preprocess_on_new_nodes(folder: Path) -> None:
    (folder / "videos").mkdir()
    for seed in range(4):
        write_clip(sample_clip("dance", seed, 48), folder / "videos" / str(seed))
    run("preprocess", folder / "videos", folder / "dataset", "--preprocess.actors=2")
    assert read_info(str(folder / "dataset"))["counts"]["videos"] == 4
    print("preprocess: 4 videos on", nodes("CPU"), "nodes")


def animate_on_new_nodes(folder: Path) -> None:
    names = ["0.mp4", "1.mp4"]
    with (folder / "pairs.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "driving", "out"])
        rows.writerows(
            [ROOT / "examples/dancer.png", folder / "videos" / name, folder / name] for name in names
        )
    run("animate", "--pairs", folder / "pairs.csv", "--animate.workers=2", "--animate.steps=1")
    assert all(len(read_video(folder / name)[0]) == 48 for name in names)
    assert nodes("CPU") == 2
    print("animate: 2 pairs on", nodes("CPU"), "nodes")


def request_gpu(folder: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "preprocess", folder / "videos", folder / "gpu"]
    job = subprocess.Popen(
        [*command, "--preprocess.device=cuda", "--preprocess.actors=1"], start_new_session=True
    )
    end = time.monotonic() + GPU_SECONDS
    while not nodes("GPU") and time.monotonic() < end and job.poll() is None:
        time.sleep(1)
    os.killpg(job.pid, signal.SIGKILL)
    assert nodes("GPU") == 1
    print("preprocess: a GPU node was added")


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["RAY_AUTH_MODE"] = "disabled"
    start_head(folder)
    os.environ["RAY_ADDRESS"] = "127.0.0.1:6379"
    os.chdir(folder)
    ray.init(log_to_driver=False, logging_level="error")
    assert not nodes("CPU") and not nodes("GPU")
    preprocess_on_new_nodes(folder)
    animate_on_new_nodes(folder)
    request_gpu(folder)


if __name__ == "__main__":
    main()
