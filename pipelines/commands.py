"""The commands of `tcan`: arguments, help texts, and the functions that run them.

The modules of a command are imported when it runs, so that `tcan --help` is fast.
"""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pipelines.config.study import QuestionName
from tcan.errors import UserError


@dataclass(frozen=True)
class Command:
    """One command of the command line."""

    help: str
    arguments: dict[str, dict[str, Any]]
    """Name of an argument -> keyword arguments of the parser's `add_argument`."""
    run: Callable[[Any, Any], int | None]
    """Called with the parsed arguments and the configuration; returns the exit status (None: 0)."""
    sections: tuple[str, ...]
    """Configuration sections that the command uses."""
    submittable: bool = False
    """Whether the command supports `--submit`."""


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
    except BrokenPipeError:  # the reader of the pipe has exited, e.g. `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _train(arguments: Any, config: Any) -> None:
    from pipelines.train.job import train

    train(arguments.dataset, arguments.out, config, stage=arguments.stage, from_model=arguments["from"])


def _animate(arguments: Any, config: Any) -> None:
    names = ("image", "driving", "poses", "character", "out", "fps")
    given = {name: arguments[name] for name in names if arguments[name] is not None}
    flags = ("audio", "side_by_side", "person", "driving_person", "strict")
    options = {name: arguments[name] for name in flags}
    if arguments.pairs is not None:
        if arguments.dry_run:
            given["dry-run"] = True
        if given:
            raise UserError(f"--pairs: conflicts with --{', --'.join(given)}; remove --{', --'.join(given)}")
        from pipelines.animate_pairs import animate_pairs

        animate_pairs(arguments.pairs, arguments.model, config, **options)
        return
    if missing := [f"--{name}" for name in ("image", "out") if name not in given]:
        raise UserError(f"missing {', '.join(missing)}; see tcan animate --help")

    from pipelines.animate import Animation, animate
    from pipelines.inference import find_model
    from pipelines.staging import local_input, local_output

    inputs: dict[str, Any] = {
        name: local_input(value) for name, value in given.items() if name not in ("fps", "out")
    }
    model = find_model(arguments.model, config)
    with local_output(arguments.out) as out:
        animation = Animation(**inputs, out=out, fps=arguments.fps, **options)
        animate(animation, model, config, arguments.dry_run)


def _pose(arguments: Any, config: Any) -> None:
    from pipelines.pose import match, pose
    from pipelines.staging import local_input, local_output

    source = local_input(arguments.source)
    if arguments.match is not None:
        with local_output(arguments.out or "match.png") as out:
            image = local_input(arguments.match)
            match(source, image, out, config, arguments.person, arguments.driving_person)
        return
    if arguments.out is None:
        raise UserError("missing --out; see tcan pose --help")
    with local_output(arguments.out) as out:
        pose(source, out, config, arguments.person)


def _evaluate(arguments: Any, config: Any) -> None:
    from pipelines import storage
    from pipelines.evaluate import evaluate
    from pipelines.lock import locked
    from pipelines.staging import local_output
    from pipelines.tracking import local_model

    model = local_model(arguments.model, config.tracking)
    is_remote = storage.is_remote(arguments.out)
    lock = locked(arguments.out, "evaluate") if is_remote else nullcontext()  # `evaluate` locks local folders
    with lock, local_output(arguments.out) as out:
        evaluate(arguments.videos, model, out, config)


def _export(arguments: Any, config: Any) -> None:
    from pipelines.staging import local_input, local_output
    from tcan.weights import export_model

    with local_output(arguments.out) as out:
        export_model(local_input(arguments.model), out, pose=config.pretrained.pose)
    print(f"{arguments.out}: exported with all pretrained models", flush=True)


def _doctor(arguments: Any, config: Any) -> int:
    from pipelines.doctor.job import doctor
    from pipelines.staging import local_output

    with local_output(arguments.out) as out:
        return doctor(config, arguments.model, out)


