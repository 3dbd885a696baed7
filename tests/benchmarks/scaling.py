"""How training would scale at SD1.5 size, simulated from counted and measured parts; no GPU is needed, nor was one timed.

python -m tests.benchmarks.scaling    writes the tables of infra/SCALING.md, below its last heading

Counted, of the real modules without their memory, as `tcan memory` does: operations, weights and gradients of a step.
Measured here: bytes of a clip in a shard, seconds of a core to read one and to make a sample. Assumed: `Cluster`, `Data`.
"""

import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config import Config, load_config
from pipelines.dataset import NUM_JOINTS, clip_files
from pipelines.memory import networks
from pipelines.preprocess.shards import ShardWriter
from pipelines.storage import open_parquet
from pipelines.train.data import ClipStore, Sampler, stage1_pair
from tcan.memory import TrainingMemory, fake_tcan, training_memory

PAGE = Path(__file__).parents[2] / "infra" / "SCALING.md"
GPUS = (8, 64, 256)
STEPS = 300  # simulated of each, with the caches as full as they get
READERS = 8  # workers whose caches are simulated; larger clusters draw from theirs


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines."""

    name: str
    node_network: float
    """Bytes a second into and out of a node."""
    storage: float
    """Bytes a second of the storage, all readers together."""
    gpu_peak_flops: float = 0.4 * 312e12
    """FLOP/s that a GPU reaches on this model: two fifths of an A100's in bf16."""
    gpus_per_node: int = 8
    inside_node: float = 200e9
    """Bytes a second from GPU to GPU of a node."""
    one_reader: float = 200e6
    """Bytes a second that one thread gets from the storage, its waiting included."""


@dataclass(frozen=True)
class Data:
    """What is assumed of the dataset."""

    videos: int = 10_000
    clips: int = 4
    """Of a video."""
    clip_frames: int = 64


@dataclass(frozen=True)
class Plan:
    """A way to train a stage."""

    name: str
    stage: int
    samples: int
    """Of a GPU at a step: `micro_batch`."""
    data: Data


PLANS = (
    Plan("stage 1 as the preset is", 1, 2, Data()),
    Plan("stage 1 with micro_batch 8, clips of 16 frames", 1, 8, Data(clips=16, clip_frames=16)),
    Plan("stage 2 as the preset is", 2, 1, Data()),
)
CLUSTERS = (
    Cluster("100 Gb/s a node, storage 5 GB/s", 12.5e9, 5e9),
    Cluster("400 Gb/s a node, storage 20 GB/s", 50e9, 20e9),
)


@dataclass(frozen=True)
class Share:
    """What one GPU's share of an optimizer step takes."""

    samples: int
    flops: float
    exchanged: int
    """Bytes that DeepSpeed's ZeRO 2 sends through each GPU: the gradients all-reduced, which is twice their bytes (its
    default, `use_multi_rank_bucket_allreduce`), then the new weights gathered. Nothing overlaps with it by default."""
    clip_bytes: int
    read_seconds: float
    """Of one core, to read and decode a clip."""
    sample_seconds: float
    """Of one core, to make all samples from clips in memory."""
    reads: np.ndarray
    """Clips that a worker reads from the storage at a step, `[READERS, STEPS]`."""

    @property
    def bytes_read(self) -> float:
        """A step, on average."""
        return float(self.reads.mean()) * self.clip_bytes

    @property
    def core_seconds(self) -> float:
        """A step, on average."""
        return self.sample_seconds + float(self.reads.mean()) * self.read_seconds


def counted(config: Config, number: int) -> tuple[TrainingMemory, int]:
    """Memory, and operations of forward and backward, of one sample."""
    tcan = fake_tcan(lambda: networks(config.pretrained, config.train.lora_rank), torch.bfloat16)
    with FlopCounterMode(display=False) as operations:
        memory = training_memory(tcan, number, 1, config.train.frames, config.size, config.size)
    return memory, operations.get_total_flops()


# --- measured ----------------------------------------------------------------------------------------------------------


def write_clips(folder: Path, size: int, data: Data, videos: int = 2) -> int:
    """A dataset of random latents and poses, as `tcan preprocess` writes it; returns the bytes a clip takes."""
    rng = np.random.default_rng(0)
    side = size // 8
    (folder / "clips").mkdir()
    writer = ShardWriter(str(folder), {}, 1 << 40, 1e9)
    for video in range(videos):
        rows = []
        for clip in range(data.clips):
            latents = rng.standard_normal((2, data.clip_frames, 4, side, side)).astype("<f2")
            keypoints = rng.uniform(0, size, (data.clip_frames, NUM_JOINTS, 3)).astype("<f4")
            start = clip * data.clip_frames
            rows.append(
                {
                    "clip_id": f"{video}-{start}", "video_id": f"{video:016x}", "source": f"{video}.mp4", "split": "train",
                    "start": start, "num_frames": data.clip_frames, "fps": 30.0, "height": size, "width": size,
                    "crop": [0.0, 0.0, size, size], "latent_mean": latents[0].tobytes(),
                    "latent_logvar": latents[1].tobytes(), "keypoints": keypoints.tobytes(),
                    "people_per_frame": [1] * data.clip_frames, "people": keypoints.tobytes(),
                    "main_person": [0] * data.clip_frames, "reference_latent_mean": latents[0, 0].tobytes(),
                    "reference_keypoints": keypoints[0].tobytes(),
                }
            )  # fmt: skip
        writer.add_video(rows)
    writer.commit()
    return sum(Path(file).stat().st_size for file in clip_files(folder)) // (videos * data.clips)


