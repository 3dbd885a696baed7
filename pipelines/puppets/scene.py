"""Static backgrounds of large shapes in light colours, so that the dancer stands out."""

from typing import Any

import cv2
import numpy as np

from pipelines.puppets.character import Colour, Distribution, rgb, shade, vary

WALLS = ["f3e3d3", "dfe8ee", "e6dff0", "f6dfe2", "dcebdf", "f5edcf", "d5e3f2", "ead9cc", "cfdedd", "e9e4dc"]
FLOORS = ["d9b58c", "c9a27c", "b8c0c8", "cdb9a4", "bfa88f", "d8cbb9", "a9b3a6"]
TINTS = ["f2b5a7", "a8c8e6", "b9d9b2", "f5d58c", "c9b6e4", "f0b6cf", "9fd3cf", "e8c3a0"]
SKIES = [
    ["bfe3f7", "eef8fc"],
    ["ffd9b8", "ffeeda"],
    ["cfc6f0", "f6dfee"],
    ["bce8df", "f1fbef"],
    ["f7c6cf", "fdebd9"],
]


class Image:
    """An RGB canvas with coordinates in [0, 1]."""

    def __init__(self, size: int):
        self.pixels = np.zeros((size, size, 3), np.uint8)
        self.size = size

    def gradient(self, top: Colour, bottom: Colour, y0: float = 0.0, y1: float = 1.0) -> None:
        a, b = round(y0 * self.size), round(y1 * self.size)
        t = np.linspace(0, 1, b - a)[:, None, None]
        self.pixels[a:b] = np.array(top) * (1 - t) + np.array(bottom) * t

    def polygon(self, points: Any, colour: Colour) -> None:
        points = np.round(np.array(points) * self.size * 16).astype(np.int32)
        cv2.fillPoly(self.pixels, [points], colour, cv2.LINE_AA, 4)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        self.polygon(np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], axis=-1), colour)


def sample_background(
    distribution: Distribution, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, float]:
    """Sample a background, uint8 RGB `[size, size, 3]`, and the y position in [0, 1] of the far edge of its floor."""
    image = Image(size)
    horizon = rng.uniform(0.68, 0.78)
    kinds = [_room] if distribution == "dance" else [_room, _stage, _hills, _beach, _city, _studio, _poster]
    kinds[rng.integers(len(kinds))](image, rng, horizon)
    return image.pixels, horizon


def _tint(rng: np.random.Generator, codes: list[str] = TINTS) -> Colour:
    return vary(rng, rgb(str(rng.choice(codes))), 0.02, 0.05)


def _room(p: Image, rng: np.random.Generator, horizon: float) -> None:
    wall, floor = _tint(rng, WALLS), _tint(rng, FLOORS)
    p.gradient(shade(wall, 0.95), shade(wall, 1.2), 0, horizon)
    paper = rng.random()
    soft = shade(wall, 0.965)
    if paper < 0.25:
        width = rng.uniform(0.06, 0.1)
        for x in np.arange(0, 1, 2 * width):
            p.box(x, 0, x + width, horizon, soft)
    elif paper < 0.4:
        p.box(0, horizon - rng.uniform(0.2, 0.3), 1, horizon, shade(wall, 0.92))
    p.gradient(shade(floor, 0.96), shade(floor, 1.12), horizon, 1)
    if rng.random() < 0.5:  # floor boards towards the viewer
        for x in np.linspace(-0.6, 1.6, 9):
            p.polygon(
                [
                    (0.5 + (x - 0.5) * 0.6, horizon),
                    (0.507 + (x - 0.5) * 0.6, horizon),
                    (x + 0.012, 1),
                    (x, 1),
                ],
                shade(floor, 0.93),
            )
    p.box(0, horizon - 0.025, 1, horizon, shade(wall, 1.6))
    if rng.random() < 0.5:  # rug
        rug = _tint(rng)
        p.ellipse(0.5, (horizon + 1) / 2 + 0.03, rng.uniform(0.36, 0.48), 0.09, shade(rug, 0.92))
        p.ellipse(0.5, (horizon + 1) / 2 + 0.03, 0.33, 0.065, rug)
    objects = [_plant, _lamp, _sofa, _door, _window, _frames, _shelf]
    chosen = rng.permutation(len(objects))[:2]
    if rng.random() < 0.4:
        objects[rng.choice([k for k in (4, 5, 6) if k not in chosen])](
            p, rng, rng.uniform(0.42, 0.58), horizon
        )
    for x, index in zip((rng.uniform(0.12, 0.2), rng.uniform(0.8, 0.88)), chosen, strict=True):
        objects[index](p, rng, x, horizon)


