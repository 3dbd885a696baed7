"""The command line: `tcan COMMAND ...`, or `python -m pipelines.cli COMMAND ...`; `tcan --help` names the commands.

A job's modules are imported when it runs, so that `tcan --help` answers at once.
"""

import difflib
import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from tcan.errors import UserError


@dataclass(frozen=True)
class Command:
    help: str
    arguments: dict[str, dict[str, Any]]  # what the parser's add_argument takes
    run: Callable[[Any, Any], None]  # (arguments, configuration)
    sections: tuple[str, ...]  # of the configuration, that it reads
    submittable: bool = False  # --submit sends it to a cluster


SUBMIT_HELP = (
    "Run it as a job of the Ray cluster with this dashboard, and follow its log. The code travels; paths and URIs "
    "must mean the same there."
)
ENVIRONMENT_HELP = (
    "With --submit: a file of requirements, such as requirements.lock, that uv installs for the job on the cluster; "
    "without it the packages of the cluster's python are used."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for what the user can mend, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # so that runs and files are closed
    _quiet_libraries()
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if message := user_message(error):
            if "pipelines.cluster" in sys.modules:  # then Ray is there already
                from pipelines.cluster import disconnect

                disconnect()  # so that no worker has the last word
            print(f"tcan: error: {message}", file=sys.stderr)
            return 2
        raise


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"tcan {version('tcan')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(
            f"no such command: {name}; " + (f"did you mean {near[0]}?" if near else "see tcan --help")
        )

    from pipelines.config import make_parser, parse

    command = COMMANDS[name]
    parser = make_parser(f"tcan {name}", command.help, command.sections)
    for argument, options in command.arguments.items():
        parser.add_argument(argument, **options)
    if command.submittable:
        parser.add_argument("--submit", metavar="http://HOST:8265", help=SUBMIT_HELP)
        parser.add_argument("--environment", metavar="requirements.lock", help=ENVIRONMENT_HELP)
    config, values = parse(parser, rest)
    for argument in command.arguments:  # an empty path would mean this folder
        if getattr(values, argument.removeprefix("--"), None) == "":
            raise UserError(f"{argument}: is empty; is a variable of the shell not set?")
    if command.submittable and values.submit is not None:
        return _submit(command, name, rest, values, config)
    if command.submittable and values.environment is not None:
        raise UserError("--environment goes with --submit: here, the packages of this python are used")
    command.run(values, config)
    return 0


PATH_KEYS = ("--tracking.folder", "--train.deepspeed", "--train.storage")


