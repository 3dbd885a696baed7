"""The questions of `tcan study` as data: models to train, conditions to evaluate, and comparisons between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.config.animate import PoseErrorConfig
from pipelines.config.study import QuestionName
from pipelines.puppets.variations import HeldOut
from tcan.pose.corrupt import ErrorKind
from tcan.pose.draw import PoseStyle


@dataclass(frozen=True)
class Metric:
    """A metric of `tcan evaluate`, and how it is printed."""

    key: str
    label: str
    minimal: float
    """Smallest difference that matters, in printed units, chosen before the study ran. An effect whose interval lies within
    `-minimal` and `minimal` is negligible."""
    factor: float = 1.0
    unit: str = ""


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet that the study trains. Names are unique: they are folder names."""

    name: str
    detector: Literal["openpose", "coordinates"] = "openpose"
    """Of the poses in its training images, and in the dataset of the models that use it: mini's network, or the one that the
    study trains."""
    pose_style: PoseStyle = "skeleton"
    is_weak: bool = False
    """Whether it is trained from scratch with few steps, instead of from mini's ControlNet."""


@dataclass(frozen=True)
class Model:
    """A training. Names are unique: they are folder names."""

    name: str
    stage: Literal[1, 2]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `train` that differ from the configuration."""
    start: "Model | None" = None
    """For stage 2: the model of stage 1 to start from."""
    controlnet: ControlNet | None = None
    """None: that of the configuration."""


@dataclass(frozen=True)
class Condition:
    """An evaluation of a model on one held-out distribution. Names are unique: they are folder names."""

    name: str
    model: Model
    videos: HeldOut = "dance"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `animate` that differ from the configuration."""
    poses: Literal["detected", "true"] = "detected"
    """`evaluate.poses`."""
    is_long: bool = False
    """Whether to evaluate `LONG_VIDEOS` videos of `LONG_FRAMES` frames, instead of those of the configuration."""


@dataclass(frozen=True)
class Comparison:
    """Mean paired difference of a metric: first minus second condition, averaged over the pairs."""

    label: str
    metric: Metric
    pairs: tuple[tuple[Condition, Condition], ...]
    expected: Literal[1, -1] | None = None
    """Sign of the difference by the hypothesis; None: the interval is reported without a verdict."""
    primary: bool = False
    """Whether the verdict of the question depends on it."""


@dataclass(frozen=True)
class Curve:
    """Plot of a metric over a quantity, one line per series."""

    title: str
    metric: Metric
    quantity: str
    series: Mapping[str, tuple[tuple[float, Condition], ...]]


@dataclass(frozen=True)
class Question:
    """A hypothesis with its comparisons. The question "cost" has none: it is answered by counted operations."""

    name: str
    title: str
    hypothesis: str
    comparisons: tuple[Comparison, ...] = ()
    curves: tuple[Curve, ...] = ()
    strip: tuple[Condition, ...] = ()
    """Conditions of the image strip."""

    def conditions(self) -> dict[str, Condition]:
        """All conditions by name, in the order of their first use."""
        pairs = [pair for comparison in self.comparisons for pair in comparison.pairs]
        return {condition.name: condition for pair in pairs for condition in pair}


POSE = Metric("pose_5_true", "joints within 5 % of the true position", 2, 100, "%")
WRISTS = Metric("pose_5_wrists_true", "wrists within 5 % of the true position", 5, 100, "%")
COLOUR = Metric("colour_distance", "colour distance to the reference", 0.5, 1, "dE")
PSNR = Metric("psnr", "PSNR", 0.2, 1, "dB")
SSIM = Metric("ssim", "SSIM", 0.005)
FLICKER = Metric("flicker", "background flicker", 0.1, 1, "grey levels")
WARPING = Metric("warping_error", "warping error", 0.1, 1000, "1e-3")

STAGE1 = Model("stage1", 1)
NO_APPA = Model("stage1-no-appa", 1, {"appa": False})
FINETUNED = Model("stage1-finetuned-controlnet", 1, {"controlnet": "finetune"})
STAGE2 = Model("stage2", 2, start=STAGE1)
NO_TEMPORAL = Model("stage2-no-temporal-controlnet", 2, {"temporal_controlnet": False}, STAGE1)