def _window(p: Image, rng: np.random.Generator, x: float, horizon: float) -> None:
    w, top, bottom = 0.13, 0.12, 0.5
    p.box(x - w - 0.015, top - 0.015, x + w + 0.015, bottom + 0.015, (250, 248, 244))
    p.box(x - w, top, x + w, bottom, _tint(rng, ["cfe9f7", "d9eefa", "fbe6cf", "dfe3fa"]))
    p.polygon(
        [
            (x - w, bottom),
            (x - w, bottom - 0.09),
            (x, bottom - 0.13),
            (x + w, bottom - 0.06),
            (x + w, bottom),
        ],
        rgb("cde3c6"),
    )
    p.box(x - 0.008, top, x + 0.008, bottom, (250, 248, 244))
    p.box(x - w, 0.3, x + w, 0.314, (250, 248, 244))


def _frames(p: Image, rng: np.random.Generator, x: float, horizon: float) -> None:
    for dx, y, w, h in ((-0.07, 0.2, 0.055, 0.075), (0.07, 0.26, 0.06, 0.06)):
        p.box(x + dx - w, y - h, x + dx + w, y + h, (252, 250, 246))
        p.box(x + dx - w + 0.016, y - h + 0.016, x + dx + w - 0.016, y + h - 0.016, _tint(rng))
        p.ellipse(x + dx, y + 0.01, w * 0.4, w * 0.4, _tint(rng))


def _plant(p: Image, rng: np.random.Generator, x: float, horizon: float) -> None:
    y, leaf = horizon + 0.03, _tint(rng, ["9cc7a1", "a9cf97", "8fbfa8"])
    for k, angle in enumerate(np.linspace(-0.9, 0.9, 5)):
        tip = np.array([x + 0.17 * np.sin(angle), y - 0.13 - 0.2 * np.cos(angle)])
        side = 0.035 * np.array([np.cos(angle), np.sin(angle)])
        base, middle = np.array([x, y - 0.1]), (np.array([x, y - 0.1]) + tip) / 2
        p.polygon([base, middle - side, tip, middle + side], shade(leaf, 1.0 if k % 2 else 0.92))
    p.polygon(
        [(x - 0.06, y - 0.12), (x + 0.06, y - 0.12), (x + 0.045, y), (x - 0.045, y)],
        _tint(rng, ["e3b7a0", "f1ece4", "c9b8a8"]),
    )


def _lamp(p: Image, rng: np.random.Generator, x: float, horizon: float) -> None:
    p.ellipse(x, 0.32, 0.16, 0.16, shade(rgb("fff3cf"), 1.2))
    p.box(x - 0.008, 0.3, x + 0.008, horizon + 0.02, rgb("a79c93"))
    p.ellipse(x, horizon + 0.025, 0.06, 0.014, rgb("a79c93"))
    p.polygon(
        [(x - 0.05, 0.22), (x + 0.05, 0.22), (x + 0.085, 0.35), (x - 0.085, 0.35)],
        _tint(rng, ["fbe3a8", "f7d7c4", "f4efdf"]),
    )


def _shelf(p: Image, rng: np.random.Generator, x: float, horizon: float) -> None:
    wood = _tint(rng, ["d9bd9c", "c8ab8a", "efe9e0"])
    for y in (0.24, 0.42):
        left = x - 0.11
        for _ in range(5):
            w, h = rng.uniform(0.025, 0.04), rng.uniform(0.07, 0.11)
            p.box(left, y - h, left + w, y, _tint(rng))
            left += w + 0.004
        p.box(x - 0.13, y, x + 0.13, y + 0.016, wood)


