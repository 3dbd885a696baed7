"""Held-out variations of `dance` clips: moving scenes, several puppets, turns, other styles of drawing, and other bodies.

A clip has the character and the dance of the `dance` clip of the same seed, so that both can be compared pairwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import cv2
import numpy as np

from pipelines.puppets.character import Distribution, sample_character
from pipelines.puppets.motion import KEYS, Choreography, sample_choreography
from pipelines.puppets.render import render
from pipelines.puppets.scene import TINTS, Image, rgb, sample_background
from pipelines.puppets.world import DISTRIBUTIONS, ENERGY, FPS, Clip, sample_clip

Variation = Literal[
    "parallax",
    "passing",
    "light",
    "turns",
    "crossing",
    "sketch",
    "xray",
    "noise",
    "four_arms",
    "three",
    "headless",
]
"""Moving scenes: parallax (the camera pans, with posts behind the puppet that move faster than the wall), passing (a ball
crosses behind the puppet), light (brightness and color of the light change). Difficult poses: turns (the puppet turns
to both sides until its shoulders are behind each other; the renderer has no views from behind), crossing (a second, smaller
puppet crosses in front of it), three (a second puppet crosses in front of it, a third one behind it). Styles: sketch (pencil
drawing), xray (bright body on a dark background), noise (blur and grain of a photo in dim light). Bodies: four_arms, headless.