def _weights(arguments: Any, config: Any) -> None:
    from tcan.weights.check import describe

    problems = []
    for path in arguments.paths:
        try:
            print(f"{path}: {describe(Path(path))}: compatible", flush=True)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))


def _demo(arguments: Any, config: Any) -> None:
    from pipelines.demo import demo

    demo(Path(arguments.out), config)


def _study(arguments: Any, config: Any) -> None:
    from pipelines.study.questions import questions
    from pipelines.study.run import study

    chosen = questions(arguments.questions, config.study.pose_error_sizes)
    study(arguments.out, chosen, arguments.seeds, config)


def _memory(arguments: Any, config: Any) -> None:
    from pipelines.memory import memory

    memory(config, arguments.gpus, arguments.stage, arguments.job)


def _jobs(arguments: Any, config: Any) -> int:
    from pipelines.submit import manage_jobs

    return manage_jobs(arguments.action, arguments.address, arguments.job_id)


def _track(arguments: Any, config: Any) -> None:
    from pipelines.tracking import sync

    sync(Path(arguments.path), config.tracking)


def _ui(arguments: Any, config: Any) -> None:
    from pipelines.ui import ui

    ui(config, arguments.port)


def _app(arguments: Any, config: Any) -> None:
    from pipelines.app.server import serve

    serve(
        arguments.model,
        config,
        arguments.host,
        arguments.port,
        arguments.max_frames,
        arguments.max_upload_mb,
    )


def _path(text: str, **options: Any) -> dict[str, Any]:
    return {"type": str, "help": text, **options}


def _required_path(text: str) -> dict[str, Any]:
    return _path(text, required=True)


DATASET = _path("Clip dataset: the OUT folder of `tcan preprocess`.")
OWN_MODEL = (
    "a folder (local or s3://...), models:/NAME@ALIAS (e.g. models:/tcan@latest), or an MLflow run id."
)
MINI_OR_OWN = _path(f"Trained model: mini (the one in this package), {OWN_MODEL}", default="mini")
MODEL = _required_path(f"Trained model: {OWN_MODEL}")

PERSON = {
    "type": str,
    "default": "largest",
    "help": "Person of the image: largest, left, right, a number of the preview of `tcan pose`, or X,Y in pixels; several "
    "people are joined by +, e.g. left+right.",
}
DRIVING_PERSON = {
    "type": str,
    "default": "largest",
    "help": "Person of the driving motion, in the forms of --person. Several people move those of --person in this order.",
}

