"""Render a dancing puppet over a static background, supersampled, as flat shapes with outlines and shading.

Image points are complex numbers x + iy, so that rotating and scaling a shape is a multiplication. Channel 3 of the canvas
is the label of the region that was drawn last in a pixel (1 + its index in `REGIONS`), 0 outside of the puppet.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np

from pipelines.puppets.character import Character, Colour, Look, blend, shade
from pipelines.puppets.motion import CAMERA_TILT, KEYS, Choreography, Skeleton, pose_body
from tcan.metrics.region_labels import REGIONS

MARGIN = 0.02  # fraction of the image around hands, feet and hair
_ROUND = np.exp(1j * np.linspace(0, 2 * np.pi, 28, endpoint=False))
_FRONT = np.exp(1j * np.linspace(-np.pi / 2, np.pi / 2, 10))
_HEAD_TURN = np.linspace(0, 2 * np.pi, 44, endpoint=False)
_SHIFT = 4  # fractional bits of OpenCV coordinates
_BODY, _FACE, _HAIR_EARS, _HANDS = (
    1 + REGIONS.index(name) for name in ("body", "face", "hair_ears", "hands")
)


def render(
    character: Character,
    dance: Choreography,
    background: Callable[[int], tuple[np.ndarray, float]],
    seconds: np.ndarray,
    size: int,
    headless: bool = False,
    regions: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Render frames `[F, size, size, 3]`, keypoints `[F, 18, 3]` and mask `[F, size, size]` at times `seconds` `[F]`.

    Args:
        background: size -> (uint8 RGB `[size, size, 3]`, y position of the far edge of the floor).
        headless: omit the head; its points in the keypoints have score 0.
        regions: return labels instead of the mask, uint8 `[F, size, size]`: 0 outside of the mask, otherwise 1 + the index in
            `REGIONS` of the region that covers most of the pixel.
    """
    steps = [0.5, 0.5] if size <= 128 else [0.5]  # two steps of 0.5 are much faster than one of 0.25
    factor = 2 ** len(steps)
    scenery, _ = background(size * factor)
    still = np.dstack([scenery, np.zeros(scenery.shape[:2], np.uint8)])
    skeleton, scale, floor = _place(character, dance, seconds)
    sway = skeleton.head[:, 0] - pose_body(dance, character.body, seconds - 0.12).head[:, 0]
    artist = _Artist(character, skeleton, scale, floor, np.clip(-0.6 * sway, -0.035, 0.035), still)
    artist.headless = headless

    frames = np.empty((len(seconds), size, size, 3), np.uint8)
    mask = np.empty((len(seconds), size, size), np.uint8 if regions else bool)

    def shrink(image: np.ndarray) -> np.ndarray:
        for step in steps:
            image = cv2.resize(image, None, fx=step, fy=step, interpolation=cv2.INTER_AREA)
        return image

    for index in range(len(seconds)):
        canvas = artist.draw(index, still.copy())
        drawn = canvas[..., 3].copy()
        canvas[..., 3] = 255 * (drawn > 0).view(np.uint8)  # coverage
        small = shrink(canvas)
        frames[index], mask[index] = small[..., :3], small[..., 3] > 127
        if regions:
            shares = [shrink(255 * (drawn == label).view(np.uint8)) for label in range(1, 1 + len(REGIONS))]
            mask[index] *= 1 + np.argmax(shares, axis=0).astype(np.uint8)
    return frames, artist.keypoints(size), mask


def _place(character: Character, dance: Choreography, seconds: np.ndarray) -> tuple[Skeleton, float, float]:
    """Position the skeleton so that it remains inside the image during the entire dance.

    Returns:
        skeleton, scale (image heights per standing height) and y position of the floor in [0, 1].
    """
    body = character.body
    extent = _extent(pose_body(dance, body, np.arange(0, KEYS * dance.beat, 1 / 24)), character)
    left, right, top, bottom = extent
    room = 1 - 2 * MARGIN
    scale = min(
        character.height,
        room / (bottom - top).max(),
        room / (bottom.max() - top.min()),
        room / (right - left).max(),
    )
    scale = max(scale, 0.74)
    floor = 1 - MARGIN - scale * bottom.max()
    floor -= (0.5 + 0.5 * dance.position) * max(0.0, floor + scale * top.min() - MARGIN) * 0.6

    skeleton = pose_body(dance, body, seconds)
    left, right, _, _ = _extent(skeleton, character)
    centre = 0.5 + 0.06 * dance.position
    inside = np.maximum(0, MARGIN - (centre + scale * left)) - np.maximum(
        0, centre + scale * right - (1 - MARGIN)
    )
    return skeleton.shifted((centre + inside) / scale), scale, floor


