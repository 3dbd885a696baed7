"""Animation at mini size: the temperature map's cost, and a whole clip against the plain way."""

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
from tests.benchmarks.measure import Row, ratio, side_by_side

WINDOW, OVERLAP = 16, 4
GUIDANCE = 2.5
SAME = 1e-3  # of pixels in [0, 1], and of predicted noise


def trained_like(pretrained: PretrainedModels) -> TCAN:
    """TCAN on these pretrained, nothing at the zero it starts from: else parts of it had no say in the result."""
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


# Someone upright, in 64ths of the image.
BODY = [
    (32, 12), (32, 20), (26, 20), (22, 28), (20, 36), (38, 20), (42, 28), (44, 36), (28, 36), (28, 46), (28, 56),
    (36, 36), (36, 46), (36, 56), (31, 10), (33, 10), (29, 11), (35, 11),
]  # fmt: skip


def walk(frames: int, size: int) -> np.ndarray:
    """Keypoints `[F, 18, 3]`: a body that glides through a fourth of the image to the right."""
    body = np.array([(x / 64 - 0.125, y / 64) for x, y in BODY]) * size
    poses = np.ones((frames, len(BODY), 3), np.float32)
    poses[..., :2] = body
    poses[..., 0] += (np.arange(frames) / frames * size / 4)[:, None]
    return poses


def image(size: int) -> np.ndarray:
    """uint8 `[size, size, 3]`: soft colours."""
    y, x = np.mgrid[:size, :size] / size
    return (np.stack([x, y, 1 - x * y], axis=-1) * 255).astype(np.uint8)


def check_same(difference: float, tcan: TCAN) -> None:
    """Two ways to the same result; in half precision their rounding is all that can differ, and no bound is known."""
    assert difference < SAME or tcan.dtype != torch.float32, f"the two ways differ by {difference}"


@torch.no_grad()
def temperature(pretrained: PretrainedModels, rounds: int) -> list[Row]:
    """One window's guided step with the map, without it, and with the softmax written out."""
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
    check_same(difference, tcan)
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
        Row("a window's guided step with the temperature map: time to that without", f"{on.median:.3f}", on.spread),
        Row("the same by the explicit softmax", f"{explicit.median:.3f}", f"{explicit.spread}; difference {difference:.0e}"),
    ]  # fmt: skip


class Clip:
    """A clip of several windows from a image and poses, our way and the plain one; that gets the poses drawn."""

    def __init__(self, pretrained: PretrainedModels, frames: int, steps: int):
        size = 8 * pretrained.unet.config.sample_size
        tcan = trained_like(pretrained)
        self.ours, self.plain = (
            pipeline(pretrained, tcan),
            pipeline(pretrained, baseline.with_explicit_softmax(tcan)),
        )
        self.steps, self.image, self.poses = steps, image(size), walk(frames, size)
        self.drawn = self.ours.draw(self.poses, size, size)
        self.what = f"{frames} frames in {steps} steps"

    def denoise(self) -> torch.Tensor:
        return self.ours.denoise(
            self.image, self.poses, num_inference_steps=self.steps, guidance_scale=GUIDANCE, window=WINDOW,
            overlap=OVERLAP, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    def denoise_plainly(self) -> torch.Tensor:
        return baseline.denoise(
            self.plain, self.image, self.drawn, steps=self.steps, guidance_scale=GUIDANCE, window=WINDOW,
            overlap=OVERLAP, seed=0,
        )  # fmt: skip

    def animate(self) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(list(self.ours.decode(self.denoise()))))

    def animate_plainly(self) -> torch.Tensor:
        return torch.from_numpy(baseline.decode(self.plain, self.denoise_plainly()))


@torch.no_grad()
def clip(pretrained: PretrainedModels, rounds: int, frames: int = 28, steps: int = 4) -> list[Row]:
    """A whole clip, to its frames."""
    both = Clip(pretrained, frames, steps)
    return [
        _against_the_plain_way(both, f"a clip of {both.what}", both.animate, both.animate_plainly, rounds)
    ]


@torch.no_grad()
def denoising(pretrained: PretrainedModels, rounds: int, frames: int = 28, steps: int = 1) -> list[Row]:
    """A clip's latents alone: in a clip of usual length decoding counts little beside its steps."""
    both = Clip(pretrained, frames, steps)
    what = f"denoising {both.what}"
    return [_against_the_plain_way(both, what, both.denoise, both.denoise_plainly, rounds)]


def _against_the_plain_way(
    both: Clip,
    what: str,
    run_ours: Callable[[], torch.Tensor],
    run_plain: Callable[[], torch.Tensor],
    rounds: int,
) -> Row:
    made: dict[str, torch.Tensor] = {}
    sides = {
        "plain": lambda: made.update(plain=run_plain()),
        "ours": lambda: made.update(ours=run_ours()),
    }
    times = side_by_side(sides, rounds, both.ours.device.type)
    difference = (made["ours"] - made["plain"]).abs().max().item()
    check_same(difference, both.ours.tcan)
    faster = ratio(times, "plain", "ours")
    return Row(f"{what}: times as fast as the plain way", str(faster), f"{faster.spread}; largest difference {difference:.0e}")  # fmt: skip