def _submit(command: Command, name: str, rest: Sequence[str], values: Any, config: Any) -> int:
    """The same command without `--submit` and `--environment`, its paths made absolute, on the cluster."""
    from pipelines.submit import absolute_paths, submit

    argv, tokens = [name], iter(rest)
    for token in tokens:
        option, equals, _ = token.partition("=")
        if option not in ("--submit", "--environment"):
            argv.append(token)
        elif not equals:
            next(tokens)
    flags = [key for key, options in command.arguments.items() if options.get("action") == "store_true"]
    paths = [key for key, options in command.arguments.items() if options.get("type") is str]
    if not (config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        argv.append(f"--tracking.folder={config.tracking.folder}")
    argv = absolute_paths(argv, [*paths, *PATH_KEYS], flags)
    return submit(values.submit, argv, values.environment)


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    usage = "usage: tcan COMMAND ... [--config mini|sd15|FILE.yaml] [--key.path VALUE ...]"
    more = "tcan COMMAND --help explains its arguments and every key of the configuration."
    return "\n".join([usage, "", *lines, "", more])


def user_message(error: BaseException) -> str | None:
    """The one line for an error that the user can mend, None for a bug.

    An error of a worker arrives wrapped: Ray keeps the original in `cause`, Ray Train in `worker_failures` or
    `controller_failure`.
    """
    pending, seen = [error], set()
    while pending:
        error = pending.pop()
        if id(error) in seen:
            continue
        seen.add(id(error))
        inner = [
            getattr(error, "cause", None),
            getattr(error, "controller_failure", None),
            error.__cause__,
            *getattr(error, "worker_failures", {}).values(),
        ]
        inner = [cause for cause in inner if isinstance(cause, BaseException)]
        if isinstance(error, UserError) and not inner:
            return " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            where = f" while writing {error.filename}" if error.filename else ""
            return f"the disk is full{where}; free some space and run the same command again"
        if type(error).__module__ == "ray.exceptions" and type(error).__name__ == "OutOfMemoryError":
            return (
                "a machine's main memory is full, and Ray has ended workers; end what else needs it there, or take fewer "
                "workers or smaller batches, and run the same command again"
            )
        pending += inner
    return None


def _quiet_libraries() -> None:
    """The terminal shows our lines: notices of the libraries below are for their developers. Each stays open to the
    environment, which Ray's workers inherit."""
    categories = (FutureWarning, DeprecationWarning, UserWarning)
    for category in categories:
        warnings.filterwarnings("ignore", category=category)
    for name, value in {
        "PYTHONWARNINGS": ",".join(f"ignore::{category.__name__}" for category in categories),
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "KINETO_LOG_LEVEL": "6",  # of torch's profiler
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints a worker's lines twice
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray announces a change of default at every start
    }.items():
        os.environ.setdefault(name, value)


# --- the commands ----------------------------------------------------------------------------------------------------


def _preprocess(arguments: Any, config: Any) -> None:
    from pipelines.preprocess.job import preprocess

    preprocess(
        arguments.videos,
        arguments.out,
        config,
        limit=arguments.limit,
        retry_rejected=arguments.retry_rejected,
    )


def _dataset(arguments: Any, config: Any) -> None:
    from pipelines.preprocess import dataset_commands

    try:
        if arguments.action == "info":
            dataset_commands.print_info(arguments.dataset)
        elif arguments.action == "rejected":
            dataset_commands.print_rejected(arguments.dataset)
        elif arguments.action == "verify":
            dataset_commands.verify(arguments.dataset)
        else:
            dataset_commands.preview(arguments.dataset, arguments.out, config)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our lines has enough of them, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _train(arguments: Any, config: Any) -> None:
    from pipelines.train.job import train

    train(arguments.dataset, arguments.out, config, stage=arguments.stage, from_model=arguments["from"])


def _animate(arguments: Any, config: Any) -> None:
    names = ("image", "driving", "poses", "character", "out", "fps")
    given = {name: arguments[name] for name in names if arguments[name] is not None}
    options = {"audio": arguments.audio, "side_by_side": arguments.side_by_side}
    if arguments.pairs is not None:
        if given:
            raise UserError(f"--pairs names images, videos and results: leave out --{', --'.join(given)}")
        from pipelines.animate_pairs import animate_pairs
        from pipelines.tracking import local_model

        model = local_model(arguments.model, config.tracking)
        animate_pairs(Path(arguments.pairs), model, config, **options)
        return
    if missing := [f"--{name}" for name in ("image", "out") if name not in given]:
        raise UserError(f"missing: {', '.join(missing)}; tcan animate --help explains")

    from pipelines.animate import Animation, animate
    from pipelines.tracking import local_model

    paths: dict[str, Any] = {name: Path(value) for name, value in given.items() if name != "fps"}
    model = local_model(arguments.model, config.tracking)
    animate(Animation(**paths, fps=arguments.fps, **options), model, config)


def _pose(arguments: Any, config: Any) -> None:
    from pipelines.pose import pose

    pose(Path(arguments.source), Path(arguments.out), config)


def _evaluate(arguments: Any, config: Any) -> None:
    from pipelines.evaluate import evaluate
    from pipelines.tracking import local_model

    model = local_model(arguments.model, config.tracking)
    evaluate(Path(arguments.videos), model, Path(arguments.out), config)


def _export(arguments: Any, config: Any) -> None:
    from tcan.weights import export_model

    export_model(arguments.model, arguments.out, pose=config.pretrained.pose)
    print(f"{arguments.out}: the model and all it needs", flush=True)


def _weights(arguments: Any, config: Any) -> None:
    from tcan.weights.check import describe

    problems = []
    for path in arguments.paths:
        try:
            print(f"{path}: {describe(Path(path))}: fits", flush=True)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))


def _demo(arguments: Any, config: Any) -> None:
    from pipelines.demo import demo

    demo(Path(arguments.out), config)


def _memory(arguments: Any, config: Any) -> None:
    from pipelines.memory import memory

    memory(config, arguments.gpus, arguments.stage)


def _ui(arguments: Any, config: Any) -> None:
    from pipelines.ui import ui

    ui(config, arguments.port)


def _path(text: str, **options: Any) -> dict[str, Any]:
    return {"type": str, "help": text, **options}


def _required_path(text: str) -> dict[str, Any]:
    return _path(text, required=True)


MODEL = _required_path("A trained model: a folder, models:/tcan@latest, or the id of an MLflow run.")

