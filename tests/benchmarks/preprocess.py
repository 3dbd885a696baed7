"""Preprocessing against its named alternatives, side by side; written to PREPROCESS.md beside this file.

python -m tests.benchmarks.preprocess [VIDEOS]

- OpenPose after its network, against controlnet_aux's own code on the same maps;
- the whole job's frames/s over those of its models alone, fed from memory by as many processes as it has actors;
- the same of a Ray Data pool of these models that reads no video and writes nothing: what Ray itself takes;
- the whole job against the script a person would write: decord, controlnet_aux per frame, VAE per frame;
- a second run on the finished dataset over the first run's time;
- the whole job's peak of memory with a tenth of the videos, with all, and with an hour of 4K among the tenth.

VIDEOS: how many, of 64 frames each; 500 unless given. Each is drawn in memory: a disc on a plain ground, which nobody's
pose is found in, so that limbs and people are measured by the first figure alone.
"""

import importlib
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec, module_from_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import decord
import numpy as np
import psutil
import pyarrow as pa
import ray
import torch

from pipelines.config import PretrainedConfig, load_config
from pipelines.preprocess.job import ALLOCATOR, preprocess
from pipelines.preprocess.models import PoseAndLatents, load_models
from pipelines.preprocess.schemas import DECODED_SCHEMA
from pipelines.preprocess.sources import list_sources
from tcan.pose import OpenPose
from tests.pipelines.faults import disc_frames, write_video
from tests.tcan.pose.bodies import body
from tests.tcan.pose.test_openpose import Maps, maps_of

ROUNDS = 5
SIZE, FRAMES, CLIP = 128, 64, 64
MODEL_CLIPS = 100  # that the models alone are timed on
HOUR_FPS = 1  # of the hour of 4K: 3,600 frames
Row = tuple[str, float, str]


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak_memory(work: Callable[[], Any]) -> int:
    """Bytes of the machine's main memory that are in use at most while work runs, above what is before; looked at twice a
    second. To ask every process for its own share would take time from what is timed."""

    def used() -> int:
        memory = psutil.virtual_memory()
        return memory.total - memory.available

    ended, before, held = threading.Event(), used(), []

    def look() -> None:
        while not ended.wait(0.5):
            held.append(used())

    looker = threading.Thread(target=look)
    looker.start()
    try:
        work()
    finally:
        ended.set()
        looker.join()
    return max(held) - before


def controlnet_aux_body(network: torch.nn.Module) -> Any:
    """controlnet_aux's `Body` around a network; without its package's own import, which takes 10 s."""
    sys.modules.setdefault("controlnet_aux", module_from_spec(find_spec("controlnet_aux")))  # type: ignore[arg-type]
    module = importlib.import_module("controlnet_aux.open_pose.body")
    detector = module.Body.__new__(module.Body)
    detector.model = network
    return detector


@torch.inference_mode()
def openpose(people: int, batch: int = 16, side: int = 512) -> Row:
    """Median over rounds of controlnet_aux's time for a frame / ours for a frame of a batch."""
    bodies = [body(side * (i + 1) / (people + 1), 0.25 * side, 0.5 * side) for i in range(people)]
    maps = maps_of(bodies, side, side)
    network = Maps(*(m.expand(batch, -1, -1, -1).contiguous() for m in maps))
    ours, theirs = OpenPose(network), controlnet_aux_body(Maps(*maps))
    image = np.zeros((side, side, 3), np.uint8)
    ratios = []
    for _ in range(ROUNDS + 1):
        alternative = seconds(lambda: theirs(image))
        ratios.append(
            alternative * batch / seconds(lambda: ours.decode(*network.maps, (184, 184), (side, side)))
        )
    what = f"OpenPose after its network, {people} people at {side} px, against controlnet_aux's"
    return what, statistics.median(ratios[1:]), "times as fast"


class FedModels:
    """The job's models; whatever they are given, they take the same clip from memory."""

    def __init__(self, pretrained: PretrainedConfig) -> None:
        self.models = PoseAndLatents(pretrained, 16, "cpu")
        frames = np.stack(disc_frames(CLIP, SIZE, SIZE)).tobytes()
        row = {
            "video_id": "x",
            "source": "x",
            "start": 0,
            "num_frames": CLIP,
            "fps": 25.0,
            "height": SIZE,
            "width": SIZE,
            "frames": frames,
        }
        self.clip = pa.Table.from_pylist([row], DECODED_SCHEMA)

    def __call__(self, _: pa.Table | None = None) -> pa.Table:
        return self.models(self.clip)


def models_alone(pretrained: PretrainedConfig, clips: int) -> float:
    """Frames a second."""
    models = FedModels(pretrained)
    models()  # warms up
    return clips * CLIP / seconds(lambda: [models() for _ in range(clips)])


