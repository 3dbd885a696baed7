"""Command line: `tcan COMMAND ...`, or `python -m pipelines.cli COMMAND ...`. `tcan --help` lists the commands.

The modules of a command are imported when it runs, so that `tcan --help` is fast.
"""

import atexit
import difflib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any, NoReturn

from pipelines.commands import COMMANDS, Command
from pipelines.config.animate import MetricNetworksConfig
from pipelines.user_message import user_message
from tcan.errors import UserError

SUBMIT_HELP = (
    "Dashboard address of a Ray cluster on which to run the command as a job; its log is printed. Code is copied to the "
    "cluster; paths and URIs must be valid there."
)
ENVIRONMENT_HELP = (
    "Requirements file, e.g. requirements.lock, that uv installs on the cluster for a job of --submit. Default: the "
    "packages of the cluster's Python."
)
JOB_ID_HELP = (
    "Id of the job of --submit, for submitters that retry: if the cluster has a job with this id, its log is followed. "
    "Default: chosen by Ray."
)
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit statuses
PATH_KEYS = (
    "--tracking.folder",
    "--train.deepspeed",
    "--train.storage",
    "--animate.lora",
    *(f"--evaluate.networks.{field.name}" for field in fields(MetricNetworksConfig)),
)
"""Configuration keys whose values are paths."""
TEXT_ARGUMENTS = ("--person", "--driving_person")
"""Arguments of submittable commands that are texts, but not paths."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for an error that the user can fix, 130 when interrupted.

    Args:
        arguments: None: those of this process, which ends at once after Ctrl-C or SIGTERM.
    """
    is_program = arguments is None
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # SystemExit instead of immediate termination, so that runs and files are closed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    _silence_libraries()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch is imported
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        if is_program:
            _end(INTERRUPTED)
        return INTERRUPTED
    except SystemExit as end:
        if is_program and end.code == TERMINATED:
            _end(TERMINATED)
        raise
    except Exception as error:
        if message := user_message(error):
            if "pipelines.cluster" in sys.modules:  # avoids importing Ray for an error without it
                from pipelines.cluster import disconnect

                disconnect()  # no output of a worker may follow the error message
            if "pipelines.staging" in sys.modules:
                from pipelines.staging import original_names

                message = original_names(message)
            print(f"tcan: error: {message}", file=sys.stderr)
            return 2
        raise


def _end(status: int) -> NoReturn:
    """End the process after the functions of `atexit`, such as Ray's shutdown; a further signal ends it immediately.

    Python would then wait for the threads of all libraries and free every object, which takes much longer.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(status))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"tcan {version('tcan')}")
        return 0
    name, *options = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {close[0]}?" if close else "see tcan --help"
        raise UserError(f"unknown command {name}; {advice}")

    from pipelines.config.parser import make_parser, parse

    command = COMMANDS[name]
    parser = make_parser(f"tcan {name}", command.help, command.sections)
    for argument, settings in command.arguments.items():
        parser.add_argument(argument, **settings)
    if command.submittable:
        parser.add_argument("--submit", metavar="http://HOST:8265", help=SUBMIT_HELP)
        parser.add_argument("--environment", metavar="requirements.lock", help=ENVIRONMENT_HELP)
        parser.add_argument("--job_id", metavar="ID", help=JOB_ID_HELP)
    known = {option for action in parser._actions for option in action.option_strings}
    # A file whose name starts with a dash is a path, not an option.
    options = [f"./{o}" if o[:1] == "-" and o not in known and os.path.exists(o) else o for o in options]
    config, values = parse(parser, options)
    for argument in command.arguments:  # an empty path would mean the working directory
        if getattr(values, argument.removeprefix("--"), None) == "":
            raise UserError(f"{argument}: empty value; check that the shell variable is set")
    if command.submittable and values.submit is not None:
        return _submit(command, name, options, values, config)
    if command.submittable and values.environment is not None:
        raise UserError(
            "--environment: only valid with --submit; remove it to use the packages of this Python"
        )
    if command.submittable and values.job_id is not None:
        raise UserError("--job_id: only valid with --submit; remove it to run on this machine")
    return command.run(values, config) or 0


def _submit(command: Command, name: str, options: Sequence[str], values: Any, config: Any) -> int:
    """Run the command on the cluster, without `--submit`, `--environment` and `--job_id`, with absolute paths."""
    from pipelines.submit import absolute_paths, submit

    argv, tokens = [name], iter(options)
    for token in tokens:
        option, equals, _ = token.partition("=")
        if option not in ("--submit", "--environment", "--job_id"):
            argv.append(token)
        elif not equals:
            next(tokens)
    if command.arguments.get("--out", {}).get("default"):  # the job's working directory is temporary
        argv.append(f"--out={values.out}")
    flags = [key for key, settings in command.arguments.items() if settings.get("action") == "store_true"]
    lists = [key for key, settings in command.arguments.items() if settings.get("nargs") == "+"]
    texts = {key for key, settings in command.arguments.items() if settings.get("type") is str}
    paths = texts.difference(TEXT_ARGUMENTS)
    if not (config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        argv.append(f"--tracking.folder={config.tracking.folder}")
    argv = absolute_paths(argv, [*paths, *PATH_KEYS], flags, lists)
    # Workers compute the pairs of a table.
    computes = command.computes and values.get("pairs") is None
    device = config.animate.device if computes else None
    return submit(values.submit, argv, values.environment, values.job_id, device)


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    usage = "usage: tcan COMMAND ... [--config mini|sd15|FILE.yaml] [--key.path VALUE ...]"
    more = "`tcan COMMAND --help` lists the arguments and the configuration keys of a command."
    return "\n".join([usage, "", *lines, "", more])


def _silence_libraries() -> None:
    """Hide developer notices of libraries. Environment variables that are already set take precedence; Ray workers
    inherit them."""
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
        "KINETO_LOG_LEVEL": "6",  # PyTorch profiler
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch prints each line of a worker twice
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # suppresses Ray's notice of a changed default at every start
    }.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
