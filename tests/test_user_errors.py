"""The form of all user errors that the suite has provoked: what failed, where, and what to do, on one line."""

import re

import pytest

from tests.user_errors import messages

LOCATION = re.compile(r"[:=]|--|^(missing|unknown|unexpected) ")


def problem(message: str) -> str | None:
    text = " ".join(message.split())
    if "Traceback" in message or "\n" in message.strip():
        return "more than one line"
    if text.endswith("."):
        return "ends with a period"
    if not LOCATION.search(text):
        return "does not say where"
    if not re.search(r"; \S", text):
        return "does not say what to do"
    return None


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("videos/a.mp4: no video stream; remove the file or re-encode it", None),
        ("videos/a.mp4: no video stream", "does not say what to do"),
        ("no video stream; remove the file", "does not say where"),
        ("a: b; c\nTraceback", "more than one line"),
    ],
)
def test_malformed_messages_are_detected(message: str, expected: str | None) -> None:
    assert problem(message) == expected


def test_every_user_error_names_what_failed_where_and_what_to_do() -> None:
    malformed = [
        f"{found}: {message!r} ({test})" for message, test in messages.items() if (found := problem(message))
    ]
    assert not malformed, "\n".join(malformed)