CONTROLNETS = (
    ControlNet("openpose"),
    ControlNet("coordinates", "coordinates"),
    ControlNet("body-map", pose_style="body_map"),
)
OPENPOSE, COORDINATES, BODY_MAP = (
    Model(f"stage1-{controlnet.name}", 1, {"pose_style": controlnet.pose_style}, controlnet=controlnet)
    for controlnet in CONTROLNETS
)
WEAK = Model("stage1-weak", 1, controlnet=ControlNet("weak", is_weak=True))
WEAK_FINETUNED = Model("stage1-weak-finetuned", 1, {"controlnet": "finetune"}, controlnet=WEAK.controlnet)

LOCAL_ERRORS: tuple[ErrorKind, ...] = ("missing", "jitter", "outliers", "swaps", "frozen", "burst")
"""Kinds of pose errors that the neighboring frames can correct."""
ERROR_SIZES: dict[ErrorKind, tuple[float, ...]] = {
    "missing": (0.5, 0.2, 0.1, 0.8),
    "jitter": (0.05, 0.02, 0.01, 0.1),
    "outliers": (0.3, 0.1, 0.05, 0.5),
    "swaps": (0.3, 0.1, 0.05, 0.5),
    "frozen": (0.6, 0.3, 0.15, 0.8),
    "burst": (0.3, 0.1, 0.05, 0.5),
    "offset": (0.08, 0.03, 0.015, 0.15),
}
"""Fraction of the joints or frames with errors; for jitter (of all frames) and offset a fraction of the image height. The
first ones are used first (`study.pose_error_sizes`)."""
PTM_STRENGTHS = (0.5, 1.0, 2.0)
MOVING: tuple[HeldOut, ...] = ("parallax", "passing", "light")
FAR: tuple[HeldOut, ...] = ("four_arms", "headless", "sketch", "xray", "noise")
LONG_FRAMES, LONG_VIDEOS = 300, 3


def questions(names: Sequence[str], pose_error_sizes: int) -> list[Question]:
    """The questions of these names, in a fixed order."""
    build: dict[QuestionName, Callable[[], Question]] = {
        "appa": _appa,
        "temporal_controlnet": lambda: _temporal_controlnet(pose_error_sizes),
        "ptm": _ptm,
        "controlnet": _controlnet,
        "scenes": _scenes,
        "detectors": _detectors,
        "cost": _cost,
        "sampling": _sampling,
    }
    return [create() for name, create in build.items() if name in names]


def _on(model: Model, videos: HeldOut = "dance") -> Condition:
    return Condition(f"{model.name}-{videos}", model, videos)


def _appa() -> Question:
    dance, bizarre = ((_on(STAGE1, kind), _on(NO_APPA, kind)) for kind in ("dance", "bizarre"))
    return Question(
        "appa",
        "APPA on or off",
        "With APPA the results have the colours and the texture of the reference, and follow the pose at least as well "
        "(models of stage 1; on minus off).",
        (
            Comparison("colours, dance", COLOUR, (dance,), -1, primary=True),
            Comparison("image, dance", PSNR, (dance,), 1, primary=True),
            Comparison("structure, dance", SSIM, (dance,), 1),
            Comparison("pose, dance", POSE, (dance,), 1),
            Comparison("colours, bizarre", COLOUR, (bizarre,), -1),
            Comparison("image, bizarre", PSNR, (bizarre,), 1),
            Comparison("pose, bizarre", POSE, (bizarre,), 1),
        ),
        strip=(*dance, *bizarre),
    )


def _with_errors(model: Model, kind: ErrorKind, size: float) -> Condition:
    is_distance = kind in ("jitter", "offset")
    errors = PoseErrorConfig(kind, 1.0, size) if is_distance else PoseErrorConfig(kind, share=size)
    return Condition(f"{model.name}-dance-{kind}-{size:g}", model, options={"pose_errors": errors})


