"""Characters: body proportions and appearance of a puppet, sampled from a seeded generator."""

import colorsys
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Distribution = Literal["wide", "dance", "bizarre"]
Colour = tuple[float, float, float]  # RGB, 0 to 255


@dataclass(frozen=True)
class Body:
    """Body lengths in standing heights (floor to top of the head = 1)."""

    head: float  # height of the head
    head_width: float
    neck: float  # midpoint of the shoulders to the chin
    torso: float  # midpoint of the shoulders to the pelvis
    shoulder: float  # half the shoulder distance
    hip: float
    upper_arm: float
    forearm: float
    thigh: float
    shin: float
    ankle: float  # height of the ankle above the floor
    foot: float
    arm_radius: float
    leg_radius: float
    hand: float  # radius
    waist: float  # waist width relative to the straight line from shoulders to hips
    depth: float  # half the torso thickness
    jaw: float  # 0: round chin, 0.3: narrow chin
    square: float  # head shape; 0: ellipse, 1: rounded box


@dataclass(frozen=True)
class Look:
    """Colours and styles. render.py draws each style."""

    skin: Colour
    hair: Colour
    hair_style: str
    fringe: str
    top: str
    top_colour: Colour
    top_accent: Colour
    pattern: str
    bottom: str
    bottom_colour: Colour
    bottom_accent: Colour
    shoe: Colour
    sock: Colour | None
    belt: Colour | None
    glove: Colour | None
    eye: str
    eye_size: float
    iris: Colour
    mouth: str
    brow: float
    blush: bool
    beard: bool
    glasses: Colour | None
    hat: str
    hat_colour: Colour
    ears: str
    horns: str
    tail: str
    muzzle: bool
    belly: bool


@dataclass(frozen=True)
class Character:
    body: Body
    look: Look
    height: float  # standing height as a fraction of the image height


SKINS = ["ffdfc8", "fbd0b0", "f3bf95", "e5a877", "cf8f5e", "bb7d52", "a3683f", "8d5836", "7b4b30"]
FUR = [
    "8fd6a0",
    "7cc7f0",
    "b99af0",
    "f79ac0",
    "ffc95a",
    "f58b5c",
    "6fd0c8",
    "c8d85a",
    "e4e6f0",
    "a0724e",
    "ee6a6a",
]
HAIR = ["2a1d1a", "3c2618", "5d3a1f", "8a5a2b", "b9823c", "e7bd5d", "b5482a", "8f8f98", "22222e"]
DYED = ["f2638f", "5a7bea", "58b894", "9a5fd6", "f08a3c", "e5e3f2", "35b6cf"]
# Palettes of matching colours: top, accent, bottom, shoes.
PALETTES = [
    ["f25c54", "ffe1a8", "33658a", "fdfdfd"],
    ["2a9d8f", "f4f1de", "264653", "e76f51"],
    ["f4a261", "fff3d6", "4a4e69", "2b2d42"],
    ["6a4c93", "ffca3a", "2f2a4a", "ff595e"],
    ["ff8fab", "ffffff", "5a67b5", "fb6f92"],
    ["ffd23f", "ee4266", "3b6fb6", "ffffff"],
    ["3a86ff", "ffffff", "3b3f55", "ffbe0b"],
    ["06a77d", "d5f2e3", "c6975c", "5c3d2e"],
    ["fafafa", "e63946", "1d3557", "e63946"],
    ["ef476f", "ffd166", "118ab2", "073b4c"],
    ["8ac926", "fdffe0", "5e548e", "ffca3a"],
    ["9b5de5", "fee440", "00a6c8", "f15bb5"],
    ["e07a5f", "f4f1de", "3d405b", "81b29a"],
    ["2d3142", "ef8354", "8d99ae", "ef8354"],
    ["00b4d8", "fff1b8", "e9764f", "023e8a"],
    ["c1446b", "ffd6e0", "46507a", "fdfdfd"],
    ["fcbf49", "d62828", "003f5c", "d62828"],
    ["7209b7", "f8a5d8", "3f37c9", "ffffff"],
    ["f7ede2", "84a59d", "b5654a", "5b4636"],
    ["43aa8b", "f9c74f", "577590", "f3722c"],
]


def rgb(code: str) -> Colour:
    """Convert a hexadecimal colour code such as "ff8fab" to RGB."""
    return int(code[0:2], 16), int(code[2:4], 16), int(code[4:6], 16)


def shade(colour: Colour, light: float) -> Colour:
    """Darken and cool a colour (`light` < 1), or lighten it towards white (`light` > 1)."""
    if light > 1:
        r, g, b = (c + (255 - c) * (light - 1) for c in colour)
    else:
        r, g, b = colour[0] * light, colour[1] * light, colour[2] * (light + 0.25 * light * (1 - light))
    return r, g, b