def core_seconds(run: Callable[[int], object], times: int = 20) -> float:
    """Of one run on this machine's core, the median."""
    seconds = []
    for turn in range(times):
        began = time.process_time()
        run(turn)
        seconds.append(time.process_time() - began)
    return float(np.median(seconds))


def measured(config: Config, stage: int, data: Data) -> tuple[int, float, float]:
    """Bytes of a clip in a shard; seconds to read and decode one; seconds to make a sample of clips in memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip_bytes = write_clips(folder, config.size, data)
        with open_parquet(clip_files(folder)[0]) as file:
            clips = file.metadata.row_group(0).num_rows  # that a read brings
        stores = [ClipStore(folder) for _ in range(20)]
        read_seconds = core_seconds(lambda turn: stores[turn].frames(stores[turn].videos[0], [0])) / clips
        sampler = Sampler(
            stores[0], stage, seed=0, batch_size=1, size=config.size, vae_scaling_factor=0.18215,
            stick_width=config.train.stick_width, frames=config.train.frames, drop_reference=0.1,
        )  # fmt: skip
        for step in range(50):  # until all clips are in memory
            sampler.sample(step, 0)
        return clip_bytes, read_seconds, core_seconds(lambda turn: sampler.sample(turn, 0))


# --- simulated ---------------------------------------------------------------------------------------------------------


def clips_of_sample(number: int, data: Data, frames: int, rng: np.random.Generator) -> set[int]:
    """Numbers of the video's clips that a sample touches."""
    length = data.clips * data.clip_frames
    if number == 1:
        at = stage1_pair(length, rng)
    else:
        first = int(rng.integers(length - frames + 1))
        at = (0, first, first + frames - 1)  # the first frame is the reference
    return {position // data.clip_frames for position in at}


def clip_reads(
    number: int, samples: int, data: Data, cached_clips: int, frames: int = 16, seed: int = 0
) -> Iterator[int]:
    """Step after step, how many clips a worker must read that are not among the latest it used."""
    rng = np.random.default_rng(seed)
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    while True:
        reads = 0
        for _ in range(samples):
            video = int(rng.integers(data.videos))
            for clip in clips_of_sample(number, data, frames, rng):
                reads += (video, clip) not in cache
                cache[video, clip] = None
                cache.move_to_end((video, clip))
                if len(cache) > cached_clips:
                    cache.popitem(last=False)
        yield reads


def settled_reads(number: int, samples: int, data: Data, cached_clips: int) -> np.ndarray:
    """`clip_reads` of some workers, [READERS, STEPS], after their caches have filled."""
    found = np.empty((READERS, STEPS), np.int64)
    for reader in range(READERS):
        reads = clip_reads(number, samples, data, cached_clips, seed=reader)
        for _ in range(2 * min(cached_clips, data.videos * data.clips) // samples):
            next(reads)
        found[reader] = [next(reads) for _ in range(STEPS)]
    return found


@dataclass(frozen=True)
class Scaled:
    """One stage on so many GPUs."""

    samples_per_second: float
    ideal: float
    """The same if the GPUs never waited."""
    step_seconds: float
    exchange_seconds: float
    """Of a step, gradients and weights: nothing else goes on meanwhile."""
    loading_seconds: float
    """Of a step's data, on the slowest worker; beside the step before."""
    read_rate: float
    """Bytes a second from the storage."""


def exchange_seconds(exchanged: int, cluster: Cluster, gpus: int) -> float:
    """A ring through all GPUs is as fast as its slowest link, a node's network where there is more than one node."""
    link = cluster.inside_node if gpus <= cluster.gpus_per_node else cluster.node_network
    return exchanged * (gpus - 1) / gpus / link


def simulate(share: Share, cluster: Cluster, gpus: int) -> Scaled:
    """All workers load the next step's data while they take this step, and wait for the slowest."""
    rng = np.random.default_rng(0)
    rate = min(cluster.one_reader, cluster.storage / gpus)
    compute, exchange = share.flops / cluster.gpu_peak_flops, exchange_seconds(share.exchanged, cluster, gpus)
    total = loading = read = 0.0
    for _ in range(STEPS):
        reads = rng.choice(share.reads.ravel(), gpus)
        slowest = reads.max() * (share.clip_bytes / rate + share.read_seconds) + share.sample_seconds
        total += max(compute + exchange, slowest)
        loading += slowest
        read += reads.sum() * share.clip_bytes
    samples = gpus * share.samples
    return Scaled(
        samples * STEPS / total, samples / compute, total / STEPS, exchange, loading / STEPS, read / total
    )


# --- the page ----------------------------------------------------------------------------------------------------------


def parts(shares: dict[str, Share], memory: dict[str, TrainingMemory]) -> list[str]:
    return [
        "\n| a GPU's share of a step | samples | TFLOP | exchanged | read from storage | time of a core | checkpoint |\n"
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {it.samples} | {it.flops / 1e12:.1f} | {it.exchanged / 1e9:.2f} GB | {it.bytes_read / 1e6:.1f} MB "
            f"| {1e3 * it.core_seconds:.0f} ms | {12 * memory[name].trained_parameters / 1e9:.1f} GB |"
            for name, it in shares.items()
        ),
    ]


def table(name: str, share: Share, cluster: Cluster) -> list[str]:
    lines = [
        f"\n**{name.capitalize()}; {cluster.name}**\n\n| GPUs | samples a step | samples/s | of GPUs that never wait | step "
        "| exchange | loading | from storage | slowed most by |\n|---|---|---|---|---|---|---|---|---|"
    ]
    for gpus in GPUS:
        it = simulate(share, cluster, gpus)
        reached = it.samples_per_second / it.ideal
        waits = (
            "loading"
            if it.loading_seconds > share.flops / cluster.gpu_peak_flops + it.exchange_seconds
            else "exchange"
        )
        lines.append(
            f"| {gpus} | {gpus * share.samples} | {it.samples_per_second:.0f} | {reached:.0%} | {it.step_seconds * 1e3:.0f} ms "
            f"| {it.exchange_seconds * 1e3:.0f} ms | {it.loading_seconds * 1e3:.0f} ms | {it.read_rate / 1e9:.2f} GB/s "
            f"| {waits if reached < 0.95 else '-'} |"
        )
    return lines


def needed(shares: dict[str, Share], gpu_peak_flops: float) -> list[str]:
    """What keeps the GPUs busy: exchange in a tenth of the arithmetic's time, data in time on average."""
    lines = [
        "\n**Needed for the exchange to cost a tenth of the arithmetic's time, and for data to come as fast as it is used**\n",
        f"| | network of a node | {' | '.join(f'storage for {gpus} GPUs' for gpus in GPUS)} |",
        f"|---|---|{'---|' * len(GPUS)}",
    ]
    for name, it in shares.items():
        compute = it.flops / gpu_peak_flops
        storage = "".join(f" {gpus * it.bytes_read / compute / 1e9:.1f} GB/s |" for gpus in GPUS)
        lines.append(f"| {name} | {it.exchanged / (0.1 * compute) * 8 / 1e9:.0f} Gb/s |{storage}")
    return lines


def main() -> None:
    torch.set_num_threads(1)
    config = load_config("--config", "sd15")
    of_stage = {number: counted(config, number) for number in (1, 2)}
    shares, memory = {}, {}
    for plan in PLANS:
        memory[plan.name], flops = of_stage[plan.stage]
        clip_bytes, read_seconds, sample_seconds = measured(config, plan.stage, plan.data)
        cached = (config.train.cache_mb << 20) // clip_bytes
        shares[plan.name] = Share(
            plan.samples,
            plan.samples * flops,
            3 * memory[plan.name].trained,
            clip_bytes,
            read_seconds,
            plan.samples * sample_seconds,
            settled_reads(plan.stage, plan.samples, plan.data, cached),
        )
    clip = shares[PLANS[0].name]
    dataset = PLANS[0].data.videos * PLANS[0].data.clips * clip.clip_bytes
    lines = [
        *parts(shares, memory),
        f"\nA clip of {PLANS[0].data.clip_frames} frames takes {clip.clip_bytes / 1e6:.2f} MB of a shard and "
        f"{clip.read_seconds * 1e3:.0f} ms of a core to read; the dataset {dataset / 1e9:.0f} GB, of which a worker's memory "
        f"holds {config.train.cache_mb / 1024:.0f} GiB.",
        *(line for name, it in shares.items() for cluster in CLUSTERS for line in table(name, it, cluster)),
        *needed(shares, CLUSTERS[0].gpu_peak_flops),
    ]
    heading = "## Tables\n"
    page = PAGE.read_text()
    text = "\n".join(lines) + "\n"
    PAGE.write_text(page[: page.index(heading) + len(heading)] + text)
    print(text)


if __name__ == "__main__":
    main()
