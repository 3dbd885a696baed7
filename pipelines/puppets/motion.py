"""Dances: seeded choreographies of key poses on a beat, and the 3D skeletons that they animate.

Body axes: x to the right of the image, y down, z towards the viewer. Angles are in radians, lengths in standing heights
of the puppet (floor to top of the head). The right side of a puppet that faces the viewer is at negative x.
"""

from dataclasses import dataclass, fields

import numpy as np

from pipelines.puppets.character import Body

SIDES = np.array([-1.0, 1.0])  # right, left: the sign of x when the puppet faces the viewer
CAMERA_TILT = 0.16  # the camera looks down slightly: points nearer the viewer are lower in the image
KEYS = 16  # key poses of a choreography, which then repeats

# Swing and forward lift of the upper arm, then of the forearm, in degrees. Swing 0: down, 90: away from the body, 180: up,
# negative: across the body.
ARM_POSES = np.array(
    [
        [18, 5, 10, 15],  # hanging
        [52, -5, -38, 12],  # hand on the hip
        [92, 5, 92, 8],  # out
        [82, 5, 172, 10],  # goalpost
        [85, 5, 5, 15],  # scarecrow
        [160, 5, 176, 5],  # up
        [132, 5, 132, 5],  # diagonally up
        [50, 5, 52, 10],  # diagonally down
        [22, 35, -78, 35],  # across the belly
        [62, 35, -118, 30],  # to the other shoulder
        [118, 5, 212, 15],  # hand at the head
        [35, 20, 150, 30],  # fist at the shoulder
        [70, 55, 85, 65],  # reaching to the viewer
        [105, 10, 40, 20],  # elbow high
    ],
    dtype=float,
)
ARM_WEIGHTS = np.array([0.5, 0.9, 1.2, 1.2, 0.9, 1.4, 1.4, 0.7, 1.0, 0.8, 0.9, 1.0, 0.6, 0.8])


@dataclass(frozen=True)
class Choreography:
    """Key poses `[KEYS, ...]` and beat of a dance."""

    beat: float  # seconds between key poses
    phase: float  # start of the clip within the choreography, in key poses
    bounce: float  # depth of the knee bounce on every beat
    position: float  # position in the image, from -1 to 1
    root: np.ndarray  # [KEYS] sideways position of the pelvis
    crouch: np.ndarray  # [KEYS] lowering of the pelvis, in leg lengths
    jump: np.ndarray  # [KEYS] height of the feet above the floor
    torso: np.ndarray  # [KEYS, 3] yaw, forward bend, sideways lean
    twist: np.ndarray  # [KEYS] yaw of the hips relative to the shoulders
    head: np.ndarray  # [KEYS, 3] yaw, nod, tilt, relative to the torso
    arms: np.ndarray  # [KEYS, 2, 4] as ARM_POSES
    feet: np.ndarray  # [KEYS, 2, 3] outward, lift, forward, relative to the point below the pelvis


def sample_choreography(rng: np.random.Generator, energy: float = 1.0) -> Choreography:
    """Sample a dance. About 50 % of the key poses are followed by their mirror image. `energy` scales the travel."""
    keys: list[dict[str, np.ndarray]] = []
    travel = rng.uniform(0.85, 1.2) * energy
    turn = rng.uniform(0.6, 1.25)
    while len(keys) < KEYS:
        pose = _sample_key(rng, travel, turn)
        previous = keys[-1] if keys else None
        if previous is not None and previous["root"] * pose["root"] > 0 and rng.random() < 0.75:
            pose = _mirror(pose)  # return to the other side
        keys.append(pose)
        if rng.random() < 0.55:
            keys.append(_mirror(pose))
    stacked = {name: np.stack([key[name] for key in keys[:KEYS]]) for name in keys[0]}
    return Choreography(
        beat=rng.uniform(0.42, 0.6),
        phase=rng.uniform(0, KEYS),
        bounce=rng.uniform(0.003, 0.02),
        position=rng.uniform(-1, 1),
        **stacked,
    )