def blend(colour: Colour, other: Colour, fraction: float) -> Colour:
    """Mix two colours; `fraction` is the weight of `other`, in [0, 1]."""
    r, g, b = ((1 - fraction) * c + fraction * d for c, d in zip(colour, other, strict=True))
    return r, g, b


def vary(rng: np.random.Generator, colour: Colour, hue: float = 0.02, spread: float = 0.08) -> Colour:
    """Jitter a colour: hue by up to `hue` of the circle, saturation and value by a relative `spread`."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    s, v = (x * rng.uniform(1 - spread, 1 + spread) for x in (s, v))
    r, g, b = colorsys.hsv_to_rgb((h + rng.uniform(-hue, hue)) % 1, min(s, 1), min(v, 1))
    return 255 * r, 255 * g, 255 * b


def _pick(rng: np.random.Generator, weights: dict[str, float]) -> str:
    p = np.array(list(weights.values()), dtype=float)
    return str(rng.choice(list(weights), p=p / p.sum()))


def sample_character(distribution: Distribution, rng: np.random.Generator) -> Character:
    """Sample a character from a distribution.

    `dance`: adults. `wide`: adults to cartoon figures with large heads, some animals or with dyed hair. `bizarre`:
    larger heads and shorter limbs than all of `wide`; horns, antennae, long ears, unusual skin colours.
    """
    if distribution == "dance":
        return Character(_adult(rng), _look(rng, "person"), rng.uniform(0.79, 0.86))
    if distribution == "wide":
        kind = _pick(rng, {"adult": 0.34, "child": 0.24, "chibi": 0.24, "lanky": 0.09, "stout": 0.09})
        body = {"adult": _adult, "child": _child, "chibi": _chibi, "lanky": _lanky, "stout": _stout}[kind](
            rng
        )
        being = _pick(rng, {"person": 0.74, "animal": 0.16, "dyed": 0.1})
        return Character(body, _look(rng, being), rng.uniform(0.79, 0.88))
    return Character(_bizarre(rng), _look(rng, "creature"), rng.uniform(0.78, 0.84))


def _body(
    rng: np.random.Generator, head: float, aspect: float, legs: float, arms: float, girth: float
) -> Body:
    """Build a body.

    Args:
        head: height of the head.
        aspect: width of the head divided by its height.
        legs, arms: length relative to the height below the chin.
        girth: thickness of limbs and trunk, 1 for an adult.
    """
    below_chin = 1 - head
    ankle, neck = 0.035, rng.uniform(0.02, 0.035) * below_chin / 0.78
    leg = below_chin * legs - ankle
    arm = below_chin * arms
    return Body(
        head=head,
        head_width=head * aspect,
        neck=neck,
        torso=below_chin - leg - ankle - neck,
        shoulder=below_chin * rng.uniform(0.135, 0.165) * girth**0.4,
        hip=below_chin * rng.uniform(0.075, 0.1) * girth**0.4,
        upper_arm=arm * 0.51,
        forearm=arm * 0.49,
        thigh=leg * 0.51,
        shin=leg * 0.49,
        ankle=ankle,
        foot=rng.uniform(0.055, 0.07),
        arm_radius=rng.uniform(0.027, 0.033) * girth,
        leg_radius=rng.uniform(0.036, 0.045) * girth,
        hand=rng.uniform(0.042, 0.048) * (0.6 + 0.4 * girth),
        waist=rng.uniform(0.78, 0.98),
        depth=rng.uniform(0.05, 0.062) * girth,
        jaw=rng.uniform(0.05, 0.2),
        square=0.0,
    )


def _adult(rng: np.random.Generator) -> Body:
    return _body(
        rng,
        rng.uniform(0.22, 0.26),
        rng.uniform(0.86, 0.96),
        rng.uniform(0.57, 0.62),
        0.45,
        rng.uniform(0.9, 1.15),
    )


def _child(rng: np.random.Generator) -> Body:
    body = _body(
        rng,
        rng.uniform(0.26, 0.34),
        rng.uniform(0.92, 1.08),
        rng.uniform(0.53, 0.59),
        0.45,
        rng.uniform(0.95, 1.25),
    )
    return replace(body, jaw=rng.uniform(0, 0.12))


def _chibi(rng: np.random.Generator) -> Body:
    body = _body(
        rng,
        rng.uniform(0.34, 0.44),
        rng.uniform(0.98, 1.16),
        rng.uniform(0.48, 0.56),
        0.47,
        rng.uniform(0.95, 1.3),
    )
    return replace(body, jaw=rng.uniform(0, 0.08), square=rng.choice([0, 0, rng.uniform(0.2, 0.7)]))


def _lanky(rng: np.random.Generator) -> Body:
    return _body(
        rng,
        rng.uniform(0.19, 0.27),
        rng.uniform(0.8, 1.0),
        rng.uniform(0.6, 0.66),
        0.5,
        rng.uniform(0.75, 0.85),
    )


def _stout(rng: np.random.Generator) -> Body:
    body = _body(
        rng,
        rng.uniform(0.23, 0.33),
        rng.uniform(1.0, 1.15),
        rng.uniform(0.48, 0.54),
        0.45,
        rng.uniform(1.25, 1.5),
    )
    return replace(body, waist=rng.uniform(1.1, 1.35), jaw=0.0)


def _bizarre(rng: np.random.Generator) -> Body:
    body = _body(
        rng,
        rng.uniform(0.44, 0.52),
        rng.uniform(1.0, 1.2),
        rng.uniform(0.44, 0.52),
        0.5,
        rng.uniform(0.9, 1.25),
    )
    return replace(
        body, jaw=rng.choice([-0.15, 0.0, 0.2]), square=rng.choice([0, 0.4, 0.9]), waist=rng.uniform(0.8, 1.3)
    )


def _look(rng: np.random.Generator, being: str) -> Look:
    person = being == "person"
    animal = being in ("animal", "creature")
    skin = vary(rng, rgb(str(rng.choice(SKINS if person else FUR))), 0.012)
    dark_skin = sum(skin) < 400
    palette = [vary(rng, rgb(code)) for code in PALETTES[rng.integers(len(PALETTES))]]
    if rng.random() < 0.3:  # swap top and accent
        palette[0], palette[1] = palette[1], palette[0]
    style = _pick(
        rng,
        {"none": 0.8, "tuft": 0.2}
        if animal
        else {
            "short": 0.17, "spiky": 0.1, "bob": 0.15, "long": 0.17, "pigtails": 0.1, "bun": 0.1,
            "afro": 0.1, "ponytail": 0.08, "mohawk": 0.02, "none": 0.03,
        },
    )  # fmt: skip
    bottom = _pick(rng, {"trousers": 0.42, "shorts": 0.28, "skirt": 0.18, "striped": 0.12})
    top = _pick(rng, {"tee": 0.38, "long": 0.24, "hoodie": 0.15, "tank": 0.1, "jacket": 0.13})
    pattern = _pick(
        rng,
        {
            "plain": 0.16,
            "stripes": 0.2,
            "dots": 0.12,
            "star": 0.12,
            "heart": 0.1,
            "disc": 0.1,
            "band": 0.12,
            "halves": 0.08,
        },
    )
    bare = animal and rng.random() < (0.4 if being == "animal" else 0.5)
    natural = being == "person" and rng.random() < 0.88
    hair = vary(rng, rgb(str(rng.choice(HAIR if natural else DYED))))
    short_hair = style in ("short", "spiky", "none", "mohawk")
    creature = being == "creature"
    ears = _pick(
        rng,
        {"bunny": 0.3, "pointed": 0.25, "round": 0.1, "none": 0.35}
        if creature
        else {"cat": 0.5, "round": 0.5},
    )
    horns = _pick(rng, {"none": 0.2, "horns": 0.3, "antennae": 0.35, "unicorn": 0.15})
    return Look(
        skin=skin,
        hair=hair if not (animal and rng.random() < 0.5) else shade(skin, 0.6),
        hair_style=style,
        fringe=_pick(rng, {"straight": 0.3, "side": 0.3, "curtain": 0.2, "zigzag": 0.2}),
        top="bare" if bare else top,
        top_colour=palette[0],
        top_accent=palette[1],
        pattern="plain" if bare or top in ("hoodie", "jacket") else pattern,
        bottom=("bare" if rng.random() < 0.6 else "shorts") if bare else bottom,
        bottom_colour=palette[2],
        bottom_accent=palette[1],
        shoe=palette[3],
        sock=palette[1] if rng.random() < 0.4 else None,
        belt=shade(palette[3], 0.6) if rng.random() < 0.3 else None,
        glove=palette[3] if rng.random() < (0.05 if person else 0.2) else None,
        eye="dots" if not person and rng.random() < 0.15 else "white",
        eye_size=rng.uniform(0.82, 0.98) if person else rng.uniform(1.0, 1.25),
        iris=rgb(str(rng.choice(["2b1a14", "3a2415", "1f2c4d", "1d3b34", "20202a"]))),
        mouth=_pick(rng, {"grin": 0.45, "smile": 0.35, "o": 0.1, "tongue": 0.1}),
        brow=rng.uniform(-0.25, 0.2),
        blush=bool(rng.random() < (0.2 if dark_skin else 0.5)),
        beard=bool(natural and short_hair and rng.random() < 0.18),
        glasses=rgb("2a2a33") if rng.random() < 0.1 else None,
        hat=_pick(rng, {"none": 0.86, "beanie": 0.06, "cap": 0.05, "party": 0.03}),
        hat_colour=palette[3] if sum(palette[3]) < 700 else palette[0],
        ears=ears if animal else "human",
        horns=horns if creature and (ears != "bunny" or horns == "unicorn") else "none",
        tail=_pick(rng, {"none": 0.3, "thin": 0.3, "bushy": 0.4}) if animal else "none",
        muzzle=bool(animal and rng.random() < 0.55),
        belly=bare,
    )
