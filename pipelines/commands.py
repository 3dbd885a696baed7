"""The commands of `tcan`: arguments and help texts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipelines import run_command
from pipelines.config.study import QuestionName


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
    computes: bool = False
    """Whether the networks run in the process of the command, so that `--submit` reserves a GPU or a CPU for it."""


def _path(text: str, **options: Any) -> dict[str, Any]:
    return {"type": str, "help": text, **options}


def _required_path(text: str) -> dict[str, Any]:
    return _path(text, required=True)


DATASET = _path("Clip dataset: the OUT folder of `tcan preprocess`.")
OWN_MODEL = (
    "a folder (local or s3://...), models:/NAME@ALIAS (e.g. models:/tcan@latest), or an MLflow run id."
)
MINI_OR_OWN = _path(f"Trained model: mini (the one in this package), {OWN_MODEL}", default="mini")
MODEL = _required_path(f"Trained model: mini (the one in this package), {OWN_MODEL}")

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
        run_command.preprocess,
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
        run_command.dataset,
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
        run_command.train,
        ("pretrained", "draw", "train", "tracking"),
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
                "Table (.csv or .parquet, local or s3://...) with the columns image, driving and out, and optionally person and "
                "driving_person, instead of a single image. Missing results are generated on the Ray cluster."
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
                "help": "Check of the settings and the poses only: prints the findings and writes OUT.preview.png.",
            },
            "--strict": {
                "action": "store_true",
                "help": "Refusal of poses that do not match the image, instead of warnings.",
            },
        },
        run_command.animate,
        ("pretrained", "draw", "animate", "tracking"),
        submittable=True,
        computes=True,
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
        run_command.app,
        ("pretrained", "draw", "animate", "tracking"),
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
            "--detector": _path(
                "Pose detector, in the forms of `pretrained.pose`. Default: `pretrained.pose`."
            ),
            "--person": PERSON,
            "--driving_person": DRIVING_PERSON,
        },
        run_command.pose,
        ("pretrained", "draw", "animate"),
    ),
    "evaluate": Command(
        "Evaluate a model on held-out videos: animate the first frame of each with its own motion.",
        {
            "videos": _path("Folder of held-out videos."),
            "--model": MODEL,
            "--out": _required_path("Folder of the metrics and the generated videos."),
        },
        run_command.evaluate,
        ("pretrained", "draw", "animate", "evaluate", "tracking"),
        submittable=True,
        computes=True,
    ),
    "export": Command(
        "Export a model and its pretrained models to one self-contained folder.",
        {
            "--model": _required_path("Folder of a trained model."),
            "--out": _required_path("Folder to write, for `tcan animate --model`."),
        },
        run_command.export,
        ("pretrained",),
    ),
    "weights": Command(
        "Identify weight files and folders, and check that they are compatible.",
        {
            "action": {"type": Literal["check"], "help": "Action. check: strict check of names and shapes."},
            "paths": {"nargs": "+", "type": str, "help": "Weight files, weight folders or trained models."},
        },
        run_command.weights,
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
        run_command.doctor,
        ("pretrained", "train", "animate", "tracking"),
        submittable=True,
        computes=True,
    ),
    "demo": Command(
        "Run all steps on rendered puppets, from videos to animated videos.",
        {"--out": _path("Folder of all results. If it exists, the demo resumes.", default="demo")},
        run_command.demo,
        ("pretrained", "draw", "preprocess", "train", "animate", "evaluate", "tracking"),
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
                "ControlNet frozen/fine-tuned, weak; scenes, several people, long videos; pose detectors and body maps; operations of the "
                "temporal ControlNet; sampling options.",
            },
            "--seeds": {"type": int, "default": 3, "help": "Number of trainings of each model (>= 1)."},
            "--report_only": {
                "action": "store_true",
                "help": "Report of the finished cells, without running the missing ones.",
            },
        },
        run_command.study,
        ("pretrained", "draw", "preprocess", "train", "animate", "study", "tracking"),
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
        run_command.memory,
        ("pretrained", "draw", "preprocess", "train", "animate"),
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
        run_command.jobs,
        (),
    ),
    "track": Command(
        "Deliver the MLflow records of jobs that ended while MLflow was not available.",
        {
            "action": {"type": Literal["sync"], "help": "Action. sync: delivery of all waiting records."},
            "path": _path("OUT folder of the job (searched recursively), or a .spool file."),
        },
        run_command.track,
        ("tracking",),
    ),
    "ui": Command(
        "Serve the MLflow page of the recorded runs.",
        {"--port": {"type": int, "default": 5000, "help": "Port of the server (1 to 65535)."}},
        run_command.ui,
        ("tracking",),
    ),
}
