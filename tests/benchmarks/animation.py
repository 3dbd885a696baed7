"""Animation at mini size: cost of the temperature map, and a complete clip against the baseline."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from tcan.model import TCAN
from tcan.pipeline import TCANPipeline
from tcan.temperature import temperature_map
from tcan.weights import PretrainedModels
from tests.benchmarks import baseline
from tests.benchmarks.timing import Row, ratio, side_by_side

WINDOW, OVERLAP = 16, 4
GUIDANCE = 2.5
TOLERANCE = 1e-3  # of pixels in [0, 1] and of predicted noise


def trained_like(pretrained: PretrainedModels) -> TCAN:
    """TCAN with random values in the layers that are initialized to zero, so that every part affects the result."""
    torch.manual_seed(0)
    tcan = TCAN(pretrained.unet, pretrained.controlnet, pretrained.motion_adapter, pretrained.empty_prompt)
    for name, parameter in tcan.named_parameters():
        if "lora_B" in name or (
            name.startswith("controlnet") and ".motion_modules." in name and "proj_out" in name
        ):
            nn.init.normal_(parameter, std=0.02)
    return tcan.to(pretrained.empty_prompt)


def pipeline(pretrained: PretrainedModels, tcan: TCAN) -> TCANPipeline:
    pipe = TCANPipeline(pretrained.vae, tcan, copy.deepcopy(pretrained.scheduler))
    pipe.model_info["stick_width"] = 2
    pipe.set_progress_bar_config(disable=True)
    return pipe


# A standing person; unit: 1/64 of the image side.
BODY = [
    (32, 12), (32, 20), (26, 20), (22, 28), (20, 36), (38, 20), (42, 28), (44, 36), (28, 36), (28, 46), (28, 56),
    (36, 36), (36, 46), (36, 56), (31, 10), (33, 10), (29, 11), (35, 11),
]  # fmt: skip


def walk(frames: int, size: int) -> np.ndarray:
    """Keypoints `[F, 18, 3]` of a body that moves to the right by 25 % of the image width."""
    body = np.array([(x / 64 - 0.125, y / 64) for x, y in BODY]) * size
    poses = np.ones((frames, len(BODY), 3), np.float32)
    poses[..., :2] = body
    poses[..., 0] += (np.arange(frames) / frames * size / 4)[:, None]
    return poses


def image(size: int) -> np.ndarray:
    """Smooth color gradients, uint8 `[size, size, 3]`."""
    y, x = np.mgrid[:size, :size] / size
    return (np.stack([x, y, 1 - x * y], axis=-1) * 255).astype(np.uint8)


def check_equal(difference: float, tcan: TCAN) -> None:
    """Check that two implementations agree. In half precision only rounding differs, but no bound is known."""
    assert difference < TOLERANCE or tcan.dtype != torch.float32, (
        f"the implementations differ by {difference}"
    )


@torch.no_grad()
def temperature(pretrained: PretrainedModels, rounds: int) -> list[Row]:
    """One guided step of a window: with the temperature map, without it, and with an explicit softmax."""
    tcan = trained_like(pretrained)
    pipes = {
        "fused": pipeline(pretrained, tcan),
        "explicit": pipeline(pretrained, baseline.with_explicit_softmax(tcan)),
    }
    size, device = 8 * pretrained.unet.config.sample_size, tcan.device
    drawn = pipes["fused"].draw(walk(WINDOW, size), size, size)
    poses = torch.from_numpy(drawn).permute(0, 3, 1, 2).to(device)
    reference = pipes["fused"].encode(image(size))
    timestep = torch.tensor([500], device=device)
    noisy = torch.randn(1, WINDOW, *reference.shape[1:], device=device)
    features = tcan.appearance(reference, timestep)
    embedded = tcan.embed_pose(poses[None] / 255)
    tau = temperature_map(poses)

    def step(pipe: str, tau: torch.Tensor | None) -> torch.Tensor:
        return pipes[pipe].predict_noise(noisy, timestep, embedded, features, GUIDANCE, tau)

    difference = (step("fused", tau) - step("explicit", tau)).abs().max().item()
    check_equal(difference, tcan)
    times = side_by_side(
        {
            "off": lambda: step("fused", None),
            "on": lambda: step("fused", tau),
            "explicit": lambda: step("explicit", tau),
        },
        rounds,
        device.type,
    )
    on, explicit = ratio(times, "on", "off"), ratio(times, "explicit", "off")
    return [
        Row("guided step of a window with the temperature map: time relative to without", f"{on.median:.3f}", on.spread),
        Row("the same with explicit softmax", f"{explicit.median:.3f}", f"{explicit.spread}; difference {difference:.0e}"),
    ]  # fmt: skip


class Clip:
    """A clip of several windows from an image and poses, by this implementation and by the baseline.

    The baseline gets the drawn pose images.
    """

    def __init__(self, pretrained: PretrainedModels, frames: int, steps: int):
        size = 8 * pretrained.unet.config.sample_size
        tcan = trained_like(pretrained)
        self.ours, self.baseline = (
            pipeline(pretrained, tcan),
            pipeline(pretrained, baseline.with_explicit_softmax(tcan)),
        )
        self.steps, self.image, self.poses = steps, image(size), walk(frames, size)
        self.drawn = self.ours.draw(self.poses, size, size)
        self.what = f"{frames} frames in {steps} steps"

    def denoise(self) -> torch.Tensor:
        return self.ours.denoise(
            self.image, self.poses, steps=self.steps, guidance_scale=GUIDANCE, window=WINDOW,
            overlap=OVERLAP, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    def denoise_baseline(self) -> torch.Tensor:
        return baseline.denoise(
            self.baseline, self.image, self.drawn, steps=self.steps, guidance_scale=GUIDANCE, window=WINDOW,
            overlap=OVERLAP, seed=0,
        )  # fmt: skip

    def animate(self) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(list(self.ours.decode(self.denoise()))))

    def animate_baseline(self) -> torch.Tensor:
        return torch.from_numpy(baseline.decode(self.baseline, self.denoise_baseline()))


@torch.no_grad()
def clip(pretrained: PretrainedModels, rounds: int, frames: int = 28, steps: int = 4) -> list[Row]:
    """A complete clip, from the image to the frames."""
    both = Clip(pretrained, frames, steps)
    return [_against_baseline(both, f"a clip of {both.what}", both.animate, both.animate_baseline, rounds)]


@torch.no_grad()
def denoising(pretrained: PretrainedModels, rounds: int, frames: int = 28, steps: int = 1) -> list[Row]:
    """Latents of a clip only: with the usual number of steps, decoding is a small part of the time."""
    both = Clip(pretrained, frames, steps)
    what = f"denoising {both.what}"
    return [_against_baseline(both, what, both.denoise, both.denoise_baseline, rounds)]


def _against_baseline(
    both: Clip,
    what: str,
    run_ours: Callable[[], torch.Tensor],
    run_baseline: Callable[[], torch.Tensor],
    rounds: int,
) -> Row:
    made: dict[str, torch.Tensor] = {}
    sides = {
        "baseline": lambda: made.update(baseline=run_baseline()),
        "ours": lambda: made.update(ours=run_ours()),
    }
    times = side_by_side(sides, rounds, both.ours.device.type)
    difference = (made["ours"] - made["baseline"]).abs().max().item()
    check_equal(difference, both.ours.tcan)
    speedup = ratio(times, "baseline", "ours")
    return Row(f"{what}: speedup over the baseline", str(speedup), f"{speedup.spread}; largest difference {difference:.0e}")  # fmt: skip