def _sofa(p: Image, rng: np.random.Generator, x: float, horizon: float) -> None:
    cloth = _tint(rng)
    p.ellipse(x, horizon - 0.13, 0.19, 0.07, shade(cloth, 0.95))
    p.box(x - 0.19, horizon - 0.14, x + 0.19, horizon + 0.02, shade(cloth, 0.95))
    p.box(x - 0.17, horizon - 0.06, x + 0.17, horizon + 0.03, cloth)
    for dx in (-0.2, 0.2):
        p.ellipse(x + dx, horizon - 0.03, 0.045, 0.055, shade(cloth, 0.9))


def _door(p: Image, rng: np.random.Generator, x: float, horizon: float) -> None:
    wood = _tint(rng, ["e9d6c0", "dfe6ea", "f2ece2", "d8c7e0"])
    p.box(x - 0.125, 0.13, x + 0.125, horizon, shade(wood, 1.5))
    p.box(x - 0.105, 0.15, x + 0.105, horizon, wood)
    for y0, y1 in ((0.19, 0.38), (0.43, horizon - 0.05)):
        p.box(x - 0.07, y0, x + 0.07, y1, shade(wood, 0.95))
    p.ellipse(x + 0.085, 0.43, 0.012, 0.012, rgb("cfae6a"))


def _stage(p: Image, rng: np.random.Generator, horizon: float) -> None:
    wall, curtain = _tint(rng), _tint(rng, ["d98a8a", "8a9bd9", "a98ac9", "7fb8b0"])
    p.gradient(shade(wall, 0.85), shade(wall, 1.15), 0, horizon)
    p.gradient(rgb("d8b892"), rgb("ecd6b5"), horizon, 1)
    p.polygon([(0.42, 0), (0.58, 0), (0.95, horizon + 0.1), (0.05, horizon + 0.1)], shade(wall, 1.25))
    p.ellipse(0.5, 0.9, 0.45, 0.085, rgb("f7e8cd"))
    for left in (0.0, 0.86):
        for k in range(4):
            p.box(
                left + 0.035 * k,
                0,
                left + 0.035 * (k + 1),
                horizon + 0.04,
                shade(curtain, 1.0 if k % 2 else 0.93),
            )
    for x in np.arange(0, 1.01, 0.2):
        p.ellipse(x, 0, 0.11, 0.09, shade(curtain, 0.97))


def _hills(p: Image, rng: np.random.Generator, horizon: float) -> None:
    sky = SKIES[rng.integers(len(SKIES))]
    p.gradient(rgb(sky[0]), rgb(sky[1]))
    p.ellipse(rng.uniform(0.1, 0.9), rng.uniform(0.12, 0.3), 0.08, 0.08, rgb("fff2c4"))
    for _ in range(2):
        x, y = rng.uniform(0, 1), rng.uniform(0.08, 0.35)
        for dx, r in ((-0.07, 0.04), (0, 0.06), (0.07, 0.045)):
            p.ellipse(x + dx, y, r * 1.3, r * 0.8, (253, 253, 253))
    green = _tint(rng, ["a9d39e", "b8d890", "9fd0b5", "d9d08e", "c7c0e3"])
    for k, light in enumerate((1.35, 1.15)):
        p.ellipse(
            rng.uniform(0, 1), horizon + 0.22, rng.uniform(0.6, 0.9), 0.42 - 0.12 * k, shade(green, light)
        )
    p.gradient(green, shade(green, 1.2), horizon, 1)
    for x in (rng.uniform(0.06, 0.2), rng.uniform(0.8, 0.94))[: rng.integers(1, 3)]:
        p.box(x - 0.014, horizon - 0.15, x + 0.014, horizon + 0.015, rgb("b99a7c"))
        for dx, dy, r in ((-0.05, 0.17, 0.075), (0.05, 0.17, 0.075), (0, 0.26, 0.085)):
            p.ellipse(x + dx, horizon - dy, r, r, shade(green, 0.86))


