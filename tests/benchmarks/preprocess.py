"""Preprocessing against named baselines, measured side by side; written to PREPROCESS.md in this folder.

python -m tests.benchmarks.preprocess [VIDEOS]

- OpenPose decoding (without the network), against the code of controlnet_aux on the same maps;
- frames/s of the job, relative to its models only, fed from memory by as many processes as the job has actors;
- the same for a Ray Data pool of these models without input and output: the overhead of Ray;
- the job, against a simple script: decord, controlnet_aux per frame, VAE per frame;
- a second run on the finished dataset, relative to the time of the first run;
- peak memory of the job with 10 % of the videos, with all videos, and with one hour of 4K video among the 10 %.

VIDEOS: number of videos of 64 frames each; default 500. Each shows a disc on a uniform background, in which no pose is
detected, so only the first figure includes the assembly of limbs and people.
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

from pipelines.config import PretrainedConfig
from pipelines.config.parser import load_config
from pipelines.preprocess.job import preprocess
from pipelines.preprocess.models import PoseAndLatents, load_models
from pipelines.preprocess.ray_pipeline import ALLOCATOR
from pipelines.preprocess.schemas import DECODED_SCHEMA
from pipelines.preprocess.sources import list_sources
from tcan.pose import OpenPose
from tests.pipelines.faults import disc_frames, write_video
from tests.tcan.pose.bodies import body
from tests.tcan.pose.test_openpose import Maps, maps_of

ROUNDS = 5
SIZE, FRAMES, CLIP = 128, 64, 64
MODEL_CLIPS = 100  # for the timing of the models only
HOUR_FPS = 1  # of the 4K video of one hour: 3,600 frames
Row = tuple[str, float, str]


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak_memory(work: Callable[[], Any]) -> int:
    """Peak host memory of the machine while `work` runs, relative to before, in bytes; sampled twice per second. Querying
    each process would slow down the job."""

    def used() -> int:
        memory = psutil.virtual_memory()
        return memory.total - memory.available

    ended, before, samples = threading.Event(), used(), []

    def sample() -> None:
        while not ended.wait(0.5):
            samples.append(used())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        work()
    finally:
        ended.set()
        thread.join()
    return max(samples) - before


def controlnet_aux_body(network: torch.nn.Module) -> Any:
    """`Body` of controlnet_aux around a network, without importing the package, which takes 10 s."""
    sys.modules.setdefault("controlnet_aux", module_from_spec(find_spec("controlnet_aux")))  # type: ignore[arg-type]
    module = importlib.import_module("controlnet_aux.open_pose.body")
    detector = module.Body.__new__(module.Body)
    detector.model = network
    return detector


@torch.inference_mode()
def openpose(people: int, batch: int = 16, side: int = 512) -> Row:
    """Median over rounds of the time per frame of controlnet_aux / ours in a batch."""
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
    what = f"OpenPose decoding, {people} people at {side} px: speedup over controlnet_aux"
    return what, statistics.median(ratios[1:]), "without the network"


class FedModels:
    """The models of the job, applied to one clip in memory whatever the input."""

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
    """Frames/s of the models in one process."""
    models = FedModels(pretrained)
    models()  # warm-up
    return clips * CLIP / seconds(lambda: [models() for _ in range(clips)])


def models_in_ray_data(pretrained: PretrainedConfig, clips: int, actors: int) -> float:
    """Frames/s of a Ray Data pool, startup included, as for the job."""
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
    """The simple script: one frame at a time."""
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
            Path(hour) / "hour.mp4", 3600 * HOUR_FPS, 72, 128, fps=HOUR_FPS, upscale=30, preset="ultrafast"
        )
        config = load_config("--preprocess.min_person_fraction=0", f"--tracking.folder={folder}/mlflow")
        times, peaks, alone = {}, {}, []
        cluster = {"num_cpus": cpus, "num_gpus": 0, "include_dashboard": False, "log_to_driver": False}

        def models() -> None:  # before and after the job, because the speed of a machine varies
            with (
                patch.dict(os.environ, ALLOCATOR),  # as in the job
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
            "job: frames/s relative to its models only",
            rate / max(alone),
            f"{num_videos} videos, {cpus} CPUs; the faster of two runs of the models; slower / faster = {min(alone) / max(alone):.2f}",
        ),
        (
            "Ray Data actor pool without input and output: frames/s relative to its models only",
            in_ray_data / max(alone),
            f"{num_videos} clips; the job reaches {rate / in_ray_data:.2f} of its frames/s",
        ),
        (
            "job: speedup over a loop of decord, controlnet_aux and VAE per frame",
            rate / by_hand,
            "",
        ),
        ("second run on the finished dataset: time relative to the first", again / times[videos], ""),
        (
            f"peak memory with {num_videos} videos relative to {num_videos // 10}",
            peaks[videos] / peaks[few],
            f"{peaks[few] / 2**30:.2f} GiB with {num_videos // 10}",
        ),
        (
            f"peak memory with one hour of 4K video among {num_videos // 10} videos relative to without",
            peaks[hour] / peaks[few],
            f"video of {3600 * HOUR_FPS} frames",
        ),
    ]


def main() -> None:
    torch.set_num_threads(1)
    rows = [openpose(1), openpose(3)]
    rows += job(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
    text = "\n".join(
        [
            f"# Preprocessing\n\n{platform.node()}: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            "no GPU. `mini`.\n",
            "| metric | value | details |",
            "|---|---|---|",
            *(f"| {what} | {value:.3g} | {unit} |" for what, value, unit in rows),
        ]
    )
    (Path(__file__).parent / "PREPROCESS.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
