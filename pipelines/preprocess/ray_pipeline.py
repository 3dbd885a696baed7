"""The Ray Data pipeline of preprocessing: decoding, then pose detection and VAE encoding."""

import functools
import logging
from collections.abc import Generator
from typing import Any

import ray
import ray.data
import torch

from pipelines.cluster import connect, is_local
from pipelines.config import Config, PreprocessConfig
from pipelines.preprocess.decode import decode
from pipelines.preprocess.models import PoseAndLatents
from pipelines.preprocess.quarantine import Quarantine, count_attempts
from pipelines.preprocess.sources import Source
from tcan.acceleration import is_compiled
from tcan.errors import UserError

# Small blocks let the models start while a video is still being decoded, and limit the data in flight. A square clip of 64
# frames is 3 MiB at 128 px, and 48 MiB (one block) at 512 px.
CLIPS_PER_GPU_ACTOR = (
    4  # at the same time: decoding of the poses on the CPU overlaps with the networks on the GPU
)
BLOCK_BYTES = 16 * 2**20
MAX_BLOCKS = 10_000  # one video per task, up to a number of tasks that Ray handles well
# These settings let glibc keep the memory that the networks free, in any thread. By default, activations (megabytes each)
# return to the kernel at every layer and are zeroed page by page when allocated again: 1/6 of a clip's time on a CPU.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}


def encoded_clips(pending: list[Source], config: Config) -> Generator[dict[str, Any], None, None]:
    """Yield rows of ENCODED_SCHEMA, unordered, as they become available.

    Ray restarts processes and nodes that die and repeats their work, without a limit on retries. `Quarantine` detects clips
    that kill the process of the models every time. Ray Data's own retry limits do not help: operators are fused only if
    their options are equal, and tasks have no option for actor retries. A block beyond its retries is dropped without
    naming its videos.
    """
    connect()
    num_cpus, num_gpus, num_actors = _resources(config.preprocess)
    resources = {
        "num_cpus": num_cpus,
        "runtime_env": {
            "env_vars": ALLOCATOR
        },  # equal for both operators: otherwise Ray Data does not fuse them
    }
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with ray.data.DataContext.current(context):
        items = [{"video_id": source.video_id, "source": source.path} for source in pending]
        clips = (
            ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS))
            .map_batches(
                _decoder(config),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.TaskPoolStrategy(),
                **resources,
            )
            .map_batches(
                Quarantine,
                fn_constructor_args=(_models(config, "cuda" if num_gpus else "cpu"), count_attempts()),
                batch_size=1,  # one clip; the models split it into batches of frames
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    min_size=1,
                    max_size=num_actors,
                    initial_size=min(num_actors, len(items)),
                    max_concurrent_calls_per_actor=CLIPS_PER_GPU_ACTOR if num_gpus else None,
                    enable_true_multi_threading=bool(num_gpus),
                ),
                num_gpus=num_gpus,
                **resources,
            )
        )
        for block in clips.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            yield from block.to_pylist()


def _resources(settings: PreprocessConfig) -> tuple[float, float, int]:
    """CPUs per operator process, GPUs per actor, and number of actors.

    With GPUs, the models are the bottleneck: by default, the number of actors is the number that fits on the GPUs. Decoding
    tasks use the remaining CPUs on all nodes, because one decoder is too slow for a GPU if videos are large.

    Without GPUs, there is by default one actor per CPU. Both operators then request the same resources, so Ray Data fuses them:
    each actor reads from its own decoder process, which works on the next clip meanwhile, and no frame enters the object store.

    Raises:
        UserError: `preprocess.device` is cuda, and neither has the cluster a GPU nor can it be asked for one.
    """
    cluster = ray.cluster_resources()
    cpus, gpus = cluster.get("CPU", 1.0), cluster.get("GPU", 0.0)
    if settings.device == "cuda" and not gpus:
        if is_local():
            raise UserError("preprocess.device = cuda: this machine has no GPU; use auto or cpu")
        if settings.actors == "auto":
            raise UserError(
                "preprocess.device = cuda: the cluster has no GPU yet; set preprocess.actors, for which it adds nodes"
            )
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and gpus > 0)
    num_gpus = settings.gpus_per_actor if on_gpu else 0.0
    if settings.actors != "auto" and not is_local():
        return 1.0, num_gpus, settings.actors
    fitting = max(1, int(gpus / num_gpus if on_gpu else cpus))
    num_actors = fitting if settings.actors == "auto" else min(settings.actors, fitting)
    # One CPU per actor (it feeds its GPU, or computes on the CPU) and per decoder (it uses one thread). If there are too few
    # CPUs for all actors and one decoder, each gets less: without a decoder the pipeline would not progress.
    num_cpus = min(1.0, cpus / (num_actors + 1)) if on_gpu else min(1.0, cpus)
    return num_cpus, num_gpus, num_actors


def _decoder(config: Config) -> functools.partial:
    settings = config.preprocess
    return functools.partial(
        decode,
        sizes=config.buckets,
        full_frame=settings.crop == "person",
        timeout=settings.decode_timeout,
        clip_frames=settings.clip_frames,
        min_clip_frames=settings.min_clip_frames,
        fps=settings.fps,
        cut_threshold=settings.cut_threshold,
        min_seconds=settings.min_seconds,
        max_seconds=settings.max_seconds,
    )


def _models(config: Config, device: str) -> functools.partial:
    settings = config.preprocess
    return functools.partial(
        PoseAndLatents,
        pretrained=config.pretrained,
        batch_frames=settings.batch_frames,
        device=device,
        hands=settings.hands,
        face=settings.face,
        precision=settings.precision,
        compiled=is_compiled(settings.compile, torch.device(device)),
    )