def _beach(p: Image, rng: np.random.Generator, horizon: float) -> None:
    sky = SKIES[rng.integers(len(SKIES))]
    p.gradient(rgb(sky[0]), rgb(sky[1]))
    x = rng.uniform(0.2, 0.8)
    p.ellipse(x, 0.42, 0.15, 0.15, rgb("fff0c2"))
    sea = _tint(rng, ["9fd4e3", "a6c9ea", "9edbcf"])
    p.gradient(sea, shade(sea, 1.3), 0.52, horizon)
    for y in (0.57, 0.64):
        p.box(x - rng.uniform(0.1, 0.3), y, x + rng.uniform(0.1, 0.3), y + 0.012, shade(sea, 1.5))
    sand = _tint(rng, ["f0dcb4", "ead3b0", "f5e3c8"])
    p.gradient(shade(sand, 0.95), shade(sand, 1.2), horizon, 1)
    p.ellipse(rng.uniform(0.2, 0.8), horizon, 0.5, 0.025, shade(sand, 1.5))


def _city(p: Image, rng: np.random.Generator, horizon: float) -> None:
    sky = SKIES[rng.integers(len(SKIES))]
    p.gradient(rgb(sky[0]), rgb(sky[1]))
    for light, low, high in ((1.35, 0.2, 0.4), (1.12, 0.35, 0.58)):
        block, x = _tint(rng, ["c9c6df", "bcd0df", "e0c8c0", "d5cfe6"]), 0.0
        while x < 1:
            w, top = rng.uniform(0.12, 0.2), rng.uniform(low, high)
            p.box(x, top, x + w, horizon, shade(block, light))
            if light < 1.3:
                for y in np.arange(top + 0.04, horizon - 0.06, 0.1):
                    p.box(x + 0.03, y, x + w - 0.03, y + 0.04, shade(block, 1.35))
            x += w + 0.005
    road = _tint(rng, ["c5c8cf", "d6d0c8", "bfc9c6"])
    p.gradient(shade(road, 0.95), shade(road, 1.2), horizon, 1)
    p.box(0, horizon, 1, horizon + 0.025, shade(road, 1.5))


def _studio(p: Image, rng: np.random.Generator, horizon: float) -> None:
    tint = _tint(rng, WALLS + TINTS)
    p.gradient(shade(tint, 0.95), shade(tint, 1.3), 0, horizon)
    p.gradient(shade(tint, 1.3), shade(tint, 1.0), horizon, 1)
    if rng.random() < 0.7:
        p.ellipse(0.5, 0.45, 0.36, 0.36, shade(tint, 1.5))
    p.ellipse(0.5, 0.92, 0.42, 0.06, shade(tint, 0.93))


def _poster(p: Image, rng: np.random.Generator, horizon: float) -> None:
    tint, other = _tint(rng), _tint(rng)
    tint, other = shade(tint, 1.35), shade(other, 1.25)
    p.gradient(tint, shade(tint, 1.2))
    kind = rng.integers(4)
    if kind == 0:  # sun rays
        centre = (rng.uniform(0.3, 0.7), rng.uniform(0.35, 0.6))
        for angle in np.arange(0, 2 * np.pi, np.pi / 6):
            ends = [
                (centre[0] + 2 * np.cos(angle + d), centre[1] + 2 * np.sin(angle + d))
                for d in (0, np.pi / 12)
            ]
            p.polygon([centre, *ends], shade(tint, 0.93))
    elif kind == 1:  # diagonal bands
        for x in np.arange(-1, 1.5, 0.4):
            p.polygon([(x, 0), (x + 0.2, 0), (x + 0.8, 1), (x + 0.6, 1)], shade(tint, 0.94))
    elif kind == 2:  # bubbles
        for _ in range(7):
            r = rng.uniform(0.05, 0.16)
            p.ellipse(
                rng.uniform(0, 1),
                rng.uniform(0, 0.9),
                r,
                r,
                shade(other if rng.random() < 0.5 else tint, rng.uniform(0.94, 1.3)),
            )
    else:  # arches
        for k, r in enumerate((0.5, 0.4, 0.3)):
            p.ellipse(0.5, 0.6, r, r * 1.1, shade((tint, other)[k % 2], 1.0 + 0.12 * k))
    p.gradient(shade(other, 0.94), shade(other, 1.15), horizon + 0.06, 1)
