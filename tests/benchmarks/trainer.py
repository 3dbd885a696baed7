"""Training speed against named baselines, measured in one run; written to TRAINER.md in this folder.

python -m tests.benchmarks.trainer [DATASET] [KEYS OF tcan train ...]

DATASET: output of `tcan preprocess` at the size of the keys (default: mini); without it, a dataset of rendered puppets.
Needs two otherwise idle cores and some minutes.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pipelines.config.parser import load_config
from pipelines.dataset import read_info
from pipelines.demo import render
from pipelines.train.clips import ClipStore
from pipelines.train.data import Sampler
from pipelines.train.model import batch_loss
from pipelines.train.task import pretrained_sources
from tcan.model import TCAN
from tcan.weights import load_pretrained
from tests.runs import Stage1, workers_of

STEPS, WARM_UP, CHECKPOINT_EVERY, ROUNDS = 24, 8, 12, 3


def bare(dataset: Path, keys: list[str]) -> float:
    """Seconds per step of stage 1 in a bare PyTorch loop with the module, the optimizer and the prefetched data of the trainer."""
    config = load_config(*keys)
    train, stage = config.train, config.train.stage1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pretrained = load_pretrained(**pretrained_sources(config))
    model = TCAN(
        pretrained.unet,
        pretrained.controlnet,
        pretrained.motion_adapter,
        pretrained.empty_prompt,
        train.lora_rank,
        train.lora_alpha,
    )
    model.set_stage(1)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, stage.lr, weight_decay=train.weight_decay, fused=True)
    sampler = Sampler(
        ClipStore(dataset), 1, seed=config.seed, batch_size=stage.batch_size, size=config.size,
        vae_scaling_factor=read_info(dataset)["vae_scaling_factor"], stick_width=train.stick_width, frames=train.clip_frames,
        drop_reference=train.drop_reference,
    )  # fmt: skip
    device, seconds = torch.device("cpu"), []
    with ThreadPoolExecutor(1) as ahead:
        upcoming = ahead.submit(sampler.worker_batches, 0, 0, 1, stage.micro_batch)
        for step in range(STEPS):
            began = time.perf_counter()
            batches = upcoming.result()
            upcoming = ahead.submit(sampler.worker_batches, step + 1, 0, 1, stage.micro_batch)
            for batch in batches:
                (batch_loss(model, pretrained, batch, device) / len(batches)).backward()
            torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


@torch.no_grad()
def encoding(keys: list[str]) -> float:
    """Seconds to encode the images of a step (reference and target of each sample), as a loop without latents has to."""
    config = load_config(*keys)
    torch.set_num_threads(1)
    vae = load_pretrained(**pretrained_sources(config)).vae
    images = torch.rand(2 * config.train.stage1.micro_batch, 3, config.size, config.size) * 2 - 1
    seconds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        vae.encode(images)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) * config.train.stage1.batch_size / config.train.stage1.micro_batch


def run_trainer(
    dataset: Path, keys: list[str], workers: int, kill: bool = False, cores: list[int] | None = None
) -> dict[str, float]:
    """Medians of the recorded metrics of a run of stage 1.

    Args:
        kill: kill a worker after the first checkpoint.
        cores: CPU affinity of the run, including Ray's own processes; None: all cores.
    """
    with tempfile.TemporaryDirectory() as folder:
        training = Stage1(dataset, Path(folder), keys)
        driver = training.start(workers)
        if cores:
            driver.cpu_affinity(cores)  # inherited by all processes that it starts
        while kill and driver.poll() is None:
            if (training.stage / "checkpoint_manager_snapshot.json").exists():
                killed = time.time()
                workers_of(driver)[0].kill()
                break
            time.sleep(0.05)
        training.finish(driver)
        names = ("step_seconds", "data_wait_seconds", "checkpoint_seconds")
        history = {name: training.history(name) for name in names}
    values = {
        name: [metric.value for metric in found if metric.step > WARM_UP] for name, found in history.items()
    }
    result = {name: statistics.median(found) for name, found in values.items()}
    result["data_wait"] = sum(values["data_wait_seconds"]) / sum(values["step_seconds"])
    if kill:
        after = [metric.timestamp / 1000 for metric in history["step_seconds"]]
        result["kill_seconds"] = min(stamp for stamp in after if stamp > killed + 1) - killed
    return result


def puppets(folder: Path) -> Path:
    """A dataset of a few dances. Created in a separate process, so that no Ray of this process runs during the timing."""
    render(folder / "videos", "dance", 0, 12, 32, load_config().size)
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "preprocess",
        str(folder / "videos"),
        str(folder / "dataset"),
    ]
    subprocess.run([*command, f"--tracking.folder={folder}/mlflow"], check=True)
    return folder / "dataset"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    given, keys = parser.parse_known_args()
    if given.bare:
        print(bare(given.dataset, keys))
        return
    keys += [
        f"--train.stage1.steps={STEPS}", f"--train.stage1.checkpoint_every={CHECKPOINT_EVERY}",
        "--train.stage1.sample_every=0", "--train.stage1.validate_every=0",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        compare(given.dataset or puppets(Path(folder)), keys)


def compare(dataset: Path, keys: list[str]) -> None:
    # Each in a separate process, in turn, so that noise affects all of them.
    baseline, one, one_core, two = [], [], [], []
    for _ in range(ROUNDS):
        command = [sys.executable, "-m", "tests.benchmarks.trainer", str(dataset), "--bare"]
        command += [*keys, "--train.workers=1"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        baseline.append(float(output.split()[-1]))
        one.append(run_trainer(dataset, keys, 1))
        one_core.append(run_trainer(dataset, keys, 1, cores=[0]))
        two.append(run_trainer(dataset, keys, 2))
    killed = run_trainer(dataset, keys, 2, kill=True)

    def median(runs: list[dict[str, float]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    step = median(one, "step_seconds")
    rows = [
        (
            "samples/s with one worker, relative to a bare PyTorch loop",
            statistics.median(baseline) / step,
            "",
        ),
        (
            "samples/s with two workers on two cores, relative to one worker on one core",
            median(one_core, "step_seconds") / median(two, "step_seconds"),
            "including Ray's own processes",
        ),
        (
            "the same, relative to one worker with the second core for Ray's own processes",
            step / median(two, "step_seconds"),
            "",
        ),
        ("data wait, fraction of the step time, two workers", median(two, "data_wait"), ""),
        (
            "samples/s from latents, relative to encoding in the loop",
            1 + encoding(keys) / step,
            "from separate timings",
        ),
        (
            "training pause per checkpoint, in steps, two workers",
            median(two, "checkpoint_seconds") / median(two, "step_seconds"),
            f"{median(two, 'checkpoint_seconds'):.2f} s",
        ),
        ("seconds from the kill of a worker to the next new step", killed["kill_seconds"], ""),
    ]
    lines = [
        f"# Training\n\n{platform.node()}: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, no GPU. "
        f"Stage 1, `{' '.join(keys)}`; median of {ROUNDS} runs each, in turn.\n",
        "| metric | value | details |",
        "|---|---|---|",
        *(f"| {what} | {value:.3g} | {note} |" for what, value, note in rows),
    ]
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "TRAINER.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
