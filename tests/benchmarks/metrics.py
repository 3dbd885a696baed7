"""Validation of the metrics in the puppet world: do they rank known corruptions of a true video in the right order?

python -m tests.benchmarks.metrics                      # prints the table and writes it to docs/metrics.md
python -m tests.benchmarks.metrics --alexnet FILE ...   # also the metrics of the given networks (keys of evaluate.networks)

Each corruption has two levels. A metric ranks it if, in every video, the truth is better than level 1 and level 1 better than
level 2.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from pipelines.network_metrics import image_similarities, set_metrics, video_metrics
from pipelines.puppets.world import Clip, sample_clip
from tcan.metrics import (
    background_mask,
    colour_distance,
    flicker,
    image_metrics,
    l1_disco,
    part_colours,
    pose_metrics,
    psnr_uint8_overflow,
    ssim_disco,
    warping_error,
)
from tcan.metrics.networks import METRICS, Networks, load_networks
from tcan.pose import track_main_person
from tcan.weights import load_pose_detector

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
MARKERS = "<!-- validation -->\n", "<!-- /validation -->\n"
VIDEOS, FRAMES, SIZE = 8, 24, 128
SEED = 30_000_000  # disjoint from the demo and from the pretraining of the mini weights
OTHER = 1_000  # offset of the seed of another character or dance
DELAY = 6  # frames

CORRUPTIONS = {
    "blur": "Gaussian blur, sigma 0.7 and 2 pixels",
    "identity": "the colours of the character turned by 20 degrees of hue; another character",
    "frozen": "every frame shown 4 times; the first frame only",
    "flicker": "random brightness of each frame, standard deviation 2 % and 8 %",
    "pose": f"the dance {DELAY} frames late; another dance",
}
# Metric -> label, sign (+1: larger is worse), format.
ROWS: dict[str, tuple[str, int, str]] = {
    "l1": ("L1", 1, ".4f"),
    "psnr": ("PSNR", -1, ".1f"),
    "ssim": ("SSIM", -1, ".3f"),
    "l1_disco": ("L1, DisCo, 1e-4 at 256 pixels", 1, ".2f"),
    "ssim_disco": ("SSIM, DisCo", -1, ".3f"),
    "psnr_uint8_overflow": ("PSNR with uint8 overflow", -1, ".1f"),
    "lpips_alex": ("LPIPS (AlexNet)", 1, ".4f"),
    "lpips_vgg": ("LPIPS (VGG)", 1, ".4f"),
    "lpips_vgg_disco": ("LPIPS (VGG), DisCo", 1, ".4f"),
    "fid": ("FID", 1, ".1f"),
    "fid_vid": ("FID-VID", 1, ".1f"),
    "fvd": ("FVD", 1, ".1f"),
    "image_similarity": ("image similarity", -1, ".4f"),
    "pose_5": ("joints within 5 %", -1, ".3f"),
    "colour_distance": ("colour distance", 1, ".1f"),
    "flicker": ("background flicker", 1, ".2f"),
    "warping_error": ("warping error, 1e-3", 1, ".2f"),
}


@dataclass(frozen=True)
class Video:
    """A true video and the arguments that its corruptions change."""

    seed: int
    frames: int
    size: int

    def sample(self, frames: int | None = None, character: int = 0, motion: int = 0) -> Clip:
        return sample_clip(
            "dance",
            self.seed,
            frames or self.frames,
            self.size,
            character_seed=self.seed + character,
            motion_seed=self.seed + motion,
        )

    @cached_property
    def truth(self) -> Clip:
        return self.sample()

    def corrupted(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Frames of levels 1 and 2, uint8 `[F, H, W, 3]`."""
        clip = self.truth
        rng = np.random.default_rng(self.seed)
        brightness = rng.standard_normal(len(clip.frames))[:, None, None, None]
        corruptions: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
            "blur": lambda: (_blurred(clip.frames, 0.7), _blurred(clip.frames, 2)),
            "identity": lambda: (_hue_turned(clip, 20), self.sample(character=OTHER).frames),
            "frozen": lambda: (
                clip.frames[np.arange(len(clip.frames)) // 4 * 4],
                np.repeat(clip.frames[:1], len(clip.frames), axis=0),
            ),
            "flicker": lambda: (
                _scaled(clip.frames, 0.02 * brightness),
                _scaled(clip.frames, 0.08 * brightness),
            ),
            "pose": lambda: (
                self.sample(self.frames + DELAY).frames[DELAY:],
                self.sample(motion=OTHER).frames,
            ),
        }
        return corruptions[kind]()


def videos(count: int, frames: int, size: int) -> list[Video]:
    return [Video(SEED + i, frames, size) for i in range(count)]


def frame_metrics(frames: np.ndarray, truth: Clip, size: int = SIZE) -> dict[str, float]:
    """Metrics of one video that need no network."""
    reference = part_colours(truth.frames[:1], truth.keypoints[:1])[0]
    colours = part_colours(frames, truth.keypoints)
    return image_metrics(frames, truth.frames) | {
        "l1_disco": l1_disco(frames, truth.frames) * (size / 256) ** 2 * 1e4,
        "ssim_disco": ssim_disco(frames, truth.frames),
        "psnr_uint8_overflow": psnr_uint8_overflow(frames, truth.frames),
        "flicker": flicker(frames, background_mask(truth.keypoints, size, size)),
        "warping_error": warping_error(frames) * 1000,
        "colour_distance": float(np.nanmean(colour_distance(colours, reference))),
    }


