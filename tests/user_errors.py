"""Records every `UserError` that the suite provokes. `pytest --user-errors` prints them as a table, to be read in one go.

`tests/test_user_errors.py`, which runs last, checks their form.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

from tcan.errors import UserError

TESTS = Path(__file__).parent
messages: dict[str, str] = {}
"""Message -> the first test that provoked it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--user-errors", action="store_true", help="Print all user errors of the run as a table."
    )


def pytest_configure(config: pytest.Config) -> None:
    original = UserError.__init__

    def record(error: UserError, *arguments: object) -> None:
        original(error, *arguments)
        raised_in_test = Path(sys._getframe(1).f_code.co_filename).is_relative_to(TESTS)
        if arguments and isinstance(arguments[0], str) and not raised_in_test:
            messages.setdefault(arguments[0], current_test.get("name", ""))

    UserError.__init__ = record  # type: ignore[method-assign, assignment]


current_test: dict[str, str] = {}


def pytest_runtest_logstart(nodeid: str) -> None:
    current_test["name"] = nodeid


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # exists in the workers of pytest-xdist only
    if output is not None:
        output["user_errors"] = messages


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect the messages of a worker of pytest-xdist."""
    for message, test in getattr(node, "workeroutput", {}).get("user_errors", {}).items():
        messages.setdefault(message, test)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("user_errors"):
        return
    terminalreporter.section(f"{len(messages)} user errors")
    for message, test in sorted(messages.items(), key=lambda entry: entry[1]):
        terminalreporter.line(f"{test.rpartition('::')[2][:50]:<50}  {' '.join(message.split())}")
