"""Estimate how jobs scale at SD1.5 size, by a simulation with step times of one H100 and with counted and measured costs.

python -m tests.benchmarks.scaling    writes the tables of infra/SCALING.md, below its last heading

Measured on one H100: `H100`. Counted on modules of the real size without storage, like `tcan memory`: operations, weights and
gradients of a step. Measured on this machine: bytes read per sample, seconds of one core to read a frame and to create a sample,
seconds of a restart (`tests.benchmarks.restart`). Assumed: `Cluster`, `Data`, `Spot`.
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

from pipelines.config import Config
from pipelines.config.parser import load_config
from pipelines.dataset import NUM_JOINTS, clip_files
from pipelines.dataset_index import write_index
from pipelines.memory import networks
from pipelines.preprocess.shards import ShardWriter
from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler, stage1_pair
from tcan.memory import TrainingMemory, fake_tcan, training_memory

PAGE = Path(__file__).parents[2] / "infra" / "SCALING.md"
GPUS = (8, 64, 256)
STEPS = 300  # simulated steps per case, with full caches
READERS = 8  # workers with simulated caches; larger clusters sample from them


@dataclass(frozen=True)
class Cluster:
    """Assumed properties of the machines."""

    name: str
    node_network: float
    """Network bandwidth of a node, in each direction, in bytes/s."""
    storage: float
    """Storage bandwidth for all readers together, in bytes/s."""
    gpus_per_node: int = 8
    inside_node: float = 200e9
    """Bandwidth between the GPUs of a node, in bytes/s."""
    one_reader: float = 200e6
    """Storage bandwidth of one data process, latency included, in bytes/s."""
    data_processes: int = 3
    """Processes per GPU that create batches, as in the preset."""
    backward: float = 2 / 3
    """Share of the compute time that is the backward pass, during which gradients are exchanged."""


@dataclass(frozen=True)
class Data:
    """Assumed properties of the dataset."""

    videos: int = 10_000
    clips: int = 4
    """Clips per video."""
    clip_frames: int = 64


@dataclass(frozen=True)
class Plan:
    """A stage with its batch size and dataset."""

    name: str
    stage: int
    samples: int
    """Samples per GPU and step: `micro_batch`."""
    data: Data


PLANS = (
    Plan("stage 1, 2 images per GPU", 1, 2, Data()),
    Plan("stage 1, 16 images per GPU", 1, 16, Data()),
    Plan("stage 2, 1 clip per GPU", 2, 1, Data()),
)
H100 = {(1, 2): 0.38, (1, 16): 0.36, (2, 1): 0.42}
"""Seconds of a training step on one H100 by stage and samples: bf16, without compilation, random weights."""
H100_MATMUL_FLOPS = 750e12
"""FLOP/s of large bf16 matrix products on that GPU."""
RESTART_SECONDS = 40.0
"""Seconds from the loss of a worker to the end of the first new step, apart from lost steps; `tests.benchmarks.restart`."""
H100_PREPROCESS_FRAMES = 35
"""Frames/s of preprocessing at 512 x 512 on that GPU, while another training shared it."""
CLUSTERS = (
    Cluster("100 Gb/s per node, storage 5 GB/s", 12.5e9, 5e9),
    Cluster("400 Gb/s per node, storage 20 GB/s", 50e9, 20e9),
)


@dataclass(frozen=True)
class StepLoad:
    """Cost of one optimizer step on one GPU."""

    samples: int
    seconds: float
    """Of the computation."""
    flops: float
    gradients: int
    """Bytes of the gradients. DeepSpeed ZeRO 2 sends them twice through each GPU, during the backward pass: an all-reduce (its
    default, `use_multi_rank_bucket_allreduce`). After the step it sends the updated weights, which have the same size."""
    frame_bytes: int
    read_seconds: float
    """CPU seconds to read a frame."""
    sample_seconds: float
    """CPU seconds to create all samples of a step from cached frames."""
    reads: np.ndarray
    """Frames that a worker reads from the storage in each step, `[READERS, STEPS]`."""

    @property
    def bytes_read(self) -> float:
        """Mean bytes read per step."""
        return float(self.reads.mean()) * self.frame_bytes

    @property
    def core_seconds(self) -> float:
        """Mean CPU seconds per step."""
        return self.sample_seconds + float(self.reads.mean()) * self.read_seconds


def count_costs(config: Config, number: int) -> tuple[TrainingMemory, int]:
    """Memory and operations (forward and backward) of one sample."""
    tcan = fake_tcan(lambda: networks(config.pretrained, config.train.lora_rank), torch.bfloat16)
    with FlopCounterMode(display=False) as operations:
        memory = training_memory(tcan, number, 1, config.train.clip_frames, config.size, config.size)
    return memory, operations.get_total_flops()


# --- measured ----------------------------------------------------------------------------------------------------------


def write_clips(folder: Path, size: int, data: Data, videos: int = 2) -> int:
    """Write a dataset of random latents and poses like `tcan preprocess`; return the bytes of a frame in a shard."""
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
    write_index(str(folder))
    frames = videos * data.clips * data.clip_frames
    return sum(Path(file).stat().st_size for file in clip_files(folder)) // frames


def core_seconds(run: Callable[[int], object], times: int = 20) -> float:
    """Median CPU seconds of one run."""
    seconds = []
    for repeat in range(times):
        began = time.process_time()
        run(repeat)
        seconds.append(time.process_time() - began)
    return float(np.median(seconds))


def measure_costs(config: Config, stage: int, data: Data) -> tuple[int, float, float]:
    """Bytes of a frame in a shard; CPU seconds to read a frame; CPU seconds to create a sample from cached frames."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frame_bytes = write_clips(folder, config.size, data)
        store = ClipStore(folder)
        read_seconds = core_seconds(lambda i: store.frames(store.videos[0], [i]))
        sampler = Sampler(
            store, stage, seed=0, batch_size=1, size=config.size, vae_scaling_factor=0.18215,
            stick_width=config.train.stick_width, frames=config.train.clip_frames, drop_reference=0.1,
        )  # fmt: skip
        for step in range(500):  # until most frames are cached
            sampler.sample(step, 0)
        return frame_bytes, read_seconds, core_seconds(lambda step: sampler.sample(step, 0))


