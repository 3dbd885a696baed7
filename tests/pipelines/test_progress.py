"""Progress of a job: lines in a file, a bar on a terminal."""

import os
import pty
import sys
import termios

import pytest

from pipelines import progress as module
from pipelines.progress import progress


@pytest.mark.parametrize(("seconds", "counts"), [(0, [1, 2, 3, 4]), (1000, [1, 4])])
def test_lines_have_the_first_and_the_last_item_and_a_minimum_interval(
    seconds: float, counts: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", seconds)
    assert list(progress(iter("abcd"), "video", 4)) == list("abcd")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"{count} of 4 videos" for count in counts]
    assert [line.endswith("min left") for line in lines] == [count < 4 for count in counts]


def test_terminal_shows_a_bar_and_no_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with open(terminal, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        assert list(progress(iter("ab"), "pair", 2)) == list("ab")
    assert "pairs: 100%" in os.read(leader, 1 << 16).decode()
    assert capsys.readouterr().out == ""
