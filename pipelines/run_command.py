"""The functions that run the commands of `tcan`: parsed arguments and configuration to the call of a job.

The modules of a command are imported when it runs, so that `tcan --help` is fast.
"""

import os
import sys
from pathlib import Path
from typing import Any

from tcan.errors import UserError


def preprocess(arguments: Any, config: Any) -> None:
    from pipelines.preprocess.job import preprocess

    preprocess(
        arguments.videos,
        arguments.out,
        config,
        limit=arguments.limit,
        retry_rejected=arguments.retry_rejected,
    )


def dataset(arguments: Any, config: Any) -> None:
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


def train(arguments: Any, config: Any) -> None:
    from pipelines.train.job import train

    train(arguments.dataset, arguments.out, config, stage=arguments.stage, from_model=arguments["from"])


def animate(arguments: Any, config: Any) -> None:
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


def pose(arguments: Any, config: Any) -> None:
    from pipelines.pose import match, pose
    from pipelines.staging import local_input, local_output

    if arguments.detector is not None:
        config.pretrained.pose = arguments.detector
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


def evaluate(arguments: Any, config: Any) -> None:
    from pipelines.evaluate import evaluate
    from pipelines.inference import find_model

    evaluate(arguments.videos, find_model(arguments.model, config), arguments.out, config)


def export(arguments: Any, config: Any) -> None:
    from pipelines.staging import local_input, local_output
    from tcan.weights import export_model

    with local_output(arguments.out) as out:
        export_model(local_input(arguments.model), out, pose=config.pretrained.pose)
    print(f"{arguments.out}: exported with all pretrained models", flush=True)


def doctor(arguments: Any, config: Any) -> int:
    from pipelines.doctor.job import doctor
    from pipelines.staging import local_output

    with local_output(arguments.out) as out:
        return doctor(config, arguments.model, out)


def weights(arguments: Any, config: Any) -> None:
    from tcan.weights.check import describe

    problems = []
    for path in arguments.paths:
        try:
            print(f"{path}: {describe(Path(path))}: compatible", flush=True)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))


def demo(arguments: Any, config: Any) -> None:
    from pipelines.demo import demo

    demo(Path(arguments.out), config)


def study(arguments: Any, config: Any) -> None:
    from pipelines.study.questions import questions
    from pipelines.study.run import study

    chosen = questions(arguments.questions, config.study.pose_error_sizes)
    study(arguments.out, chosen, arguments.seeds, config, arguments.report_only)


def memory(arguments: Any, config: Any) -> None:
    from pipelines.memory import memory

    memory(config, arguments.gpus, arguments.stage, arguments.job)


def jobs(arguments: Any, config: Any) -> int:
    from pipelines.submit import manage_jobs

    return manage_jobs(arguments.action, arguments.address, arguments.job_id)


def track(arguments: Any, config: Any) -> None:
    from pipelines.recovery import sync

    sync(Path(arguments.path), config.tracking)


def ui(arguments: Any, config: Any) -> None:
    from pipelines.ui import ui

    ui(config, arguments.port)


def app(arguments: Any, config: Any) -> None:
    from pipelines.app.server import serve

    serve(
        arguments.model,
        config,
        arguments.host,
        arguments.port,
        arguments.max_frames,
        arguments.max_upload_mb,
    )