# --- simulated ---------------------------------------------------------------------------------------------------------


def frames_of_sample(number: int, data: Data, frames: int, rng: np.random.Generator) -> set[int]:
    """Positions of the frames that a sample reads."""
    length = data.clips * data.clip_frames
    if number == 1:
        return set(stage1_pair(length, rng))
    first = int(rng.integers(length - frames + 1))
    return {0, *range(first, first + frames)}  # frame 0 is the reference


def frame_reads(
    number: int, samples: int, data: Data, cached_frames: int, frames: int = 16, seed: int = 0
) -> Iterator[int]:
    """Yield, for each step, the number of frames that a worker reads because its LRU cache does not contain them."""
    rng = np.random.default_rng(seed)
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    while True:
        reads = 0
        for _ in range(samples):
            video = int(rng.integers(data.videos))
            for frame in frames_of_sample(number, data, frames, rng):
                reads += (video, frame) not in cache
                cache[video, frame] = None
                cache.move_to_end((video, frame))
                if len(cache) > cached_frames:
                    cache.popitem(last=False)
        yield reads


def steady_state_reads(number: int, samples: int, data: Data, cached_frames: int) -> np.ndarray:
    """`frame_reads` of `READERS` workers after their caches are full, `[READERS, STEPS]`."""
    found = np.empty((READERS, STEPS), np.int64)
    for reader in range(READERS):
        reads = frame_reads(number, samples, data, cached_frames, seed=reader)
        for _ in range(2 * min(cached_frames, data.videos * data.clips * data.clip_frames) // samples):
            next(reads)
        found[reader] = [next(reads) for _ in range(STEPS)]
    return found


@dataclass(frozen=True)
class Scaled:
    """Result of the simulation of one stage on a number of GPUs."""

    samples_per_second: float
    ideal: float
    """Samples/s if the GPUs never waited."""
    step_seconds: float
    communication_seconds: float
    """Seconds per step to exchange gradients and weights; nothing overlaps with it."""
    loading_seconds: float
    """Seconds to load the data of a step on the slowest worker; overlaps with the previous step."""
    read_rate: float
    """Bytes/s read from the storage."""


def communication_seconds(load: StepLoad, cluster: Cluster, gpus: int) -> float:
    """Seconds per step in which the GPUs wait for a ring exchange that does not overlap with the backward pass.

    The slowest link of the ring is the network of a node if there is more than one node.
    """
    link = cluster.inside_node if gpus <= cluster.gpus_per_node else cluster.node_network
    once = load.gradients * (gpus - 1) / gpus / link
    return max(0.0, 2 * once - cluster.backward * load.seconds) + once


def simulate(load: StepLoad, cluster: Cluster, gpus: int) -> Scaled:
    """Simulate `STEPS` steps. Every worker loads the data of the next steps during a step; all wait for the slowest."""
    rng = np.random.default_rng(0)
    rate = min(cluster.one_reader * cluster.data_processes, cluster.storage / gpus)
    communication = communication_seconds(load, cluster, gpus)
    total = loading = read = 0.0
    for _ in range(STEPS):
        reads = rng.choice(load.reads.ravel(), gpus)
        core_seconds = reads.max() * load.read_seconds + load.sample_seconds
        slowest = reads.max() * load.frame_bytes / rate + core_seconds / cluster.data_processes
        total += max(load.seconds + communication, slowest)
        loading += slowest
        read += reads.sum() * load.frame_bytes
    samples = gpus * load.samples
    return Scaled(
        samples * STEPS / total,
        samples / load.seconds,
        total / STEPS,
        communication,
        loading / STEPS,
        read / total,
    )


# --- preemptions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spot:
    """GPUs of which a node is preempted at a fixed interval. A new one is assumed to start at once."""

    gpus: int = 64
    interval: float = 600.0
    """Seconds between preemptions."""
    videos: int = 100_000
    frames: int = 256
    """Per video."""
    clips_in_flight: int = 4
    """Per GPU in preprocessing, of 64 frames each: the work that a preempted node loses."""


def preempted_seconds(
    steps: int,
    step: float,
    checkpoint_every: int,
    checkpoint: float,
    restart: float,
    interval: float,
    notice: bool,
) -> float:
    """Seconds of a training whose workers all restart after each preemption.

    Args:
        step, checkpoint: seconds of a step and of saving a checkpoint.
        restart: seconds until the first step after a preemption.
        interval: seconds between preemptions, from the start of one run to its end.
        notice: a preemption is announced early enough for a checkpoint; otherwise the steps since the last one are lost.

    Raises:
        ValueError: no checkpoint can be saved between two preemptions.
    """
    done = 0
    total = 0.0
    while True:
        run, first = 0.0, done
        saved = done
        while run < interval and done < steps:
            run += step
            done += 1
            if done % checkpoint_every == 0:
                run += checkpoint
                saved = done if run <= interval else saved
        if done == steps and run <= interval:
            return total + run
        if notice:
            saved, run = done, run + checkpoint
        if saved == first:
            raise ValueError(
                f"no checkpoint in {interval:.0f} s; lower checkpoint_every = {checkpoint_every}"
            )
        done = saved
        total += max(run, interval) + restart


# --- the page ----------------------------------------------------------------------------------------------------------


def load_table(loads: dict[str, StepLoad], memory: dict[str, TrainingMemory]) -> list[str]:
    return [
        "\n| per GPU and step | samples | TFLOP | H100 | MFU | communicated | read from storage | CPU time | checkpoint |\n"
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {it.samples} | {it.flops / 1e12:.1f} | {it.seconds * 1e3:.0f} ms "
            f"| {it.flops / it.seconds / H100_MATMUL_FLOPS:.0%} | {3 * it.gradients / 1e9:.2f} GB | {it.bytes_read / 1e6:.2f} MB "
            f"| {1e3 * it.core_seconds:.0f} ms | {12 * memory[name].trained_parameters / 1e9:.1f} GB |"
            for name, it in loads.items()
        ),
    ]