def _sample_key(rng: np.random.Generator, travel: float, turn: float) -> dict[str, np.ndarray]:
    arms = ARM_POSES[rng.choice(len(ARM_POSES), 2, p=ARM_WEIGHTS / ARM_WEIGHTS.sum())]
    if rng.random() < 0.4:
        arms[1] = arms[0]
    arms = arms + rng.normal(0, [9, 7, 11, 8], (2, 4))

    stance = rng.uniform(0.04, 0.17, 2)
    feet = np.stack([stance, np.zeros(2), rng.uniform(-0.05, 0.05, 2)], axis=1)
    crouch = rng.choice(
        [rng.uniform(0, 0.03), rng.uniform(0.12, 0.3), rng.uniform(0.3, 0.5)], p=[0.55, 0.26, 0.19]
    )
    jump = rng.uniform(0.05, 0.09) * travel if crouch < 0.1 and rng.random() < 0.25 else 0.0
    move = rng.random()
    if move < 0.15:  # side kick
        feet[rng.integers(2)] = [rng.uniform(0.28, 0.36), rng.uniform(0.1, 0.24), 0.02]
    elif move < 0.3:  # knee lifted towards the viewer
        feet[rng.integers(2)] = [rng.uniform(0.02, 0.1), rng.uniform(0.12, 0.2), rng.uniform(0.02, 0.12)]
    elif move < 0.4:  # legs crossed
        feet[:, 0] = -rng.uniform(0.01, 0.06)
        feet[:, 2] = rng.permutation([0.07, -0.05])
    root = rng.choice([-1, 1]) * rng.uniform(0.04, 0.19) * travel
    lean = np.clip(rng.normal(0, 13), -26, 26)
    yaw = np.clip(rng.normal(0, 26) * turn, -58, 58)
    return {
        "root": np.array(root),
        "crouch": np.array(crouch),
        "jump": np.array(jump),
        "torso": np.radians([yaw, rng.uniform(-4, 20) + 22 * crouch, lean]),
        "twist": np.radians(rng.normal(0, 14)),
        "head": np.radians([np.clip(rng.normal(0, 16), -32, 32), rng.normal(0, 8), rng.normal(0, 10)]),
        "arms": np.radians(arms),
        "feet": feet,
    }