def _extent(
    skeleton: Skeleton, character: Character
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Left, right, top and bottom of the puppet, each `[F]`, in standing heights relative to the floor's centre."""
    body, look = character.body, character.look
    tall = (
        {"bunny": 0.45, "pointed": 0.2, "none": 0.06}.get(look.ears, 0.12) if look.horns == "none" else 0.32
    )
    tall = 0.45 if look.ears == "bunny" else tall
    tall = max(tall, {"bun": 0.34, "afro": 0.3, "mohawk": 0.2, "spiky": 0.2}.get(look.hair_style, 0.06))
    tall = max(tall, {"none": 0.0, "party": 0.55}.get(look.hat, 0.2))
    flat = np.concatenate([skeleton.wrists, skeleton.elbows, skeleton.toes, skeleton.head[:, None]], axis=1)
    x, y = flat[..., 0], flat[..., 1] + CAMERA_TILT * flat[..., 2]
    radius = np.array([body.hand * 1.7] * 2 + [body.arm_radius] * 2 + [0.045] * 2 + [body.head_width * 0.6])
    up, down = radius.copy(), radius.copy()
    up[-1], down[-1] = body.head * (0.5 + tall), 0
    return (x - radius).min(1), (x + radius).max(1), (y - up).min(1), (y + down).max(1)


class _Artist:
    """Draws the frames of one puppet. Everything that is constant over frames is computed once."""

    headless = False
    region = _BODY  # label of the shapes that are drawn

    def __init__(
        self,
        character: Character,
        skeleton: Skeleton,
        scale: float,
        floor: float,
        sway: np.ndarray,
        still: np.ndarray,
    ):
        self.body, self.look, self.skeleton = character.body, character.look, skeleton
        self.pixels = pixels = len(still)
        self.dimmed = (still * 0.84).astype(np.uint8)  # background inside the shadow
        self.unit = scale * pixels  # canvas pixels per standing height
        self.floor = floor * pixels
        self.sway = sway * self.unit
        self.line = 0.0105 * self.unit  # outline width
        self.points = {
            name: self._project(getattr(skeleton, name))
            for name in (
                "neck",
                "pelvis",
                "head",
                "shoulders",
                "elbows",
                "wrists",
                "hips",
                "knees",
                "ankles",
                "toes",
            )
        }
        self._prepare_head()

    def _project(self, points: np.ndarray) -> np.ndarray:
        """`[..., 3]` in standing heights -> complex `[...]` in canvas pixels."""
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        return self.unit * x + 1j * (self.floor + self.unit * (y + CAMERA_TILT * z))

    def _prepare_head(self) -> None:
        """Rotate and foreshorten the features with the head, and compute the outline of the skull."""
        features = _head_features(self.look)
        body = self.body
        radii = 0.5 * np.array([body.head_width, body.head, body.head_width])
        stacked = np.concatenate(list(features.values())) * radii
        turned = np.einsum("fij,nj->fni", self.skeleton.head_axes, stacked)
        flat = turned[..., :2].copy()
        # Move features on the far side to the silhouette of the head; otherwise they would show through.
        rim = np.linalg.norm(turned[..., :2] / radii[:2], axis=-1, keepdims=True)
        flat = np.where(
            turned[..., 2:] < 0,
            flat / np.maximum(rim, 1e-6) * np.linalg.norm(stacked / radii, axis=-1)[:, None],
            flat,
        )
        screen = self.points["head"][:, None] + self.unit * (flat[..., 0] + 1j * flat[..., 1])
        true = self.points["head"][:, None] + self.unit * (turned[..., 0] + 1j * turned[..., 1])
        self.features, self.depths = {}, {}
        start = 0
        for name, points in features.items():
            part = slice(start, start + len(points))
            exact = name.startswith(("ear", "eye", "nose"))
            self.features[name] = (true if exact else screen)[:, part]
            self.depths[name] = turned[:, part, 2].mean(1) / radii[0]
            start += len(points)
        down = self.skeleton.head_axes[:, :2, 1]
        down = down[:, 0] + 1j * down[:, 1]
        self.upright = down / np.abs(down) / 1j  # rotation from head coordinates x + iy to the image

        x, y = np.cos(_HEAD_TURN), np.sin(_HEAD_TURN)
        power = 1 - 0.5 * body.square
        x, y = np.sign(x) * np.abs(x) ** power, np.sign(y) * np.abs(y) ** power
        x = x * (1 - body.jaw * np.clip(y, 0, 1) ** 1.5)
        self.rx, self.ry = radii[0] * self.unit, radii[1] * self.unit
        self.skull = self.rx * x + 1j * self.ry * y

    def keypoints(self, size: int) -> np.ndarray:
        p, f = self.points, self.features
        columns = [f["nose"].mean(1), p["neck"]]
        for side in range(2):
            columns += [p["shoulders"][:, side], p["elbows"][:, side], p["wrists"][:, side]]
        for side in range(2):
            columns += [p["hips"][:, side], p["knees"][:, side], p["ankles"][:, side]]
        hidden = ["eye right", "eye left", "ear right", "ear left"]
        columns += [f[name][:, 0] for name in hidden]
        points = np.stack(columns, axis=1) * (size / self.pixels)
        scores = np.ones(points.shape)
        for column, name in enumerate(hidden, start=14):
            scores[:, column] = self.depths[name] > -0.45
        if self.headless:
            scores[:, [0, 14, 15, 16, 17]] = 0
        return np.stack([points.real, points.imag, scores], axis=-1).astype(np.float32)

    # Strokes

    @contextmanager
    def _labelled(self, region: int) -> Iterator[None]:
        """Label the shapes that the block draws."""
        outer, self.region = self.region, region
        yield
        self.region = outer

    def _fill(self, outline: np.ndarray, colour: Colour) -> None:
        cv2.fillPoly(self.canvas, (_fixed(outline),), (*colour, self.region), cv2.LINE_8, _SHIFT)

    def _shape(self, outline: np.ndarray, colour: Colour, line: Colour | None = None) -> None:
        """Draw a filled shape with an outline outside of it."""
        points = _fixed(outline)
        edge = (*(line or shade(colour, 0.5)), self.region)
        cv2.polylines(self.canvas, (points,), True, edge, max(1, round(2 * self.line)), cv2.LINE_8, _SHIFT)
        cv2.fillPoly(self.canvas, (points,), (*colour, self.region), cv2.LINE_8, _SHIFT)

    def _ball(self, centre: complex, radius: float, colour: Colour, outlined: bool = True) -> None:
        (self._shape if outlined else self._fill)(centre + radius * _ROUND, colour)

    def _capsule(self, a: complex, b: complex, ra: float, rb: float, colour: Colour) -> None:
        front = _FRONT * ((b - a) / max(abs(b - a), 1e-6))
        outline = _fixed(np.concatenate([b + rb * front, a - ra * front]))
        cv2.fillConvexPoly(self.canvas, outline, (*colour, self.region), cv2.LINE_8, _SHIFT)

    def _limb(self, joints: list[complex], radii: list[float], colour: Colour, light: float = 1.0) -> None:
        """Draw a chain of tapered capsules: outline, shaded side, lit side."""
        colour = shade(colour, light)
        passes = ((self.line, 0.0, shade(colour, 0.5)), (0.0, 0.0, shade(colour, 0.84)), (None, 0.2, colour))
        for grow, offset, paint in passes:
            for k in range(len(joints) - 1):
                a, b, ra, rb = joints[k], joints[k + 1], radii[k], radii[k + 1]
                ra, rb = (0.78 * ra, 0.78 * rb) if grow is None else (ra + grow, rb + grow)
                self._capsule(a - offset * ra * (1 + 0.6j), b - offset * rb * (1 + 0.6j), ra, rb, paint)

    # The puppet, from back to front

    def draw(self, index: int, canvas: np.ndarray) -> np.ndarray:
        """Draw frame `index` on `canvas` `[H, W, 4]` (RGB, label of the region)."""
        self.canvas = canvas
        self.at = {name: points[index] for name, points in self.points.items()}
        self.face = {name: points[index] for name, points in self.features.items()}
        self.depth = {name: float(depth[index]) for name, depth in self.depths.items()}
        self.up = self.upright[index]
        self.yaw = float(self.skeleton.torso_yaw[index])
        self.swing = self.sway[index]
        self._torso_frame()
        self._shadow(index)
        if self.look.tail != "none":
            self._tail()
        if not self.headless:
            with self._labelled(_HAIR_EARS):
                self._back_hair()

        depths = {
            name: getattr(self.skeleton, name)[index][..., 2]
            for name in ("shoulders", "elbows", "wrists", "knees", "ankles")
        }
        behind = []
        for side in range(2):
            upper = depths["shoulders"][side] * 0.6 + depths["elbows"][side] * 0.4 < -0.035
            lower = depths["elbows"][side] * 0.4 + depths["wrists"][side] * 0.6 < -0.045
            behind.append((upper, lower))
        for side in range(2):
            self._arm(side, *behind[side], back=True)
        for side in map(int, np.argsort(depths["knees"] + 0.5 * depths["ankles"])):
            self._leg(side)
        self._hips()
        self._torso()
        if not self.headless:
            with self._labelled(_FACE):
                self._head()
        for side in map(int, np.argsort(depths["wrists"])):
            self._arm(side, *behind[side], back=False)
        return canvas

    def _shadow(self, index: int) -> None:
        ankles = self.skeleton.ankles[index]
        x = self.unit * float(ankles[:, 0].mean())
        width = self.unit * (0.5 * abs(float(ankles[1, 0] - ankles[0, 0])) + 0.1)
        centre = x + 1j * (self.floor - 0.004 * self.unit)
        top, bottom = max(int(centre.imag - 0.03 * self.unit), 0), int(centre.imag + 0.03 * self.unit) + 2
        left, right = max(int(x - width), 0), int(x + width) + 2
        area = self.canvas[top:bottom, left:right]
        spot = np.zeros(area.shape[:2], np.uint8)
        outline = centre - left - 1j * top + width * _ROUND.real + 0.026j * self.unit * _ROUND.imag
        cv2.fillPoly(spot, (_fixed(outline),), (1,), cv2.LINE_8, _SHIFT)
        area[...] = np.where(spot[..., None], self.dimmed[top:bottom, left:right], area)

    def _torso_frame(self) -> None:
        """Compute half width and tilt of the trunk in the image, from neck (v = 0) to pelvis (v = 1)."""
        at = self.at
        spine = at["pelvis"] - at["neck"]
        self.spine = spine
        along = spine / abs(spine)
        across = along / 1j  # towards the left side of a puppet that faces the viewer
        line_s = (at["shoulders"][1] - at["shoulders"][0]) / 2
        line_h = (at["hips"][1] - at["hips"][0]) / 2

        def split(line: complex) -> tuple[float, float]:
            local = line / across
            return local.real, local.imag

        self.along, self.across = along, across
        self.half = np.array([split(line_s)[0], split(line_h)[0]])
        self.slope = np.array([split(line_s)[1], split(line_h)[1]])

    def _side(self, u: np.ndarray | float, v: np.ndarray | float) -> np.ndarray:
        """Points of the trunk: u in [-1, 1] from its right to its left edge, v in [0, 1] from shoulders to pelvis."""
        u, v = np.broadcast_arrays(np.asarray(u, float), np.asarray(v, float))
        t = np.clip(v, 0, 1)
        half = self.half[0] * (1 - t) + self.half[1] * t
        slope = self.slope[0] * (1 - t) + self.slope[1] * t
        depth = self.body.depth * self.unit * (0.75 + 0.25 * t)
        waist = 1 + (self.body.waist - 1) * np.sin(np.pi * t) ** 1.5
        shoulders = np.sqrt(np.clip((v + 0.16) / 0.2, 0, 1))  # round shoulders
        width = (np.sqrt(half**2 + (0.5 * depth) ** 2) + 0.55 * depth) * waist * (0.45 + 0.55 * shoulders)
        return (
            self.at["neck"]
            + v * self.spine
            + u * (self.across * width + 1j * self.across * slope * np.minimum(1, shoulders))
        )

    def _band(self, v0: float, v1: float, u0: float = -1.0, u1: float = 1.0) -> np.ndarray:
        v = np.linspace(v0, v1, max(2, round(abs(v1 - v0) * 10)))
        return np.concatenate([self._side(u0, v), self._side(u1, v[::-1])])

    def _mark(self, u: float, v: float, outline: np.ndarray, size: float) -> np.ndarray:
        """Outline of an emblem at (u, v), rotated and foreshortened with the chest."""
        turn = np.clip(self.yaw + u * 1.1, -1.45, 1.45)
        centre = self._side(np.sin(turn), v)
        flat = outline.real * np.cos(turn) + 1j * outline.imag
        return centre + size * flat * self.across

    def _arm(self, side: int, upper_behind: bool, lower_behind: bool, back: bool) -> None:
        if back not in (upper_behind, lower_behind):
            return
        look, body, unit = self.look, self.body, self.unit
        shoulder, elbow, wrist = (self.at[name][side] for name in ("shoulders", "elbows", "wrists"))
        r = body.arm_radius * unit
        joints, radii = [shoulder, elbow, wrist], [1.08 * r, 0.95 * r, 0.85 * r]
        light = 0.9 if back else 1.0
        is_one_layer = upper_behind == lower_behind
        do_upper, do_lower = upper_behind == back, lower_behind == back
        parts = slice(0, 3) if is_one_layer else (slice(0, 2) if do_upper else slice(1, 3))
        self._limb(joints[parts], radii[parts], look.skin, light)
        if do_lower:
            with self._labelled(_HANDS):
                self._hand(elbow, wrist, light)
        sleeve = {"tee": 0.62, "long": 1.9, "hoodie": 1.9, "jacket": 1.9}.get(look.top, 0.0)
        if sleeve > 1:
            end = elbow + (wrist - elbow) * (sleeve - 1)
            chain = [shoulder, elbow, end]
            self._limb(chain[parts], [1.25 * r, 1.15 * r, 1.08 * r][parts], look.top_colour, light)
            if do_lower and (look.top != "long" or look.pattern in ("stripes", "band", "halves")):
                self._fill(_bar(elbow, end, 0.85, 0.6 * r, 1.1 * r), shade(look.top_accent, light))
        elif sleeve and do_upper:
            end = shoulder + (elbow - shoulder) * sleeve
            self._limb([shoulder, end], [1.28 * r, 1.32 * r], look.top_colour, light)
            if look.pattern in ("stripes", "band"):
                self._fill(_bar(shoulder, end, 0.85, 0.55 * r, 1.31 * r), shade(look.top_accent, light))

    def _hand(self, elbow: complex, wrist: complex, light: float) -> None:
        look, r = self.look, self.body.hand * self.unit
        colour = shade(look.glove or look.skin, light)
        turn = (wrist - elbow) / max(abs(wrist - elbow), 1e-6)
        middle = wrist + 0.55 * r * turn
        inward = -1j if (middle - self.at["neck"]).real > 0 else 1j
        self._ball(middle + 0.75 * r * turn * inward + 0.1 * r * turn, 0.42 * r, shade(colour, 0.95))
        self._shape(middle + turn * (1.12 * r * _ROUND.real + 1j * 0.95 * r * _ROUND.imag), colour)
        if look.glove:
            self._ball(wrist - 0.3 * r * turn, 0.6 * r, shade(colour, 0.8), outlined=False)

    def _leg(self, side: int) -> None:
        look, body, unit = self.look, self.body, self.unit
        hip, knee, ankle, toe = (self.at[name][side] for name in ("hips", "knees", "ankles", "toes"))
        r = body.leg_radius * unit
        skin = look.skin
        self._limb([hip, knee, ankle], [1.15 * r, 0.92 * r, 0.72 * r], skin)
        if look.sock:
            self._limb([knee + (ankle - knee) * 0.62, ankle], [0.86 * r, 0.82 * r], look.sock)
        heel = ankle + 0.012j * unit
        low, foot = 0.015j * unit, 0.034 * unit * (0.7 + 0.3 * r / (0.04 * unit))
        barefoot = look.bottom == "bare" and look.top == "bare"
        shoe = shade(skin, 0.9) if barefoot else look.shoe
        if not barefoot:
            self._limb(
                [heel + low, toe + low],
                [0.92 * foot, foot],
                (250, 250, 250) if sum(shoe) < 690 else shade(shoe, 0.75),
            )
        self._limb([heel, toe], [0.92 * foot, 1.0 * foot], shoe)
        if look.bottom in ("trousers", "striped"):
            end = knee + (ankle - knee) * 0.88
            self._limb([hip, knee, end], [1.28 * r, 1.1 * r, 1.02 * r], look.bottom_colour)
            if look.bottom == "striped":
                self._fill(_bar(hip, knee, 0.6, 0.5 * r, 1.18 * r), look.bottom_accent)
                self._fill(_bar(knee, end, 0.6, 0.5 * r, 1.06 * r), look.bottom_accent)
        elif look.bottom in ("shorts",):
            self._limb([hip, hip + (knee - hip) * 0.72], [1.3 * r, 1.34 * r], look.bottom_colour)

    def _hips(self) -> None:
        look, at = self.look, self.at
        r = self.body.leg_radius * self.unit
        colour = look.skin if look.bottom == "bare" else look.bottom_colour
        if look.bottom == "skirt":
            flare = 1.5 * r
            thighs = [at["hips"][s] + (at["knees"][s] - at["hips"][s]) * 0.66 for s in range(2)]
            outward = [-self.across * 0.7 * r, self.across * 0.7 * r]
            circles = [at["hips"][s] + 1.3 * r * _ROUND for s in range(2)]
            circles += [thighs[s] + outward[s] + 0.55 * r * _ROUND * flare / r for s in range(2)]
            outline = _hull(np.concatenate([*circles, self._side(np.array([-0.9, 0.9]), 0.82)]))
            self._shape(outline, colour)
            hem = [
                thighs[0] + outward[0] * 1.9,
                thighs[0] - 1j * r,
                thighs[1] - 1j * r,
                thighs[1] + outward[1] * 1.9,
            ]
            self._fill(
                np.array([hem[0] + 0.55j * r, hem[3] + 0.55j * r, hem[3] - 0.05j * r, hem[0] - 0.05j * r]),
                look.bottom_accent,
            )
            return
        pelvis = np.concatenate(
            [
                at["hips"][0] + 1.22 * r * _ROUND,
                at["hips"][1] + 1.22 * r * _ROUND,
                self._side(np.array([-0.95, 0.95]), 0.8),
            ]
        )
        self._fill(_hull(pelvis), colour)

    def _torso(self) -> None:
        look = self.look
        bare = look.top == "bare"
        base = look.skin if bare else look.top_colour
        accent = look.top_accent
        self._limb(
            [self.at["neck"] - 0.02 * self.spine, self.at["neck"] * 0.35 + self.at["head"] * 0.65],
            [0.04 * self.unit] * 2,
            look.skin,
            0.88,
        )
        end = 0.98 if bare else 0.93
        self._shape(self._band(-0.15, end), shade(base, 0.86))
        self._fill(self._band(-0.13, end - 0.01, -0.98, 0.72), base)
        if bare and look.belly:
            self._fill(
                self._mark(
                    0,
                    0.58,
                    1.0 * _ROUND.real + 1.35j * _ROUND.imag,
                    0.2 * abs(self.spine) + 0.3 * self.half[1],
                ),
                shade(base, 1.5),
            )
        if look.pattern == "stripes" and not bare:
            for v in (0.1, 0.4, 0.7):
                self._fill(self._band(v, v + 0.14), accent)
        elif look.pattern == "band":
            self._fill(self._band(0.22, 0.5), accent)
        elif look.pattern == "halves":
            self._fill(self._band(0.45, end), accent)
        elif look.pattern == "dots":
            for v, us in ((0.12, (-0.62, 0.0, 0.62)), (0.42, (-0.32, 0.32)), (0.72, (-0.62, 0.0, 0.62))):
                for u in us:
                    self._fill(
                        self._mark(u, v, _ROUND, 0.085 * abs(self.spine) + 0.03 * self.half[0]), accent
                    )
        elif look.pattern in _EMBLEMS:
            self._fill(
                self._mark(0, 0.4, _EMBLEMS[look.pattern], 0.2 * abs(self.spine) + 0.16 * abs(self.half[0])),
                accent,
            )
        if look.top == "jacket":
            inner = np.sin(np.clip(self.yaw, -1, 1)) * 0.8
            edge = np.linspace(-0.1, end, 6)
            self._fill(
                np.concatenate([self._side(inner - 0.32, edge), self._side(inner + 0.32, edge[::-1])]), accent
            )
        elif look.top == "hoodie":
            self._fill(
                self._mark(
                    0, 0.74, np.array([-1 - 0.5j, 1 - 0.5j, 1.4 + 0.6j, -1.4 + 0.6j]), 0.2 * abs(self.spine)
                ),
                shade(base, 0.78),
            )
            self._shape(self._band(-0.17, -0.02, -0.85, 0.85), shade(base, 0.92))
        if look.belt and not bare:
            self._fill(self._band(0.86, 0.96), look.belt)
            self._fill(
                self._mark(0, 0.91, np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j]), 0.06 * abs(self.spine)),
                (250, 214, 120),
            )
        if not bare and look.top != "hoodie":
            deep = 1.5 if look.top == "tank" else 1.0
            self._fill(
                self._mark(0, -0.06, _ROUND.real * 1.0 + 0.7j * deep * _ROUND.imag, 0.046 * self.unit),
                shade(look.skin, 0.92),
            )

    # Head and hair

    def _on_head(self, x: np.ndarray | float, y: np.ndarray | float) -> np.ndarray:
        """Convert points from head coordinates (half widths and half heights of the upright head) to the image."""
        return self.at["head"] + (self.rx * np.asarray(x) + 1j * self.ry * np.asarray(y)) * self.up

    def _spot(self, x: float, y: float) -> complex:
        """As `_on_head`, for one point."""
        return self.at["head"] + (self.rx * x + 1j * self.ry * y) * self.up

    def _shifted(self, name: str) -> float:
        """Horizontal shift of the feature `name` due to the rotation of the head, in half widths."""
        return float(((self.face[name].mean() - self.at["head"]) / self.up).real / self.rx)

    def _back_hair(self) -> None:
        style, colour = self.look.hair_style, shade(self.look.hair, 0.78)
        turn = -0.35 * self._shifted("nose")
        swing = self.swing / self.rx
        x, y = _ROUND.real, _ROUND.imag
        if style == "bob":
            drop = np.clip(y, 0, 1)
            self._shape(
                self._on_head(
                    turn + 1.2 * x * (1 + 0.12 * drop) + swing * drop,
                    0.02 + np.where(y > 0, np.minimum(1.5 * y, 0.92), 1.08 * y),
                ),
                colour,
            )
        elif style == "long":
            drop = np.clip(y, 0, 1)
            self._shape(
                self._on_head(
                    turn + 1.18 * x * (1 + 0.18 * drop) + 2 * swing * drop,
                    np.where(y > 0, np.minimum(2.6 * y, 2.0 + 0.12 * x), 1.08 * y),
                ),
                colour,
            )
        elif style == "afro":
            for angle in np.arange(0, 2 * np.pi, np.pi / 5):
                self._shape(
                    self._on_head(
                        turn + 0.92 * np.cos(angle) + 0.55 * x, -0.28 + 0.82 * np.sin(angle) + 0.5 * y
                    ),
                    self.look.hair,
                )
            self._fill(self._on_head(turn + 1.1 * x, -0.28 + 1.0 * y), self.look.hair)
        elif style == "ponytail":
            tip = self._spot(turn - 1.15 + 2.5 * swing, 1.1)
            self._limb(
                [self._spot(turn * 1.2, -0.75), self._spot(turn - 0.95 + swing, -0.35), tip],
                [0.3 * self.rx, 0.42 * self.rx, 0.14 * self.rx],
                self.look.hair,
                0.85,
            )
        elif style == "pigtails":
            for side in (-1, 1):
                root = self._spot(turn + side * 0.95, -0.35)
                self._limb(
                    [
                        root,
                        self._spot(turn + side * 1.45 + swing, 0.15),
                        self._spot(turn + side * 1.5 + 2.5 * swing, 1.05),
                    ],
                    [0.26 * self.rx, 0.4 * self.rx, 0.15 * self.rx],
                    self.look.hair,
                )
                self._ball(root, 0.2 * self.rx, self.look.top_accent)
        elif style == "bun":
            self._ball(self._spot(turn * 1.3, -1.22), 0.46 * self.rx, self.look.hair)

    def _outer(self, name: str, volume: float) -> np.ndarray:
        """Outline from the curve `name` over the top of the head."""
        curve = self.face[name]
        local = (curve[[-1, 0]] - self.at["head"]) / self.up
        end, start = np.angle(local.real / self.rx + 1j * local.imag / self.ry)
        end, start = (a if a < np.pi / 2 else a - 2 * np.pi for a in (end, start))
        over = np.linspace(end, start, 18)
        swell = volume + 0.04 * np.sin(np.linspace(0, np.pi, 18))
        return np.concatenate([curve, self._on_head(swell * np.cos(over), swell * np.sin(over))])

    def _head(self) -> None:
        look, face = self.look, self.face
        with self._labelled(_HAIR_EARS):
            self._on_top(behind=True)
            for side in ("right", "left"):
                if look.ears == "human" and self.depth[f"ear {side}"] <= 0.1:
                    self._ear(side)
        skull = self.at["head"] + self.skull * self.up
        self._shape(skull, shade(look.skin, 0.9))
        self._fill(
            self.at["head"] + (self.skull * 0.93 - 0.05 * self.rx - 0.05j * self.ry) * self.up, look.skin
        )
        if look.muzzle:
            self._fill(face["muzzle"], shade(look.skin, 1.5))
        if look.blush:
            blush = blend(look.skin, (255, 105, 110), 0.45)
            for side in ("right", "left"):
                self._fill(face[f"cheek {side}"], blush)
        if look.beard:
            self._fill(face["beard"], look.hair)
        self._mouth()
        dark = shade(look.skin, 0.28)
        for side in ("right", "left"):
            if look.glasses:
                self._fill(face[f"rim {side}"], look.glasses)
                self._fill(face[f"lens {side}"], (255, 255, 255))
            elif look.eye == "white":
                self._shape(face[f"white {side}"], (255, 255, 255), dark)
            self._fill(face[f"pupil {side}"], look.iris)
            self._fill(face[f"glint {side}"], (255, 255, 255))
            if look.ears == "human" or look.eye == "white":
                self._fill(
                    face[f"brow {side}"],
                    shade(look.hair, 0.8) if sum(look.hair) < 600 else shade(look.hair, 0.6),
                )
        self._fill(face["nose"], (60, 45, 50) if look.muzzle else shade(look.skin, 0.72))
        with self._labelled(_HAIR_EARS):
            self._hair()
            for side in ("right", "left"):
                if look.ears == "human" and self.depth[f"ear {side}"] > 0.1:
                    self._ear(side)
            self._on_top(behind=False)

    def _ear(self, side: str) -> None:
        centre = self.face[f"ear {side}"][0]
        if self.look.hair_style in ("bob", "long") and self.depth[f"ear {side}"] <= 0.1:
            return
        self._shape(
            centre + (0.19 * self.rx * _ROUND.real + 0.21j * self.ry * _ROUND.imag) * self.up,
            shade(self.look.skin, 0.95),
        )
        self._fill(
            centre + (0.09 * self.rx * _ROUND.real + 0.11j * self.ry * _ROUND.imag) * self.up,
            shade(self.look.skin, 0.74),
        )

    def _mouth(self) -> None:
        look, face = self.look, self.face
        if look.mouth == "smile":
            self._fill(face["mouth"], shade(look.skin, 0.32))
            return
        self._shape(face["mouth"], (112, 38, 48), shade(look.skin, 0.5))
        if look.mouth == "grin":
            self._fill(face["teeth"], (255, 255, 255))
        elif look.mouth == "tongue":
            self._fill(face["tongue"], (240, 120, 125))

    def _hair(self) -> None:
        look = self.look
        if look.hair_style == "none":
            return
        line = shade(look.hair, 0.55) if sum(look.hair) > 240 else shade(look.hair, 1.25)
        if look.hair_style == "tuft":
            turn = 0.3 * self._shifted("nose")
            for dx in (-0.2, 0.0, 0.2):
                self._shape(
                    self._on_head(
                        turn + np.array([dx - 0.14, dx * 2.2, dx + 0.14]), np.array([-0.92, -1.25, -0.92])
                    ),
                    look.hair,
                )
            return
        if look.hair_style == "mohawk":
            turn = 0.5 * self._shifted("nose")
            for y0, dx in ((-0.65, 0.0), (-0.85, 0.1), (-1.0, 0.2)):
                self._shape(
                    self._on_head(turn + np.array([-0.28, dx * 0.5, 0.28]), np.array([y0, y0 - 0.5, y0])),
                    look.hair,
                )
            return
        cap = self._outer("hairline", {"spiky": 1.06, "afro": 1.12}.get(look.hair_style, 1.1))
        if look.hair_style == "spiky":
            angles = np.radians(np.linspace(-170, -10, 15))
            reach = np.where(np.arange(15) % 2 == 1, 1.36, 1.0)
            self._shape(self._on_head(reach * np.cos(angles), reach * np.sin(angles)), look.hair, line)
        self._shape(cap, look.hair, line)
        if look.hair_style == "spiky":
            self._fill(self._on_head(0.98 * np.cos(angles), 0.98 * np.sin(angles)), look.hair)
        # highlight
        shine = np.radians(np.linspace(-135, -85, 8))
        ring = np.concatenate(
            [
                self._on_head(0.93 * np.cos(shine), 0.97 * np.sin(shine)),
                self._on_head(0.84 * np.cos(shine[::-1]), 0.86 * np.sin(shine[::-1])),
            ]
        )
        self._fill(ring, shade(look.hair, 1.3))
        if look.hair_style in ("bob", "long"):  # strands next to the face
            low = 0.75 if look.hair_style == "bob" else 1.25
            for side, name in ((-1, "right"), (1, "left")):
                if self.depth[f"ear {name}"] > -0.75:
                    x = side * np.array([1.16, 0.98, 0.84, 0.9, 1.2])
                    y = np.array([-0.35, -0.45, 0.1, low, low])
                    self._fill(
                        self._on_head(x + np.array([0, 0, 0, 1, 1]) * self.swing / self.rx, y), look.hair
                    )

    def _on_top(self, behind: bool) -> None:
        """Draw ears of animals, horns and antennae (`behind` the head), or hats and the other parts in front of it."""
        look = self.look
        turn = self._shifted("nose")
        x, y = _ROUND.real, _ROUND.imag
        if behind:
            inner = blend(look.skin, (255, 170, 180), 0.5)
            for side in (-1, 1):
                squeeze = 1 - 0.25 * side * turn
                offset = -0.3 * turn + side * 0.62 * squeeze
                lag = 1.2 * self.swing / self.rx
                if look.ears == "cat":
                    tip = self._spot(offset + side * 0.28 + 0.3 * lag, -1.42)
                    base = self._on_head(
                        offset + np.array([-0.4, 0.4]),
                        np.array([-0.68, -0.68]) + side * np.array([-0.12, 0.2]),
                    )
                    self._shape(np.array([base[0], tip, base[1]]), look.skin)
                    middle = (base.sum() + tip) / 3
                    self._fill(middle + 0.55 * (np.array([base[0], tip, base[1]]) - middle), inner)
                elif look.ears == "round":
                    self._shape(self._on_head(offset * 1.15 + 0.42 * x, -0.82 + 0.42 * y), look.skin)
                    self._fill(self._on_head(offset * 1.15 + 0.23 * x, -0.82 + 0.23 * y), inner)
                elif look.ears == "bunny":
                    root, tip = self._spot(offset * 0.7, -0.8), self._spot(offset * 0.95 + lag, -1.62)
                    self._limb([root, tip], [0.2 * self.rx, 0.25 * self.rx], look.skin)
                    self._capsule(root, tip, 0.11 * self.rx, 0.11 * self.rx, inner)
                elif look.ears == "pointed":
                    base = self._on_head(-0.2 * turn + side * 0.85, np.array([-0.3, 0.3]))
                    tip = self._spot(-0.3 * turn + side * 1.55, -0.35 + 0.2 * lag)
                    self._shape(np.array([base[0], tip, base[1]]), look.skin)
                    middle = (base.sum() + tip) / 3
                    self._fill(middle + 0.5 * (np.array([base[0], tip, base[1]]) - middle), inner)
                if look.horns == "horns":
                    chain = [
                        self._spot(offset * 0.8, -0.8),
                        self._spot(offset * 1.05, -1.2),
                        self._spot(offset * 0.95, -1.5),
                    ]
                    self._limb(chain, [0.17 * self.rx, 0.13 * self.rx, 0.04 * self.rx], (250, 236, 205))
                elif look.horns == "antennae":
                    tip = self._spot(offset * 0.95 + lag, -1.45)
                    self._limb(
                        [self._spot(offset * 0.45, -0.85), tip], [0.06 * self.rx] * 2, shade(look.skin, 0.7)
                    )
                    self._ball(tip, 0.17 * self.rx, look.top_accent)
            if look.horns == "unicorn":
                self._limb(
                    [self._spot(0.35 * turn, -0.85), self._spot(0.45 * turn, -1.5)],
                    [0.18 * self.rx, 0.03 * self.rx],
                    (255, 222, 130),
                )
            return
        if look.hat == "beanie":
            self._shape(self._outer("brim", 1.13), look.hat_colour)
            band = self.face["brim"]
            self._shape(
                np.concatenate([band, band[::-1] - 0.26 * self.ry * 1j * self.up]),
                shade(look.hat_colour, 1.35),
            )
            self._ball(self._spot(-0.1 * turn, -1.2), 0.2 * self.rx, shade(look.hat_colour, 1.5))
        elif look.hat == "cap":
            self._shape(self._outer("brim", 1.12), look.hat_colour)
            self._shape(self.face["cap peak"], shade(look.hat_colour, 0.75))
        elif look.hat == "party":
            self._shape(
                self._on_head(0.2 * turn + np.array([-0.5, 0.0, 0.5]), np.array([-0.85, -1.8, -0.85])),
                look.hat_colour,
            )
            self._ball(self._spot(0.2 * turn, -1.8), 0.15 * self.rx, look.top_accent)

    def _tail(self) -> None:
        look, unit = self.look, self.unit
        start = self.at["pelvis"]
        way = 1 if look.pattern in ("plain", "stripes") else -1
        wag = 1.2 * self.swing
        bend = [
            start + unit * (way * dx + 1j * dy) + wag * k
            for k, (dx, dy) in enumerate(((0, 0), (0.12, 0.01), (0.18, -0.07), (0.2, -0.16)))
        ]
        radius = unit * (0.022 if look.tail == "thin" else 0.045)
        sizes = [0.9, 1.0, 1.1, 0.9] if look.tail == "bushy" else [1.0, 1.0, 0.9, 0.8]
        self._limb(bend, [radius * s for s in sizes], look.skin, 0.9)
        self._ball(bend[-1], radius * 1.15, shade(look.skin, 1.4))