def simulation_table(name: str, load: StepLoad, cluster: Cluster) -> list[str]:
    lines = [
        f"\n**{name[0].upper()}{name[1:]}; {cluster.name}**\n\n| GPUs | samples per step | samples/s | of ideal | step "
        "| communication | loading | from storage | bottleneck |\n|---|---|---|---|---|---|---|---|---|"
    ]
    for gpus in GPUS:
        it = simulate(load, cluster, gpus)
        reached = it.samples_per_second / it.ideal
        waits = "loading" if it.loading_seconds > load.seconds + it.communication_seconds else "communication"
        lines.append(
            f"| {gpus} | {gpus * load.samples} | {it.samples_per_second:.0f} | {reached:.0%} | {it.step_seconds * 1e3:.0f} ms "
            f"| {it.communication_seconds * 1e3:.0f} ms | {it.loading_seconds * 1e3:.0f} ms | {it.read_rate / 1e9:.2f} GB/s "
            f"| {waits if reached < 0.95 else '-'} |"
        )
    return lines


def preemption_table(
    config: Config, load: dict[int, StepLoad], memory: dict[int, TrainingMemory]
) -> list[str]:
    """GPU-hours of both stages for the preset's number of samples, and of preprocessing."""
    spot, cluster = Spot(), CLUSTERS[1]
    lines = [
        f"\n**{spot.videos:,} videos of {spot.frames} frames on {spot.gpus} H100, {cluster.name}; a node is preempted every "
        f"{spot.interval / 60:.0f} minutes**\n",
        "| job | work | GPU-hours | preempted, with notice | preempted, without |",
        "|---|---|---|---|---|",
    ]
    seconds = spot.videos * spot.frames / H100_PREPROCESS_FRAMES / spot.gpus
    lost = cluster.gpus_per_node * (spot.clips_in_flight * 64 / H100_PREPROCESS_FRAMES + RESTART_SECONDS)
    hours = [spot.gpus * seconds / 3600, (spot.gpus * seconds + seconds / spot.interval * lost) / 3600]
    lines.append(
        f"| preprocess | {spot.videos * spot.frames / 1e6:.1f} M frames | {hours[0]:.0f} | {hours[1]:.0f} | {hours[1]:.0f} |"
    )
    for stage, it in load.items():
        settings = config.train.stage1 if stage == 1 else config.train.stage2
        samples = settings.steps * settings.batch_size
        steps = -(-samples // (spot.gpus * it.samples))
        every = max(1, settings.checkpoint_every * steps // settings.steps)
        step = simulate(it, cluster, spot.gpus).step_seconds
        checkpoint = 12 * memory[stage].trained_parameters / cluster.storage
        costs = [
            preempted_seconds(steps, step, every, checkpoint, RESTART_SECONDS, interval, notice)
            for interval, notice in ((np.inf, True), (spot.interval, True), (spot.interval, False))
        ]
        found = " | ".join(f"{spot.gpus * cost / 3600:.1f}" for cost in costs)
        lines.append(
            f"| stage {stage}, {it.samples} per GPU | {steps} steps of {spot.gpus * it.samples}, a checkpoint every {every} "
            f"| {found} |"
        )
    return lines


def main() -> None:
    torch.set_num_threads(1)
    config = load_config("--config", "sd15")
    of_stage = {number: count_costs(config, number) for number in (1, 2)}
    loads, memory = {}, {}
    for plan in PLANS:
        memory[plan.name], flops = of_stage[plan.stage]
        frame_bytes, read_seconds, sample_seconds = measure_costs(config, plan.stage, plan.data)
        cached = (config.train.clip_cache_mb << 20) // frame_bytes
        loads[plan.name] = StepLoad(
            plan.samples,
            H100[plan.stage, plan.samples],
            plan.samples * flops,
            memory[plan.name].trained,
            frame_bytes,
            read_seconds,
            plan.samples * sample_seconds,
            steady_state_reads(plan.stage, plan.samples, plan.data, cached),
        )
    frame, data = loads[PLANS[0].name], PLANS[0].data
    dataset = data.videos * data.clips * data.clip_frames * frame.frame_bytes
    chosen = {plan.stage: loads[plan.name] for plan in PLANS[1:]}
    lines = [
        *load_table(loads, memory),
        f"\nA frame is {frame.frame_bytes / 1e3:.0f} kB in a shard; reading it needs {frame.read_seconds * 1e3:.1f} ms of CPU "
        f"time. The dataset is {dataset / 1e9:.0f} GB; a worker caches up to "
        f"{config.train.clip_cache_mb / 1024:.0f} GiB.",
        *(
            line
            for name, it in loads.items()
            for cluster in CLUSTERS
            for line in simulation_table(name, it, cluster)
        ),
        *preemption_table(config, chosen, {stage: costs for stage, (costs, _) in of_stage.items()}),
    ]
    heading = "## Tables\n"
    page = PAGE.read_text()
    text = "\n".join(lines) + "\n"
    PAGE.write_text(page[: page.index(heading) + len(heading)] + text)
    print(text)


if __name__ == "__main__":
    main()