def _temporal_controlnet(sizes: int) -> Question:
    levels = {kind: sorted(values[:sizes]) for kind, values in ERROR_SIZES.items()}
    pairs = {
        kind: tuple((_with_errors(STAGE2, kind, size), _with_errors(NO_TEMPORAL, kind, size)) for size in values)
        for kind, values in levels.items()
    }  # fmt: skip
    clean = (_on(STAGE2), _on(NO_TEMPORAL))
    local = tuple(pair for kind in LOCAL_ERRORS for pair in pairs[kind])
    curves = [
        Curve(
            kind,
            POSE,
            "size" if kind in ("jitter", "offset") else "share",
            {
                label: ((0.0, clean[i]), *((size, pairs[kind][j][i]) for j, size in enumerate(levels[kind])))
                for i, label in enumerate(("on", "off"))
            },
        )
        for kind in ERROR_SIZES
    ]
    return Question(
        "temporal_controlnet",
        "Temporal ControlNet on or off, under errors of the driving poses",
        "With temporal layers in the ControlNet, the joints of the result are nearer to the true poses when single poses are "
        "wrong; not when all poses are shifted (models of stage 2; on minus off; the mean over the sizes of the errors).",
        (
            Comparison("all errors but offset", POSE, local, 1, primary=True),
            *(Comparison(kind, POSE, pairs[kind], 1) for kind in LOCAL_ERRORS),
            Comparison("all errors but offset: consistency", WARPING, local, -1),
            Comparison("offset (systematic)", POSE, pairs["offset"]),
            Comparison("no errors", POSE, (clean,)),
        ),
        tuple(curves),
        strip=(*clean, *pairs["outliers"][-1]),
    )


def _ptm() -> Question:
    off = Condition("stage2-dance-ptm-off", STAGE2, options={"ptm": False})
    on = {
        strength: Condition(f"stage2-dance-ptm-{strength:g}", STAGE2, options={"ptm_strength": strength})
        if strength != 1
        else _on(STAGE2)
        for strength in PTM_STRENGTHS
    }
    points = ((0.0, off), *on.items())
    moving = {
        videos: (_on(STAGE2, videos), Condition(f"stage2-{videos}-ptm-off", STAGE2, videos, {"ptm": False}))
        for videos in MOVING
    }
    return Question(
        "ptm",
        "Temperature map off, 0.5, 1, 2",
        "The temperature map reduces the flicker of a static background (strength minus off). Whether it stiffens the person, "
        "and what it does to moving backgrounds and to changing light, is reported without a hypothesis.",
        (
            Comparison("flicker, strength 1", FLICKER, ((on[1], off),), -1, primary=True),
            Comparison("flicker, strength 0.5", FLICKER, ((on[0.5], off),), -1),
            Comparison("flicker, strength 2", FLICKER, ((on[2], off),), -1),
            Comparison("wrists, strength 1", WRISTS, ((on[1], off),)),
            Comparison("wrists, strength 2", WRISTS, ((on[2], off),)),
            Comparison("consistency, strength 1", WARPING, ((on[1], off),)),
            *(Comparison(f"image, {videos}", PSNR, (pair,)) for videos, pair in moving.items()),
        ),
        tuple(
            Curve(metric.label, metric, "strength", {"stage 2": points})
            for metric in (FLICKER, WRISTS, WARPING)
        ),
        strip=(off, *on.values()),
    )


def _controlnet() -> Question:
    dance, bizarre = ((_on(STAGE1, kind), _on(FINETUNED, kind)) for kind in ("dance", "bizarre"))
    far = {kind: (_on(STAGE1, kind), _on(FINETUNED, kind)) for kind in FAR}
    weak = {kind: (_on(WEAK, kind), _on(WEAK_FINETUNED, kind)) for kind in ("dance", "bizarre")}
    return Question(
        "controlnet",
        "ControlNet frozen or fine-tuned",
        "A frozen ControlNet generalizes better to bodies and styles that are not in the training videos (bizarre, four_arms, "
        "headless, sketch, xray, noise); on bodies like those of the training videos (dance) there is no hypothesis. A weak "
        "ControlNet, trained from scratch with few steps, is worse frozen than fine-tuned (models of stage 1; frozen minus fine-tuned).",
        (
            Comparison("pose, bizarre", POSE, (bizarre,), 1, primary=True),
            *(Comparison(f"pose, {kind}", POSE, (pair,), 1) for kind, pair in far.items()),
            Comparison("wrists, bizarre", WRISTS, (bizarre,), 1),
            Comparison("image, bizarre", PSNR, (bizarre,), 1),
            Comparison("colours, bizarre", COLOUR, (bizarre,), -1),
            *(Comparison(f"weak, pose, {kind}", POSE, (pair,), -1) for kind, pair in weak.items()),
            Comparison("pose, dance", POSE, (dance,)),
            Comparison("image, dance", PSNR, (dance,)),
            Comparison("colours, dance", COLOUR, (dance,)),
        ),
        strip=(*dance, *bizarre, *weak["bizarre"]),
    )