def pose_accuracy(frames: np.ndarray, truth: Clip, detector: object) -> dict[str, float]:
    height, width = frames.shape[1:3]
    found = track_main_person(detector.detect(frames), height, width)  # type: ignore[attr-defined]
    return {"pose_5": pose_metrics(found, truth.keypoints, height)["pose_5"]}


def evaluate(
    cases: Sequence[Video], networks: Networks, detector: object | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Return corruption -> metric -> values `[3, N]` of the truth, level 1 and level 2; N = 1 for metrics of a set."""
    values: dict[str, dict[str, np.ndarray]] = {}
    truth = _metrics([video.truth.frames for video in cases], cases, networks, detector)
    for kind in CORRUPTIONS:
        corrupted = zip(*(video.corrupted(kind) for video in cases), strict=True)  # level 1, level 2
        levels = [truth, *(_metrics(results, cases, networks, detector) for results in corrupted)]
        values[kind] = {key: np.stack([level[key] for level in levels]) for key in truth}
    return values


def _metrics(
    results: Sequence[np.ndarray], cases: Sequence[Video], networks: Networks, detector: object | None
) -> dict[str, np.ndarray]:
    pairs = [(result, video.truth.frames) for result, video in zip(results, cases, strict=True)]
    rows = []
    for pair, video, similarity in zip(pairs, cases, image_similarities(pairs, networks), strict=True):
        row = frame_metrics(pair[0], video.truth, video.size) | video_metrics(pair, networks) | similarity
        if detector is not None:
            row |= pose_accuracy(pair[0], video.truth, detector)
        rows.append(row)
    sets = set_metrics(pairs, networks).values
    metrics = {key: np.array([row[key] for row in rows]) for key in ROWS if key in rows[0]}
    return metrics | {key: np.array([sets[key]]) for key in ROWS if key in sets}


def verdict(metric: str, values: np.ndarray) -> str:
    """What a metric sees of a corruption, from its values `[3, N]` of the truth, level 1 and level 2.

    Returns:
        ranks: truth, level 1, level 2 are in this order in every video;
        sees: level 2 is worse than the truth in every video;
        blind: level 2 has the value of the truth in every video;
        reversed: level 2 is better than the truth in every video;
        unsure: none of these.
    """
    truth, first, second = np.nan_to_num(
        ROWS[metric][1] * values, neginf=-1e9
    )  # PSNR of the truth is infinite
    if (truth < first).all() and (first < second).all():
        return "ranks"
    if np.allclose(truth, second, rtol=1e-6):
        return "blind"
    if (truth < second).all():
        return "sees"
    return "reversed" if (second < truth).all() else "unsure"


def table(values: dict[str, dict[str, np.ndarray]]) -> str:
    """Markdown: a row per metric, a column per corruption; each cell has the verdict and the means of levels 1 and 2."""
    lines = [f"| metric | truth | {' | '.join(CORRUPTIONS)} |", "|---|---|" + "---|" * len(CORRUPTIONS)]
    for key, (label, _, form) in ROWS.items():
        if key not in values["blur"]:
            continue
        cells = [format(values["blur"][key][0].mean(), form)]
        for kind in CORRUPTIONS:
            means = values[kind][key][1:].mean(axis=1)
            cells.append(
                f"**{verdict(key, values[kind][key])}** {' / '.join(format(mean, form) for mean in means)}"
            )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in (name for name in METRICS if name != "face"):  # puppets have drawn faces
        parser.add_argument(f"--{name}", help=f"file of evaluate.networks.{name}")
    networks = load_networks(vars(parser.parse_args()))
    values = evaluate(videos(VIDEOS, FRAMES, SIZE), networks, load_pose_detector("mini"))
    text = (
        f"{VIDEOS} videos of {FRAMES} frames at {SIZE} x {SIZE}, written by `python -m tests.benchmarks.metrics`. "
        f"Not in this run, for lack of a network file: {', '.join(key for key in networks.unavailable if key in ROWS) or 'none'}.\n\n{table(values)}"
    )
    print(text)
    before, _, remainder = PAGE.read_text().partition(MARKERS[0])
    PAGE.write_text(
        before + MARKERS[0] + "\n" + text + "\n" + MARKERS[1] + remainder.partition(MARKERS[1])[2]
    )


def _blurred(frames: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in frames])


def _scaled(frames: np.ndarray, change: np.ndarray) -> np.ndarray:
    return np.clip(frames * (1 + change), 0, 255).round().astype(np.uint8)


def _hue_turned(clip: Clip, degrees: float) -> np.ndarray:
    """Turn the hue of the puppet's pixels."""
    frames = []
    for frame in clip.frames:
        hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV_FULL)
        hsv[..., 0] += np.uint8(round(degrees / 360 * 256))  # wraps around
        frames.append(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))
    return np.where(clip.mask[..., None], np.stack(frames), clip.frames)


if __name__ == "__main__":
    main()