def _head_features(look: Look) -> dict[str, np.ndarray]:
    """Points `[N, 3]` of each facial feature on the unit sphere; the head is an ellipsoid."""
    eye, up = 0.27 * look.eye_size, 0.30 * look.eye_size
    brow = 0.46 + 0.3 * (look.eye_size - 1)
    features: dict[str, np.ndarray] = {}

    def disc(name: str, azimuth: float, elevation: float, a: float, b: float, lift: float = 1.0) -> None:
        features[name] = lift * _sphere(azimuth + a * _ROUND.real, elevation + b * _ROUND.imag)

    for side, name in ((-1, "right"), (1, "left")):
        disc(f"white {name}", side * 0.46, 0.02, eye, up)
        disc(f"pupil {name}", side * 0.44, 0.0, eye * 0.7, up * 0.76)
        disc(f"glint {name}", side * 0.44 - 0.07, 0.1, eye * 0.27, up * 0.27)
        disc(f"cheek {name}", side * 0.72, -0.4, 0.2, 0.13)
        disc(f"rim {name}", side * 0.47, 0.0, eye * 1.5, up * 1.38, 1.03)
        disc(f"lens {name}", side * 0.47, 0.0, eye * 1.22, up * 1.14, 1.03)
        x = np.linspace(-0.25, 0.25, 7)
        arch = brow + 0.05 * np.cos(x * 6) + look.brow * x * side
        features[f"brow {name}"] = _sphere(
            np.concatenate([side * 0.46 + x, side * 0.46 + x[::-1]]),
            np.concatenate([arch + 0.055, arch[::-1] - 0.055]),
        )
        features[f"ear {name}"] = np.array([[side * 1.0, 0.05, 0.0]])
        features[f"eye {name}"] = _sphere(np.array([side * 0.46]), np.array([0.02]))
    disc("nose", 0.0, -0.2, 0.11, 0.085, 1.05)
    disc("muzzle", 0.0, -0.42, 0.52, 0.33, 1.0)
    x = np.linspace(-1, 1, 11)
    if look.mouth == "o":
        disc("mouth", 0.0, -0.56, 0.13, 0.15)
    else:
        open_up, wide = (0.25, 0.32) if look.mouth != "smile" else (0.13, 0.34)
        upper = -0.47 - 0.06 * (1 - x**2) + (0.05 if look.mouth == "smile" else 0.0) * x**2
        lower = upper - open_up * (1 - x**2) ** 0.7
        features["mouth"] = _sphere(
            np.concatenate([wide * x, wide * x[::-1]]), np.concatenate([upper, lower[::-1]])
        )
        teeth = np.maximum(upper - 0.12, lower)
        features["teeth"] = _sphere(
            np.concatenate([wide * x, wide * x[::-1]]) * 0.9, np.concatenate([upper - 0.015, teeth[::-1]])
        )
    disc("tongue", 0.02, -0.7, 0.15, 0.09)
    x = np.linspace(-1.85, 1.85, 25)
    hairline = {
        "straight": 0.5 - 0.5 * np.clip(np.abs(x) - 0.9, 0, 1) ** 2 * 1.2,
        "side": 0.62 + 0.26 * np.cos(x * 1.5 + 1.0) - 0.6 * np.clip(np.abs(x) - 1.0, 0, 1),
        "curtain": 0.92 - 0.5 * np.minimum(np.abs(x), 1.0) - 0.5 * np.clip(np.abs(x) - 1.1, 0, 1),
        "zigzag": 0.56 + 0.13 * (-1.0) ** np.arange(25) - 0.5 * np.clip(np.abs(x) - 1.0, 0, 1),
    }[look.fringe] + (0.08 + 0.3 * (look.eye_size - 1)) * np.exp(-(x**2))
    features["hairline"] = 1.04 * _sphere(x, hairline)
    features["brim"] = 1.08 * _sphere(x, 0.52 + 0 * x)
    features["cap peak"] = np.concatenate(
        [
            1.08 * _sphere(x[7:18], 0.5 + 0 * x[7:18]),
            1.45 * _sphere(x[7:18] * 0.8, 0.3 + 0 * x[7:18])[::-1],
        ]
    )
    beard_turn = np.linspace(-1.5, 1.5, 15)
    features["beard"] = np.concatenate(
        [
            1.02 * _sphere(beard_turn, -0.12 - 0.24 * np.cos(beard_turn)),
            1.02 * _sphere(beard_turn, -0.4 - 0.75 * np.cos(beard_turn))[::-1],
        ]
    )
    return features