COMMANDS = {
    "preprocess": Command(
        "Convert videos to a clip dataset.",
        {
            "videos": _path(
                "Videos: a folder (searched recursively), a quoted glob pattern, a list (.txt) or a single video; a local "
                "path, s3:// or gs://."
            ),
            "out": _path(
                "Folder of the clip dataset; a local path, s3:// or gs://. If it exists, only missing clips are added."
            ),
            "--limit": {
                "type": int,
                "default": 0,
                "help": "Maximum number of videos (>= 0), sorted by name. 0: all videos.",
            },
            "--retry_rejected": {
                "action": "store_true",
                "help": "Retry of the videos that earlier runs rejected.",
            },
        },
        _preprocess,
        ("pretrained", "preprocess", "tracking"),
        submittable=True,
    ),
    "dataset": Command(
        "Inspect a clip dataset: counts, rejected videos, file integrity, preview of random clips.",
        {
            "action": {
                "type": Literal["info", "rejected", "verify", "preview"],
                "help": "Action. info: counts and settings; rejected: rejected videos with reasons; verify: integrity "
                "check of all files; preview: image of random clips (set --seed for others).",
            },
            "dataset": DATASET,
            "--out": _path("Image file of preview.", default="preview.png"),
        },
        _dataset,
        ("pretrained", "train"),
    ),
    "train": Command(
        "Train TCAN on a clip dataset: stage 1 (images), then stage 2 (motion).",
        {
            "dataset": DATASET,
            "--out": _required_path(
                "Folder of the checkpoints and the trained model, local or s3://... If it has checkpoints, training resumes."
            ),
            "--stage": {
                "type": Literal["1", "2", "all"],
                "default": "all",
                "help": "Stage to train; all: stage 1, then stage 2.",
            },
            "--from": _path(
                "Stage 1 model from which stage 2 starts: a folder (local or s3://...), models:/NAME@ALIAS, or an MLflow run id. Default: "
                "the stage 1 model in OUT."
            ),
        },
        _train,
        ("pretrained", "train", "tracking"),
        submittable=True,
    ),
    "animate": Command(
        "Animate the person in an image with the motion of a video.",
        {
            "--image": _path("Reference image of the person."),
            "--driving": _path("Driving video."),
            "--poses": _path(
                "Driving poses instead of those detected in the driving video: a file of `tcan pose`, or a folder of "
                "OpenPose JSON files."
            ),
            "--character": _path(
                "Keypoints of the reference image, in the formats of --poses. Default: detected in the image."
            ),
            "--pairs": _path(
                "Table (.csv or .parquet, local or s3://...) with the columns image, driving and out, instead of a single image. Missing "
                "results are generated on the Ray cluster."
            ),
            "--model": MINI_OR_OWN,
            "--out": _path("Result: .mp4, .webm, .gif, or a folder of PNG images (no suffix)."),
            "--fps": {
                "type": float,
                "help": "Frame rate of the result in frames per second (> 0). Default: that of the driving video or of "
                "the pose file.",
            },
            "--audio": {"action": "store_true", "help": "Copy of the driving video's audio in the result."},
            "--side_by_side": {
                "action": "store_true",
                "help": "Result with reference image and driving pose next to each frame.",
            },
            "--person": PERSON,
            "--driving_person": DRIVING_PERSON,
            "--dry-run": {
                "action": "store_true",
                "help": "Check of the poses only: prints the findings and writes OUT.preview.png.",
            },
            "--strict": {
                "action": "store_true",
                "help": "Refusal of poses that do not match the image, instead of warnings.",
            },
        },
        _animate,
        ("pretrained", "animate", "tracking"),
    ),
    "app": Command(
        "Serve a web page on this machine, on which to animate images.",
        {
            "--model": MINI_OR_OWN,
            "--host": {
                "type": str,
                "default": "127.0.0.1",
                "help": "Address to listen at. 0.0.0.0: all addresses of this machine, so that others can use the page.",
            },
            "--port": {"type": int, "default": 7860, "help": "Port of the server (1 to 65535)."},
            "--max_frames": {
                "type": int,
                "default": 600,
                "help": "Maximum number of frames of a driving video (>= 1).",
            },
            "--max_upload_mb": {
                "type": int,
                "default": 100,
                "help": "Maximum size of an uploaded file in MB (>= 1).",
            },
        },
        _app,
        ("pretrained", "animate", "tracking"),
    ),
    "pose": Command(
        "Detect the poses of a video or image and write them to an editable file.",
        {
            "source": _path("Video or image."),
            "--out": _path(
                "Pose file (.json), required without --match; a preview is written next to it. With --match: the preview "
                "(default: match.png)."
            ),
            "--match": _path(
                "Image of a person. Instead of a pose file, check whether the poses match it, and write a preview of "
                "animate.height x animate.width (default: size)."
            ),
            "--person": PERSON,
            "--driving_person": DRIVING_PERSON,
        },
        _pose,
        ("pretrained", "animate"),
    ),
    "evaluate": Command(
        "Evaluate a model on held-out videos: animate the first frame of each with its own motion.",
        {
            "videos": _path("Folder of held-out videos."),
            "--model": MODEL,
            "--out": _required_path("Folder of the metrics and the generated videos."),
        },
        _evaluate,
        ("pretrained", "animate", "evaluate", "tracking"),
    ),
    "export": Command(
        "Export a model and its pretrained models to one self-contained folder.",
        {
            "--model": _required_path("Folder of a trained model."),
            "--out": _required_path("Folder to write, for `tcan animate --model`."),
        },
        _export,
        ("pretrained",),
    ),
    "weights": Command(
        "Identify weight files and folders, and check that they are compatible.",
        {
            "action": {"type": Literal["check"], "help": "Action. check: strict check of names and shapes."},
            "paths": {"nargs": "+", "type": str, "help": "Weight files, weight folders or trained models."},
        },
        _weights,
        (),
    ),
    "doctor": Command(
        "Check this machine and all pretrained models: load them strictly, and prove with numbers that they work.",
        {
            "--model": _path(
                "Trained model of the animation: a folder, models:/NAME@ALIAS, or an MLflow run id. Default: the model in "
                "this package for the mini networks, else no training."
            ),
            "--out": _path("Folder of the report and a short animation.", default="doctor"),
        },
        _doctor,
        ("pretrained", "train", "animate", "tracking"),
        submittable=True,
    ),
    "demo": Command(
        "Run all steps on rendered puppets, from videos to animated videos.",
        {"--out": _path("Folder of all results. If it exists, the demo resumes.", default="demo")},
        _demo,
        ("pretrained", "preprocess", "train", "animate", "evaluate", "tracking"),
    ),
    "study": Command(
        "Test the paper's claims on rendered puppets: trainings and evaluations of ablations, with statistics.",
        {
            "--out": _path("Folder of all results. If it exists, the study resumes.", default="study"),
            "--questions": {
                "nargs": "+",
                "type": QuestionName,
                "default": list(get_args(QuestionName)),
                "help": "Questions: APPA on/off; temporal ControlNet on/off under pose errors; strength of the temperature map; "
                "ControlNet frozen/fine-tuned; operations of the temporal ControlNet; sampling options.",
            },
            "--seeds": {"type": int, "default": 3, "help": "Number of trainings of each model (>= 1)."},
        },
        _study,
        ("pretrained", "preprocess", "train", "animate", "study", "tracking"),
        submittable=True,
    ),
    "memory": Command(
        "Estimate the GPU memory of a job, and what fits into GPUs of common sizes.",
        {
            "--job": {
                "type": Literal["train", "preprocess", "animate"],
                "default": "train",
                "help": "Job to estimate.",
            },
            "--gpus": {
                "type": int,
                "default": 8,
                "help": "Number of GPUs (>= 1); the estimate for one GPU is printed too.",
            },
            "--stage": {
                "type": Literal["1", "2", "all"],
                "default": "all",
                "help": "Stage; all: both stages.",
            },
        },
        _memory,
        ("pretrained", "preprocess", "train", "animate"),
    ),
    "jobs": Command(
        "List, follow or stop the jobs of a Ray cluster that were submitted with --submit.",
        {
            "action": {
                "type": Literal["list", "follow", "stop"],
                "help": "Action. list: id, status, start and command of each job; follow: log until the end of a job, and "
                "its exit status; stop: end of a job.",
            },
            "--address": {"type": str, "required": True, "help": "Dashboard address, e.g. http://HOST:8265."},
            "--job_id": {"type": str, "help": "Id of the job to follow or stop."},
        },
        _jobs,
        (),
    ),
    "track": Command(
        "Deliver the MLflow records of jobs that ended while MLflow was not available.",
        {
            "action": {"type": Literal["sync"], "help": "Action. sync: delivery of all waiting records."},
            "path": _path("OUT folder of the job (searched recursively), or a .spool file."),
        },
        _track,
        ("tracking",),
    ),
    "ui": Command(
        "Serve the MLflow page of the recorded runs.",
        {"--port": {"type": int, "default": 5000, "help": "Port of the server (1 to 65535)."}},
        _ui,
        ("tracking",),
    ),
}
