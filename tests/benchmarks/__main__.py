"""`make bench`: ratios to named alternatives, measured side by side in one run; written to RESULTS.md beside this file."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tcan.model import TCAN
from tcan.temperature import temperature_map
from tcan.weights import load_bases

BASES = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")
FRAMES = 16
ROUNDS = 9


def ratio(alternative: Callable[[], Tensor], ours: Callable[[], Tensor]) -> float:
    """Median over rounds of the alternative's time / ours; both run in turn, so that noise of the machine meets both."""
    ratios = []
    for _ in range(ROUNDS + 1):
        times = []
        for run in (alternative, ours):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[1:])  # the first warms up


@torch.no_grad()
def main() -> None:
    bases = load_bases(**dict.fromkeys(BASES, "mini"))
    tcan = TCAN(bases.unet, bases.controlnet, bases.motion_adapter, bases.empty_prompt)
    size = bases.unet.config.sample_size
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, FRAMES, bases.unet.config.in_channels, size, size, generator=generator)
    pose = torch.zeros(1, FRAMES, 3, 8 * size, 8 * size)
    pose[..., 40:100, 60:66] = 1.0  # a body upright
    timestep, reference = torch.tensor([500]), noisy[:, 0]
    residuals, features = tcan.pose_residuals(noisy, timestep, pose), tcan.appearance(reference, timestep)
    tau = temperature_map(pose[0])

    def guided() -> Tensor:
        shared = tcan.pose_residuals(noisy, timestep, pose)
        both = (noisy.expand(2, -1, -1, -1, -1), timestep.expand(2))
        return tcan.denoise(*both, shared, features, [False, True])

    def two_passes() -> Tensor:
        with_reference = tcan(noisy, timestep, pose, reference)
        alone = tcan.denoise(noisy, timestep, tcan.pose_residuals(noisy, timestep, pose), None)
        return torch.cat([alone, with_reference])

    difference = (guided() - two_passes()).abs().max().item()
    assert difference < 1e-3, f"the two ways differ by {difference}"
    rows = [
        (
            "denoising a window with the temperature map, against without",
            1 / ratio(lambda: tcan.denoise(noisy, timestep, residuals, features), lambda: tcan.denoise(
                noisy, timestep, residuals, features, temperature=tau)),
            "time with / time without",
        ),
        (
            "a guided step, against two full passes (ControlNet twice, appearance UNet every window)",
            ratio(two_passes, guided),
            f"times as fast; largest difference {difference:.0e}",
        ),
    ]  # fmt: skip
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, no GPU"
    lines = [
        f"# make bench\n\n{platform.node()}: {where}. `mini`, {FRAMES} frames, median of {ROUNDS} rounds.\n"
    ]
    lines += ["| what | ratio | |", "|---|---|---|"]
    lines += [f"| {what} | {value:.2f} | {unit} |" for what, value, unit in rows]
    lines.append("\nNot measured yet: training steps, preprocessing, SD1.5 size, anything on a GPU.")
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