def _scenes() -> Question:
    simple = _on(STAGE2)
    hard = {kind: _on(STAGE2, kind) for kind in (*MOVING, "turns", "crossing", "three")}
    long = Condition(f"stage2-dance-{LONG_FRAMES}-frames", STAGE2, is_long=True)
    return Question(
        "scenes",
        "Moving scenes, turns, several people, long videos",
        "The result follows the pose less well if the background moves, the light changes, the person turns to the sides, or one or "
        "two other people cross (model of stage 2; such a scene minus the same character and dance in a static scene). Long videos "
        f"({LONG_VIDEOS} of {LONG_FRAMES} frames; minus their first frames) are reported without a hypothesis.",
        tuple(
            Comparison(f"pose, {kind}", POSE, ((scene, simple),), -1, primary=True)
            for kind, scene in hard.items()
        )
        + tuple(Comparison(f"image, {kind}", PSNR, ((scene, simple),)) for kind, scene in hard.items())
        + tuple(
            Comparison(f"{label}, long", metric, ((long, simple),))
            for label, metric in (("pose", POSE), ("image", PSNR), ("flicker", FLICKER))
        ),
        strip=(simple, *hard.values()),
    )


def _detectors() -> Question:
    def true(kind: HeldOut) -> Condition:
        return Condition(f"stage2-{kind}-true-poses", STAGE2, kind, poses="true")

    pairs = {kind: (true(kind), _on(STAGE2, kind)) for kind in ("dance", "bizarre", "turns", "crossing")}
    others = {
        f"{label}, {kind}": (_on(model, kind), _on(OPENPOSE, kind))
        for kind in ("dance", "bizarre")
        for label, model in (("coordinates", COORDINATES), ("body map", BODY_MAP))
    }
    return Question(
        "detectors",
        "True poses, detectors, body maps",
        "The result follows the true pose better if it is driven with it than with the poses of mini's OpenPose network (model of stage 2; "
        "true minus detected). This bounds what a better detector can gain. Skeletons of a detector of the RTMPose type (coordinates), "
        "and dense body maps in place of skeletons, are followed less well than skeletons of the OpenPose network (models of stage 1, "
        "each with a ControlNet that was trained for these images; other minus OpenPose skeletons).",
        tuple(
            Comparison(f"pose, {kind}", POSE, (pair,), 1, primary=kind == "dance")
            for kind, pair in pairs.items()
        )
        + tuple(Comparison(f"pose, {label}", POSE, (pair,), -1) for label, pair in others.items())
        + tuple(Comparison(f"image, {label}", PSNR, (pair,)) for label, pair in (pairs | others).items()),
        strip=(*pairs["dance"], _on(OPENPOSE), _on(COORDINATES), _on(BODY_MAP)),
    )


def _cost() -> Question:
    return Question(
        "cost",
        "Cost of the temporal ControlNet",
        "Reported without a hypothesis: operations at SD1.5 size are counted, times of mini are measured on this machine.",
    )


def _sampling() -> Question:
    default = _on(STAGE2)

    def changed(name: str, **options: Any) -> Condition:
        return Condition(f"stage2-dance-{name}", STAGE2, options=options)

    windows = changed("window-8-overlap-0", window=8, overlap=0), changed("window-8", window=8, overlap=4)
    steps = changed("steps-4", steps=4)
    guidance = changed("guidance-1", guidance_scale=1.0)
    noise = changed("pure-noise", start_from_reference=False)
    return Question(
        "sampling",
        "Windows, steps, guidance, start from the reference",
        "Each change makes the result worse: windows of 8 frames without overlap instead of an overlap of 4, 4 denoising steps, "
        "guidance scale 1, and pure noise at the start instead of the noised reference (changed minus unchanged).",
        (
            Comparison("no overlap of windows", WARPING, (windows,), 1, primary=True),
            Comparison("4 steps", PSNR, ((steps, default),), -1, primary=True),
            Comparison("no guidance", COLOUR, ((guidance, default),), 1, primary=True),
            Comparison("start from pure noise", FLICKER, ((noise, default),), 1, primary=True),
            Comparison("4 steps: pose", POSE, ((steps, default),)),
            Comparison("no guidance: pose", POSE, ((guidance, default),)),
        ),
        strip=(default, windows[0], steps, guidance, noise),
    )
