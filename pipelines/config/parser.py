"""Command line and YAML files -> `pipelines.config.Config`.

This module imports neither torch nor Ray nor MLflow, so that `tcan --help` is fast.
"""

import argparse
import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import ActionConfigFile

from pipelines.config import Config
from tcan.errors import UserError

PRESETS = {name: Path(__file__).parent / "presets" / f"{name}.yaml" for name in ("mini", "sd15")}


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose help omits jsonargparse internals."""

    def format_help(self, *arguments: Any) -> str:
        text = super().format_help(*arguments)
        text = re.sub(r"default config file locations:.*?\n\n", "", text, flags=re.DOTALL)
        return re.sub(r"\(required,(\s+)type:", r"(type:", text)  # presets set every required key


def make_parser(prog: str, description: str, sections: Collection[str] = ()) -> jsonargparse.ArgumentParser:
    """Create the parser of a command, with `--config` and every key; the caller adds the arguments of the command.

    Args:
        sections: configuration sections that the command uses. The help hides the other ones; the parser accepts them,
            so that one YAML file serves all commands.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "%(prog)s ARGUMENTS [--config mini|sd15|FILE.yaml] [--key.path VALUE ...]"
    epilog = "The keys of other commands are accepted too, so that one file serves all; `tcan demo --help` lists every key."
    parser = _Parser(prog=prog, description=description, usage=usage, epilog=epilog, exit_on_error=False)
    parser.add_argument(
        "--config",
        action=_ConfigFile,
        metavar="mini|sd15|FILE.yaml",
        help="Preset, or YAML file with the keys that differ from the preset given before it (default: mini). Keys on the "
        "command line override both.",
    )
    parser.add_class_arguments(Config)
    section_options = {key.rpartition(".")[0] for key in _all_keys(Config)}
    for action in parser._actions:
        section, _, key = action.dest.partition(".")
        if action.dest in section_options or (key and section not in sections):
            action.help = argparse.SUPPRESS
    return parser


def parse(
    parser: jsonargparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[Config, jsonargparse.Namespace]:
    """Parse a command line; returns the configuration and the arguments of the command.

    Raises:
        UserError: a missing or invalid YAML file, an unknown key, an invalid value, a missing or unexpected argument.
    """
    files, others = _split_config_files(arguments)
    preset = files.pop(0) if files and files[0] in PRESETS else "mini"
    parser.default_config_files = [PRESETS[preset]]  # --help shows the values of the preset
    try:
        namespace = parser.parse_args([*(f"--config={file}" for file in files), *others])
    except jsonargparse.ArgumentError as error:
        raise UserError(_one_line(str(error.message), parser, files, others)) from None
    values = parser.instantiate(namespace)
    config = Config(**{name.name: values.pop(name.name) for name in fields(Config)})
    return config, values


def load_config(*arguments: str) -> Config:
    """Load a configuration from Python: `load_config("--config", "sd15", "--train.workers", "2")`. Default: mini."""
    return parse(make_parser("config", ""), arguments)[0]


def _split_config_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into the values of `--config` and the other arguments; files apply before keys, whatever the order."""
    files, others = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            files.append(next(remaining, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            others.append(argument)
    return files, others


class _ConfigFile(ActionConfigFile):
    """Action of `--config`: load a preset or a YAML file; check its keys before its values."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = PRESETS.get(values) or Path(values)
        try:
            keys = yaml.load(path.read_text(), _UniqueKeys)
        except OSError as error:
            raise UserError(
                f"--config {values}: {error.strerror}; pass {', '.join(PRESETS)} or a YAML file"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problem = " ".join(str(error).split()).rstrip(" ^")
            raise UserError(f"{path}: invalid YAML: {problem}; fix the file") from None
        if not isinstance(keys, dict):
            raise UserError(f"{path}: no keys and values; write e.g. `seed: 1`")
        _check_keys(keys, Config, str(path))
        super().__call__(parser, cfg, str(path), option_string)


class _UniqueKeys(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys; PyYAML silently uses the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                problem = f"duplicate key {key.value}: first in line {first[key.value]}, again"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _check_keys(values: dict[str, Any], config: type, where: str, prefix: str = "") -> None:
    known = {item.name: item.type for item in fields(config)}
    for key, value in values.items():
        if f"{prefix}{key}" in _all_keys(Config) and "." in key:
            outer, _, inner = key.partition(".")
            raise UserError(f"{where}: {key}: not a nested key; write {outer}: {{{inner}: ...}}")
        if key not in known:
            raise UserError(
                f"{where}: unknown key {prefix}{key}; {_suggest(f'{prefix}{key}', _all_keys(Config))}"
            )
        section = known[key]
        if is_dataclass(section) and isinstance(section, type):
            if not isinstance(value, dict):
                raise UserError(
                    f"{where}: {prefix}{key} = {value}: not a section; write {prefix}{key}: {{KEY: VALUE}}"
                )
            _check_keys(value, section, where, f"{prefix}{key}.")


def _all_keys(config: type, prefix: str = "") -> list[str]:
    keys = []
    for item in fields(config):
        if is_dataclass(item.type) and isinstance(item.type, type):
            keys += _all_keys(item.type, f"{prefix}{item.name}.")
        else:
            keys.append(prefix + item.name)
    return keys


def _suggest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else "see --help for all keys"


def _one_line(
    message: str, parser: jsonargparse.ArgumentParser, files: list[str], arguments: list[str]
) -> str:
    """Convert an error message of jsonargparse to one line with the key, its source and what to do."""
    message = " ".join(message.split())
    options = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    if unknown := re.match(r"unrecognized arguments: (\S+)", message, re.IGNORECASE):
        key = unknown[1].split("=")[0]
        if not key.startswith("--"):
            return f"unexpected argument {unknown[1]}; see {parser.prog} --help"
        sections = {name.split(".")[0] for name in _all_keys(Config) if "." in name}
        return f"unknown key {key}; {_suggest(key, [f'--{o}' for o in options if o not in sections])}"
    if missing := re.match(r"the following arguments are required: (.+)", message):
        names = [f"--{name}" if name in options else name.upper() for name in missing[1].split(", ")]
        return f"missing {', '.join(names)}; see {parser.prog} --help"
    message = re.sub(
        r"Does not validate .*? Subtypes: \[(.+?)\] Errors: .* Given value: ",
        r"Expected a \1. Got value: ",
        message,
    )
    message = re.sub(r"<class '(.+?)'>", r"\1", message).replace("typing.", "")
    message = message.replace("Expected a ", "expected ").replace(". Got value: ", ", got ")
    if typed := re.match(r'Parser key "([^"]+)": (.+)', message):
        on_command_line = any(argument.split("=")[0] == f"--{typed[1]}" for argument in arguments)
        where = "" if on_command_line or not files else f"{', '.join(files)}: "
        return f"{where}{typed[1]}: {typed[2]}; see {parser.prog} --help"
    return f"{message}; see {parser.prog} --help"