def _mirror(key: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    flip = np.array([-1, 1, -1])
    return {
        **key,
        "root": -key["root"],
        "torso": key["torso"] * flip,
        "twist": -key["twist"],
        "head": key["head"] * flip,
        "arms": key["arms"][::-1],
        "feet": key["feet"][::-1],
    }


@dataclass(frozen=True)
class Skeleton:
    """Animated body: points `[F, 3]` or `[F, 2, 3]` (right, left) in standing heights; the floor is at y = 0."""

    neck: np.ndarray
    pelvis: np.ndarray
    head: np.ndarray  # centre of the head
    shoulders: np.ndarray
    elbows: np.ndarray
    wrists: np.ndarray
    hips: np.ndarray
    knees: np.ndarray
    ankles: np.ndarray
    toes: np.ndarray
    head_axes: np.ndarray  # [F, 3, 3] rotation of the head
    torso_yaw: np.ndarray  # [F]

    def shifted(self, dx: np.ndarray) -> "Skeleton":
        """Return a copy with all points moved along x by `dx` `[F]`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if name not in ("head_axes", "torso_yaw"):
                value = value.copy()
                value[..., 0] += dx.reshape(-1, *[1] * (value.ndim - 2))
                moved[name] = value
        return Skeleton(**moved)


def pose_body(dance: Choreography, body: Body, seconds: np.ndarray) -> Skeleton:
    """Return the skeleton of `body` at times `seconds` `[F]` of the dance."""
    beats = seconds / dance.beat + dance.phase
    step = beats % 1
    # Ease into each key pose and hold it briefly, as in a dance.
    ease = np.clip(step / 0.9, 0, 1)
    ease = ease * ease * (3 - 2 * ease)
    now, after = np.floor(beats).astype(int) % KEYS, (np.floor(beats).astype(int) + 1) % KEYS

    def between(keys: np.ndarray) -> np.ndarray:
        weight = ease.reshape(-1, *[1] * (keys.ndim - 1))
        return keys[now] * (1 - weight) + keys[after] * weight

    root, crouch, jump = between(dance.root), between(dance.crouch), between(dance.jump)
    yaw, bend, lean = between(dance.torso).T
    twist = between(dance.twist)
    arms, feet = between(dance.arms), between(dance.feet)
    # Short arms, large head: spread raised arms far enough for the hands to pass the head.
    spare = np.arctan2(
        max(0.0, 0.5 * body.head_width + body.hand - body.shoulder), body.upper_arm + body.forearm
    )
    raised = np.maximum(arms[..., [0, 2]] - np.pi / 2, 0)
    arms[..., [0, 2]] -= raised * min(spare / (np.pi / 2), 0.6)

    shoulders_axes = _roll(lean) @ _yaw(yaw) @ _pitch(bend)
    hips_axes = _roll(lean * 0.35) @ _yaw(np.clip(yaw + twist, -1.05, 1.05))

    # Feet are positioned relative to the pelvis. A moving foot is lifted between key poses.
    leg = body.thigh + body.shin
    foot_keys = dance.root[:, None] + SIDES * dance.feet[:, :, 0]
    travelled = np.abs(foot_keys[after] - foot_keys[now])
    ankles = np.zeros((len(seconds), 2, 3))
    ankles[..., 0] = root[:, None] + SIDES * feet[..., 0] * (leg / 0.45)
    lift = feet[..., 1] * (leg / 0.45) + jump[:, None] + 0.25 * travelled * np.sin(np.pi * ease)[:, None]
    ankles[..., 1] = -body.ankle - lift
    ankles[..., 2] = feet[..., 2]

    # The crouch sets the height of the pelvis, limited so that both feet remain within reach.
    reach = np.sqrt(
        np.maximum((0.995 * leg) ** 2 - (ankles[..., 0] - root[:, None]) ** 2 - ankles[..., 2] ** 2, 0.01)
    )
    height = leg * (1 - crouch) - dance.bounce * np.cos(2 * np.pi * beats) - dance.bounce
    height = np.minimum(height + jump, (reach + lift).min(axis=1)) + body.ankle
    pelvis = np.stack([root, -height, np.zeros_like(root)], axis=-1)
    hips = pelvis[:, None] + _apply(hips_axes, SIDES[:, None] * np.array([body.hip, 0, 0]))

    knees = np.empty_like(hips)
    for side in range(2):
        forward = np.array([SIDES[side] * 0.75, 0.0, 0.75])
        knees[:, side], ankles[:, side] = _bend_leg(
            hips[:, side], ankles[:, side], body.thigh, body.shin, _apply(hips_axes, forward[None])[:, 0]
        )
    splay = np.clip(yaw + twist, -1.05, 1.05)[:, None] + SIDES * 0.65
    toes = ankles + body.foot * np.stack(
        [np.sin(splay), 0.15 + np.minimum(2.2 * lift, 0.5), np.cos(splay)], axis=-1
    )

    neck = pelvis + _apply(shoulders_axes, np.array([[0, -body.torso, 0.0]]))[:, 0]
    shoulders = neck[:, None] + _apply(shoulders_axes, SIDES[:, None] * np.array([body.shoulder, 0, 0]))
    upper = _apply_each(shoulders_axes, _arm_direction(arms[..., 0], arms[..., 1]))
    lower = _apply_each(shoulders_axes, _arm_direction(arms[..., 2], arms[..., 3]))
    elbows = shoulders + body.upper_arm * upper
    wrists = elbows + body.forearm * lower

    head_yaw, nod, tilt = between(dance.head).T
    nod = nod - 0.6 * bend + 0.05 * np.cos(2 * np.pi * beats)
    head_axes = _roll(0.7 * lean + tilt) @ _yaw(np.clip(0.75 * yaw + head_yaw, -0.95, 0.95)) @ _pitch(nod)
    spine = _roll(0.85 * lean + 0.5 * tilt) @ _yaw(yaw) @ _pitch(0.5 * bend)
    head = neck + _apply(spine, np.array([[0, -body.neck - 0.5 * body.head, 0.0]]))[:, 0]
    return Skeleton(neck, pelvis, head, shoulders, elbows, wrists, hips, knees, ankles, toes, head_axes, yaw)


def _arm_direction(swing: np.ndarray, forward: np.ndarray) -> np.ndarray:
    return np.stack(
        [SIDES * np.sin(swing) * np.cos(forward), np.cos(swing) * np.cos(forward), np.sin(forward)], axis=-1
    )


def _bend_leg(
    hip: np.ndarray, target: np.ndarray, thigh: float, shin: float, pole: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Two-bone inverse kinematics with the knee towards `pole`. Returns the knee and the reachable ankle, each `[F, 3]`."""
    line = target - hip
    distance = np.linalg.norm(line, axis=-1, keepdims=True)
    line = line / distance
    distance = np.clip(distance, abs(thigh - shin) + 0.02, 0.998 * (thigh + shin))
    along = (thigh**2 - shin**2 + distance**2) / (2 * distance)
    aside = np.sqrt(np.maximum(thigh**2 - along**2, 0))
    pole = pole - (pole * line).sum(-1, keepdims=True) * line
    pole = pole / np.linalg.norm(pole, axis=-1, keepdims=True)
    return hip + along * line + aside * pole, hip + distance * line


def _apply(axes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Rotate points `[N, 3]` by each of `axes` `[F, 3, 3]` -> `[F, N, 3]`."""
    return np.einsum("fij,nj->fni", axes, points)


def _apply_each(axes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Rotate points `[F, N, 3]` by `axes` `[F, 3, 3]`, frame by frame."""
    return np.einsum("fij,fnj->fni", axes, points)


def _matrix(rows: list[list[np.ndarray]]) -> np.ndarray:
    return np.stack([np.stack(np.broadcast_arrays(*row), axis=-1) for row in rows], axis=-2)


def _yaw(angle: np.ndarray) -> np.ndarray:
    c, s, o = np.cos(angle), np.sin(angle), np.zeros_like(angle)
    return _matrix([[c, o, s], [o, o + 1, o], [-s, o, c]])


def _pitch(angle: np.ndarray) -> np.ndarray:
    c, s, o = np.cos(angle), np.sin(angle), np.zeros_like(angle)
    return _matrix([[o + 1, o, o], [o, c, s], [o, -s, c]])


def _roll(angle: np.ndarray) -> np.ndarray:
    c, s, o = np.cos(angle), np.sin(angle), np.zeros_like(angle)
    return _matrix([[c, -s, o], [s, c, o], [o, o, o + 1]])