A clip depends on the position of its variation in this list: new ones are appended."""
VARIATIONS: tuple[Variation, ...] = get_args(Variation)
HeldOut = Distribution | Variation

DANCE = DISTRIBUTIONS.index("dance")
SUPERSAMPLING = 4  # of backgrounds that move, so that they move by fractions of a pixel
OTHER_PUPPET = 1_000_000  # added to the seed
OTHER_SCALE = 0.8  # of the crossing puppets; the larger one is the main person


@dataclass(frozen=True)
class Layer:
    """A puppet with its shadow, without a background."""

    colour: np.ndarray
    """float32 `[F, H, W, 3]`, multiplied by the opacity."""
    transparency: np.ndarray
    """float32 `[F, H, W, 3]` in [0, 1]: the share of the background."""
    keypoints: np.ndarray
    """float32 `[F, 18, 3]`."""
    mask: np.ndarray
    """bool `[F, H, W]`."""

    def over(self, background: np.ndarray) -> np.ndarray:
        """Frames float32 `[F, H, W, 3]` of the layer in front of frames or an image."""
        return self.colour + self.transparency * background

    def moved(self, x: np.ndarray, scale: float = 1.0) -> "Layer":
        """Scaled around the center of the bottom edge, and moved to the right by `x` `[F]` pixels."""
        size = self.colour.shape[1]
        maps = [
            np.array([[scale, 0, size / 2 * (1 - scale) + dx], [0, scale, size * (1 - scale)]]) for dx in x
        ]

        def warp(frames: np.ndarray, border: float) -> np.ndarray:
            return np.stack(
                [
                    cv2.warpAffine(frame, m, (size, size), flags=cv2.INTER_LINEAR, borderValue=(border,) * 3)
                    for frame, m in zip(frames, maps, strict=True)
                ]
            )

        keypoints = self.keypoints.copy()
        for body, m in zip(keypoints, maps, strict=True):
            body[:, :2] = body[:, :2] @ m[:, :2].T + m[:, 2]
        mask = warp(self.mask.astype(np.float32), 0.0) > 0.5
        return Layer(warp(self.colour, 0.0), warp(self.transparency, 1.0), keypoints, mask)


def sample_held_out(kind: HeldOut, seed: int, num_frames: int, size: int = 128) -> Clip:
    """Sample a clip of a distribution or of a variation at 24 frames/s. Equal arguments give identical bytes."""
    if kind in DISTRIBUTIONS:
        return sample_clip(kind, seed, num_frames, size)
    rng = np.random.default_rng([100 + VARIATIONS.index(kind), seed])
    return _SAMPLERS[kind](seed, np.arange(num_frames) / FPS, size, rng)


def _stream(part: int, seed: int) -> np.random.Generator:
    """Random numbers of the character (0), the dance (1) or the background (2) of a `dance` clip."""
    return np.random.default_rng([DANCE, part, seed])


def _layer(
    seed: int,
    seconds: np.ndarray,
    size: int,
    change: Callable[[Choreography], Choreography] = lambda dance: dance,
    headless: bool = False,
) -> Layer:
    """The puppet of a `dance` clip with a changed dance, or without its head.

    A pixel is c + t b with the background b, so renderings on black and on white give c and t.
    """
    character = sample_character("dance", _stream(0, seed))
    dance = change(sample_choreography(_stream(1, seed), ENERGY["dance"]))

    def on(gray: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        def plain(n: int) -> tuple[np.ndarray, float]:
            return np.full((n, n, 3), gray, np.uint8), 0.0

        return render(character, dance, plain, seconds, size, headless)

    black, keypoints, mask = on(0)
    white = on(255)[0].astype(np.float32)
    colour = black.astype(np.float32)
    return Layer(colour, ((white - colour) / 255).clip(0, 1), keypoints, mask)


def _background(seed: int, size: int) -> np.ndarray:
    """uint8 `[size, size, 3]` of a `dance` clip."""
    return sample_background("dance", _stream(2, seed), size)[0]


def _still(seed: int, size: int) -> np.ndarray:
    """The background of a `dance` clip in its size, float32 `[size, size, 3]`."""
    return _shrink(_background(seed, size * SUPERSAMPLING), size)


def _clip(frames: np.ndarray, layer: Layer, others: tuple[np.ndarray, ...] = ()) -> Clip:
    return Clip(frames.round().clip(0, 255).astype(np.uint8), layer.keypoints, layer.mask, others)


def _shrink(image: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)


def _parallax(seed: int, seconds: np.ndarray, size: int, rng: np.random.Generator) -> Clip:
    large = size * SUPERSAMPLING
    wall = _background(seed, large)
    wall = np.concatenate([wall, wall[:, ::-1]], axis=1)  # continues at both ends
    speed = rng.choice([-1, 1]) * rng.uniform(0.2, 0.4)  # image widths per second
    colour = rgb(str(rng.choice(TINTS)))
    first, gap, width = rng.uniform(0, 0.5), rng.uniform(0.45, 0.6), rng.uniform(0.03, 0.05)
    frames = []
    for t in seconds:
        image = Image(large)
        image.pixels[:] = np.roll(wall, -round(float(speed * t) * large), axis=1)[:, :large]
        offset = (first - 2.5 * speed * t) % gap
        for x in np.arange(offset - gap, 1 + gap, gap):
            image.box(x, 0, x + width, 0.8, colour)
        frames.append(_shrink(image.pixels, size))
    layer = _layer(seed, seconds, size)
    return _clip(layer.over(np.stack(frames)), layer)


def _passing(seed: int, seconds: np.ndarray, size: int, rng: np.random.Generator) -> Clip:
    large = size * SUPERSAMPLING
    wall = _background(seed, large)
    colour, radius = rgb(str(rng.choice(TINTS))), rng.uniform(0.08, 0.13)
    period, phase, direction = rng.uniform(1.2, 1.8), rng.uniform(0, 1), rng.choice([-1, 1])
    frames = []
    for t in seconds:
        image = Image(large)
        image.pixels[:] = wall
        turn = (direction * t / period + phase) % 1
        image.ellipse(
            (1 + 2 * radius) * turn - radius,
            0.55 - 0.3 * abs(np.sin(2 * np.pi * turn)),
            radius,
            radius,
            colour,
        )
        frames.append(_shrink(image.pixels, size))
    layer = _layer(seed, seconds, size)
    return _clip(layer.over(np.stack(frames)), layer)


def _light(seed: int, seconds: np.ndarray, size: int, rng: np.random.Generator) -> Clip:
    clip = sample_clip("dance", seed, len(seconds), size)
    period, phase = rng.uniform(0.8, 1.6), rng.uniform(0, 2 * np.pi)
    strength = rng.uniform(0.15, 0.3) * rng.uniform(0.5, 1, 3)  # per color channel
    gain = 1 + strength * np.sin(2 * np.pi * seconds[:, None] / period + phase) - strength
    return replace(clip, frames=(clip.frames * gain[:, None, None]).round().astype(np.uint8))


def _turns(seed: int, seconds: np.ndarray, size: int, rng: np.random.Generator) -> Clip:
    def turned(dance: Choreography) -> Choreography:
        torso = dance.torso.copy()
        torso[:, 0] = np.radians(85) * np.sign(np.sin(np.arange(KEYS) * np.pi / 2 + np.pi / 4))
        return replace(dance, torso=torso)

    layer = _layer(seed, seconds, size, turned)
    return _clip(layer.over(_still(seed, size)), layer)


def _crossing(seed: int, seconds: np.ndarray, size: int, rng: np.random.Generator) -> Clip:
    way = rng.choice([-1, 1]) * 0.25 * size * np.cos(2 * np.pi * (seconds / 1.2 + rng.uniform(0, 0.2)))
    layer = _layer(seed, seconds, size).moved(way)
    other = _layer(seed + OTHER_PUPPET, seconds, size).moved(-way, OTHER_SCALE)
    return _clip(other.over(layer.over(_still(seed, size))), layer, (other.keypoints,))


def _sketch(seed: int, seconds: np.ndarray, size: int, rng: np.random.Generator) -> Clip:
    clip = sample_clip("dance", seed, len(seconds), size)
    frames = []
    for frame in clip.frames:
        gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
        surroundings = cv2.GaussianBlur(gray, (0, 0), size / 60)
        pencil = (255 * gray / surroundings.clip(1)).clip(0, 255)  # dark only at edges
        frames.append(0.8 * pencil + 0.2 * gray)
    paper = np.repeat(np.stack(frames)[..., None], 3, axis=3)
    return replace(clip, frames=paper.round().astype(np.uint8))


def _xray(seed: int, seconds: np.ndarray, size: int, rng: np.random.Generator) -> Clip:
    clip = sample_clip("dance", seed, len(seconds), size)
    bright = 1 - clip.frames.mean(axis=3, keepdims=True) / 255
    frames = 255 * bright * np.array([0.75, 0.9, 1.0])
    return replace(clip, frames=frames.round().astype(np.uint8))


def _noise(seed: int, seconds: np.ndarray, size: int, rng: np.random.Generator) -> Clip:
    clip = sample_clip("dance", seed, len(seconds), size)
    frames = np.stack([cv2.GaussianBlur(frame, (0, 0), size / 160) for frame in clip.frames]) * 0.7
    frames += rng.normal(0, 10, frames.shape)
    return replace(clip, frames=frames.round().clip(0, 255).astype(np.uint8))


def _four_arms(seed: int, seconds: np.ndarray, size: int, rng: np.random.Generator) -> Clip:
    arms = sample_choreography(rng, ENERGY["dance"]).arms
    layer = _layer(seed, seconds, size)
    behind = _layer(seed, seconds, size, lambda dance: replace(dance, arms=arms))
    frames = layer.over(behind.over(_still(seed, size)))
    return _clip(frames, replace(layer, mask=layer.mask | behind.mask))


def _three(seed: int, seconds: np.ndarray, size: int, rng: np.random.Generator) -> Clip:
    period = 2 * np.pi * seconds / 1.2
    way = rng.choice([-1, 1]) * 0.2 * size * np.cos(period + rng.uniform(0, 1))
    layer = _layer(seed, seconds, size).moved(way)
    front = _layer(seed + OTHER_PUPPET, seconds, size).moved(-1.5 * way, OTHER_SCALE)
    # A quarter of a period later than the one in front.
    side = rng.choice([-1, 1]) * 0.3 * size * np.sin(period + rng.uniform(0, 1))
    behind = _layer(seed + 2 * OTHER_PUPPET, seconds, size).moved(side, OTHER_SCALE)
    frames = front.over(layer.over(behind.over(_still(seed, size))))
    return _clip(frames, layer, (front.keypoints, behind.keypoints))


def _headless(seed: int, seconds: np.ndarray, size: int, rng: np.random.Generator) -> Clip:
    layer = _layer(seed, seconds, size, headless=True)
    return _clip(layer.over(_still(seed, size)), layer)


_SAMPLERS: Mapping[str, Callable[[int, np.ndarray, int, np.random.Generator], Clip]] = {
    "parallax": _parallax,
    "passing": _passing,
    "light": _light,
    "turns": _turns,
    "crossing": _crossing,
    "sketch": _sketch,
    "xray": _xray,
    "noise": _noise,
    "four_arms": _four_arms,
    "three": _three,
    "headless": _headless,
}