COMMANDS = {
    "preprocess": Command(
        "Turn a folder of videos into a clip dataset.",
        {
            "videos": _path(
                "Folder of videos, searched through; a quoted pattern, a list (.txt) or a video; here, in s3:// or gs://."
            ),
            "out": _path(
                "Folder of the clip dataset, here, in s3:// or gs://; run again, it adds what is missing."
            ),
            "--limit": {
                "type": int,
                "default": 0,
                "help": "Take only so many videos, the first by name; 0: all.",
            },
            "--retry_rejected": {
                "action": "store_true",
                "help": "Try those videos again that were rejected before.",
            },
        },
        _preprocess,
        ("pretrained", "preprocess", "tracking"),
        submittable=True,
    ),
    "dataset": Command(
        "Look into a clip dataset: its counts, whether every file is whole, a image of random clips.",
        {
            "action": {
                "type": Literal["info", "rejected", "verify", "preview"],
                "help": "info: counts and settings; rejected: the sources that gave no clips, with the reasons; verify: read and check all of it; preview: draw clips (--seed: which).",
            },
            "dataset": _path("Folder that `tcan preprocess` made."),
            "--out": _path("The image that preview writes.", default="preview.png"),
        },
        _dataset,
        ("pretrained", "train"),
    ),
    "train": Command(
        "Train TCAN on a clip dataset: stage 1 (images), then stage 2 (motion).",
        {
            "dataset": _path("Folder that `tcan preprocess` made."),
            "--out": _required_path(
                "Folder of the checkpoints and the trained model; run again, it goes on from there."
            ),
            "--stage": {
                "type": Literal["1", "2", "all"],
                "default": "all",
                "help": "Only this stage, or both, one after the other.",
            },
            "--from": _path(
                "A model of stage 1 that stage 2 starts from: a folder, models:/NAME@ALIAS, or the id of an MLflow run; without it OUT's own."
            ),
        },
        _train,
        ("pretrained", "train", "tracking"),
        submittable=True,
    ),
    "animate": Command(
        "Animate the person in a image with the motion of a video.",
        {
            "--image": _path("Image of the person."),
            "--driving": _path("Video whose motion to take."),
            "--poses": _path(
                "Poses to take instead of those found in the video: a file of `tcan pose`, corrected or made by hand, or "
                "a folder of OpenPose's files."
            ),
            "--character": _path("The image's keypoints, such a file too; without it they are found."),
            "--pairs": _path(
                "Instead of one image: a .csv or .parquet with the columns image, driving and out, whose missing "
                "results are made over the Ray cluster."
            ),
            "--model": MODEL,
            "--out": _path("What to write: .mp4, .webm, .gif, or without a suffix a folder of PNG images."),
            "--fps": {
                "type": float,
                "help": "Frames a second; without it those of the video, or what the file of poses says.",
            },
            "--audio": {"action": "store_true", "help": "Copy the driving video's sound."},
            "--side_by_side": {
                "action": "store_true",
                "help": "Write image, driving pose and result beside each other.",
            },
        },
        _animate,
        ("pretrained", "animate", "tracking"),
    ),
    "pose": Command(
        "Find the poses of a video or image, and write them to a file that can be corrected by hand.",
        {
            "source": _path("Video or image."),
            "--out": _required_path("The .json to write; a preview is written beside it."),
        },
        _pose,
        ("pretrained", "animate"),
    ),
    "evaluate": Command(
        "Measure a model on held-out videos: each one's first frame animated by its own motion.",
        {
            "videos": _path("Folder of held-out videos."),
            "--model": MODEL,
            "--out": _required_path("Folder of the metrics and the videos made."),
        },
        _evaluate,
        ("pretrained", "animate", "evaluate", "tracking"),
    ),
    "export": Command(
        "Write a model and all it was trained on into one folder that needs nothing else.",
        {
            "--model": _required_path("Folder of a trained model."),
            "--out": _required_path("The folder to write; `tcan animate --model` takes it."),
        },
        _export,
        ("pretrained",),
    ),
    "weights": Command(
        "Say what files and folders of weights are, and whether they fit.",
        {
            "action": {"type": Literal["check"], "help": "check: names and shapes, strictly."},
            "paths": {"nargs": "+", "type": str, "help": "Files or folders, also of trained models."},
        },
        _weights,
        (),
    ),
    "demo": Command(
        "Run all of it on rendered puppets, from videos to animated videos.",
        {"--out": _path("Folder of all it makes; run again, it goes on from there.", default="demo")},
        _demo,
        ("pretrained", "preprocess", "train", "animate", "evaluate", "tracking"),
    ),
    "memory": Command(
        "Say how much of a GPU's memory training takes.",
        {
            "--gpus": {"type": int, "default": 8, "help": "Said for one GPU, and for so many."},
            "--stage": {
                "type": Literal["1", "2", "all"],
                "default": "all",
                "help": "Of this stage, or of both.",
            },
        },
        _memory,
        ("pretrained", "train"),
    ),
    "ui": Command(
        "Open the page of the recorded runs (MLflow).",
        {"--port": {"type": int, "default": 5000, "help": "The port to serve it on."}},
        _ui,
        ("tracking",),
    ),
}


if __name__ == "__main__":
    sys.exit(main())