def models_in_ray_data(pretrained: PretrainedConfig, clips: int, actors: int) -> float:
    """Frames a second, with the start, as the job's are."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    pool = ray.data.from_items(list(range(clips)), override_num_blocks=clips).map_batches(
        FedModels,
        fn_constructor_args=(pretrained,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        runtime_env={"env_vars": ALLOCATOR},
    )
    return clips * CLIP / seconds(lambda: list(pool.iter_batches(batch_size=None, batch_format="pyarrow")))


@torch.inference_mode()
def script(videos: list[str], pretrained: PretrainedConfig) -> None:
    """What a person would write."""
    detector, vae = load_models(pretrained, "cpu")
    pose = controlnet_aux_body(detector.network)  # type: ignore[attr-defined]
    for path in videos:
        for image in decord.VideoReader(path):
            frame = image.asnumpy()
            pose(frame[..., ::-1].copy())
            pixels = torch.from_numpy(frame).movedim(-1, 0)[None].float() / 127.5 - 1
            vae.encode(pixels).latent_dist.mean.numpy()


def job(num_videos: int) -> list[Row]:
    cpus = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        few, videos, hour = (f"{folder}/{name}" for name in ("few", "videos", "hour"))
        for i in range(num_videos):
            file = write_video(Path(videos) / f"{i}.mp4", FRAMES, SIZE, SIZE, seed=i)
            for other in (few, hour)[: 2 * (i < num_videos // 10)]:
                os.makedirs(other, exist_ok=True)
                os.link(file, f"{other}/{i}.mp4")
        write_video(
            Path(hour) / "hour.mp4", 3600 * HOUR_FPS, 72, 128, fps=HOUR_FPS, enlarged=30, preset="ultrafast"
        )
        config = load_config("--preprocess.min_person_fraction=0", f"--tracking.folder={folder}/mlflow")
        times, peaks, alone = {}, {}, []
        cluster = {"num_cpus": cpus, "num_gpus": 0, "include_dashboard": False, "log_to_driver": False}

        def models() -> None:  # before and after the job, since a machine has faster and slower minutes
            with (
                patch.dict(os.environ, ALLOCATOR),  # as the job's
                ProcessPoolExecutor(cpus, get_context("spawn")) as pool,
            ):
                alone.append(sum(pool.map(models_alone, [config.pretrained] * cpus, [MODEL_CLIPS] * cpus)))

        for source in (few, videos, hour):
            if source == videos:
                models()
            ray.init(address="local", **cluster)
            began = time.perf_counter()
            peaks[source] = peak_memory(lambda: preprocess(source, f"{source}-out", config))  # noqa: B023
            times[source] = time.perf_counter() - began
            if source == videos:
                again = seconds(lambda: preprocess(videos, f"{videos}-out", config))
            ray.shutdown()
            if source == videos:
                models()
                ray.init(address="local", **cluster)
                in_ray_data = models_in_ray_data(config.pretrained, num_videos, cpus)
                ray.shutdown()
        rate = num_videos * FRAMES / times[videos]
        some = list_sources(videos)[: max(1, num_videos // 50)]
        by_hand = len(some) * FRAMES / seconds(lambda: script(some, config.pretrained))
    return [
        (
            "the job's frames/s over those of its models alone",
            rate / max(alone),
            f"{num_videos} videos, {cpus} CPUs; the models' faster run of two, the slower being {min(alone) / max(alone):.2f} of it",
        ),
        (
            "a Ray Data pool of the models that reads and writes nothing over the models alone",
            in_ray_data / max(alone),
            f"{num_videos} clips; of its frames/s the job has {rate / in_ray_data:.2f}",
        ),
        (
            "the job against a loop of decord, controlnet_aux and VAE per frame",
            rate / by_hand,
            "times as fast",
        ),
        ("a second run on the finished dataset over the first", again / times[videos], "time / time"),
        (
            f"peak memory with {num_videos} videos over that with {num_videos // 10}",
            peaks[videos] / peaks[few],
            f"{peaks[few] / 2**30:.2f} GiB with {num_videos // 10}",
        ),
        (
            f"peak memory with an hour of 4K among {num_videos // 10} videos over that without",
            peaks[hour] / peaks[few],
            f"{3600 * HOUR_FPS} frames",
        ),
    ]


def main() -> None:
    torch.set_num_threads(1)
    rows = [openpose(1), openpose(3)]
    rows += job(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
    text = "\n".join(
        [
            f"# Preprocessing\n\n{platform.node()}: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            "no GPU used. `mini`.\n",
            "| what | | |",
            "|---|---|---|",
            *(f"| {what} | {value:.3g} | {unit} |" for what, value, unit in rows),
        ]
    )
    (Path(__file__).parent / "PREPROCESS.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
