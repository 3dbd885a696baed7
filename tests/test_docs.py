"""The documentation agrees with the code: commands, error messages, module names, links."""

import ast
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.commands import COMMANDS
from pipelines.config import Config

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("infra/*.md")),
]
README_LINES = 120
PLACEHOLDER = "…"  # in the messages of docs/troubleshooting.md: any text

EXECUTED_BY = {
    "preprocess": "tests/pipelines/test_preprocess.py::test_every_source_is_kept_or_rejected_with_a_reason",
    "dataset": "tests/pipelines/test_dataset.py::test_intact_dataset_passes_verification",
    "train": "tests/pipelines/test_train.py::test_each_stage_trains_only_its_own_parts",
    "animate": "tests/pipelines/test_animate.py::test_long_video_is_streamed_with_identical_frames",
    "app": "tests/pipelines/test_app.py::test_uploaded_image_dances_as_the_uploaded_video",
    "pose": "tests/pipelines/test_animate.py::test_pose_file_drives_the_same_animation_as_the_video",
    "evaluate": "tests/pipelines/test_demo.py::test_demo_writes_videos_evaluations_and_contact_sheet",
    "export": "tests/tcan/test_weights.py::test_exported_model_needs_no_other_files",
    "weights": "tests/tcan/test_weights.py::test_describe_identifies_folders",
    "doctor": "tests/pipelines/test_doctor.py::test_doctor_of_mini_finds_nothing_and_writes_a_report",
    "demo": "tests/pipelines/test_demo.py::test_demo_writes_videos_evaluations_and_contact_sheet",
    "study": "tests/pipelines/test_study.py::test_killed_study_resumes_and_a_failed_cell_does_not_stop_the_others",
    "memory": "tests/pipelines/test_cli.py::test_memory_prints_a_stage_by_gpus_and_zero_stage",
    "jobs": "tests/pipelines/test_submit.py::test_submitting_an_id_again_follows_its_job",
    "track": "tests/pipelines/test_outages.py::test_records_left_at_the_end_are_delivered_by_track_sync",
    "ui": "tests/pipelines/test_tracking.py::test_ui_serves_runs_and_artifacts_until_interrupted",
}
"""For each command, a test that executes it."""


def code_lines(text: str) -> Iterator[str]:
    """Lines of fenced and indented code blocks, joined at a trailing backslash."""
    fenced, pending = False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            pending += line.strip()
            if pending.endswith("\\"):
                pending = pending[:-1]
                continue
            yield pending
            pending = ""


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of every `tcan ...` command in code blocks, and in the table of jobs of the README."""
    text = page.read_text()
    lines = [*code_lines(text)]
    if page.name == "README.md":
        lines += re.findall(r"^\|[^|]+\| `(tcan [^`]+)` \|", text, re.MULTILINE)
    for line in lines:
        if match := re.match(r"(?:[A-Z_]+=\S+ )*(?:\S+/)?tcan (.+)", line) or re.search(
            r"-m pipelines\.cli (.+)", line
        ):
            yield shlex.split(match[1], comments=True)


def mentioned_options(text: str) -> Iterator[tuple[str, str]]:
    """(command, option) of every inline `tcan COMMAND --option`."""
    for code in re.findall(r"`tcan ([^`]+)`", text):
        name, *tokens = code.split()
        yield from ((name, token.partition("=")[0]) for token in tokens if token.startswith("--"))


@cache
def message_templates() -> str:
    """All string literals of both packages, one per line, with `PLACEHOLDER` for formatted values."""
    found = []
    for package in ("tcan", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = (
                        part.value if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values
                    )
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def documented_messages() -> list[str]:
    """The messages of docs/troubleshooting.md: the code in the first column of its tables."""
    return re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


def package_modules() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for package in ("tcan", "pipelines")
        for path in (ROOT / package).rglob("*.py")
    }


def config_keys(config: type, prefix: str = "") -> Iterator[str]:
    """All keys of a configuration dataclass, those of sections included."""
    for item in dataclasses.fields(config):
        yield prefix + item.name
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            yield from config_keys(item.type, f"{prefix}{item.name}.")


DOCUMENTED_COMMANDS = sorted(
    {(page.name, shlex.join(command)) for page in PAGES for command in commands(page)}
)


@pytest.mark.parametrize(("page", "command"), DOCUMENTED_COMMANDS)
def test_documented_commands_are_accepted_by_the_parser(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = shlex.split(command)
    name = arguments[0]
    assert name in COMMANDS, f"{page}: no such command"
    monkeypatch.setitem(COMMANDS, name, dataclasses.replace(COMMANDS[name], run=lambda *_: None))
    monkeypatch.setattr(cli, "_submit", lambda *_: 0)
    assert cli.main(arguments) == 0, f"{page}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mentioned_options_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, option in mentioned_options(page.read_text()):
        if name == "COMMAND" or option == "--help":
            continue
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert f"{option} " in capsys.readouterr().out, f"{page.name}: tcan {name} {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mentioned_configuration_keys_exist(page: Path) -> None:
    sections = "preprocess|train|animate|evaluate|tracking|pretrained"
    mentioned = re.findall(rf"`(?:--)?((?:{sections})\.[a-z0-9_.]+)", page.read_text())
    assert set(mentioned) <= set(config_keys(Config))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_imports_in_python_examples_succeed(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for name in [alias.name for alias in node.names if not hasattr(module, alias.name)]:
                    importlib.import_module(f"{node.module}.{name}")


def test_every_command_is_documented() -> None:
    assert {command.split()[0] for _, command in DOCUMENTED_COMMANDS} >= COMMANDS.keys() - {"demo"}
    assert "tcan demo" in (ROOT / "Makefile").read_text()


def test_every_command_is_executed_by_a_test() -> None:
    assert EXECUTED_BY.keys() == COMMANDS.keys()
    for name in EXECUTED_BY.values():
        file, _, test = name.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_quoted_error_messages_exist_in_the_source() -> None:
    messages = documented_messages()
    assert len(messages) >= 20
    patterns = {message: ".*".join(map(re.escape, message.split(PLACEHOLDER))) for message in messages}
    assert not [
        message for message, pattern in patterns.items() if not re.search(pattern, message_templates())
    ]


def test_module_map_is_complete() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"^\| `((?:tcan|pipelines)/[\w/]+\.py)` \|", text, re.MULTILINE))
    assert named == package_modules()
    for path in re.findall(r"`((?:tcan|pipelines|tests|infra|docs)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]+)?\)", page.read_text()):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            anchors = {
                "#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
            assert anchor in anchors, f"{page.name}: {target}{anchor}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_model_readme_names_existing_tests() -> None:
    """The third column of the tables in tcan/README.md: test files, each followed by names without `test_`."""
    missing = []
    for line in (ROOT / "tcan" / "README.md").read_text().splitlines():
        cells = line.split("|")
        if len(cells) != 5:
            continue
        path: Path | None = None
        for token in re.findall(r"`([^`]+)`", cells[3]):
            if token.endswith(".py"):
                found = [*(ROOT / "tests" / "tcan").glob(token), *(ROOT / "tests").glob(token)]
                path = found[0] if found else None
                missing += [] if found else [token]
            elif path and f"def test_{token}(" not in path.read_text():
                missing.append(f"{path.name}: {token}")
    assert not missing, "\n".join(missing)