def _fixed(outline: np.ndarray) -> np.ndarray:
    """Complex `[N]` -> OpenCV's fixed-point coordinates `[N, 2]`."""
    return (outline.view(np.float64) * (1 << _SHIFT)).astype(np.int32).reshape(-1, 2)


def _sphere(azimuth: np.ndarray, elevation: np.ndarray) -> np.ndarray:
    """Points of the unit sphere `[N, 3]`. Azimuth 0 and elevation 0 point towards the viewer."""
    return np.stack(
        [np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), np.cos(azimuth) * np.cos(elevation)],
        axis=-1,
    )


def _bar(a: complex, b: complex, t: float, length: float, radius: float) -> np.ndarray:
    """Outline of a stripe across the limb from a to b, shortened when the limb points towards the viewer."""
    turn = (b - a) / max(abs(b - a), 1e-6)
    side, half = 1j * turn * radius, turn * min(length, 0.15 * abs(b - a))
    p, q = a + t * (b - a) - half, a + t * (b - a) + half
    return np.array([p - side, q - side, q + side, p + side])


def _hull(points: np.ndarray) -> np.ndarray:
    flat = np.stack([points.real, points.imag], axis=-1).astype(np.float32)
    hull = cv2.convexHull(flat)[:, 0].astype(float)
    return hull[:, 0] + 1j * hull[:, 1]


def _emblems() -> dict[str, np.ndarray]:
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    spikes = np.where(np.arange(10) % 2 == 0, 1.15, 0.5) * np.exp(
        1j * (np.arange(10) * np.pi / 5 - np.pi / 2)
    )
    heart = (
        np.sin(t) ** 3 - 1j * (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    )
    return {"star": spikes, "heart": 0.95 * heart, "disc": 0.9 * _ROUND}


_EMBLEMS = _emblems()
