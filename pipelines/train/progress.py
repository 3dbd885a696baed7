"""The progress bar on the driver's terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} remaining{postfix}"


@contextmanager
def progress(name: str, steps: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar with the remaining time. Yields a function that updates it with (step, text).

    Output printed meanwhile, including what Ray prints for its workers, appears above the bar.
    """
    terminal, bar = sys.stderr, None

    def show(step: int, text: str) -> None:
        nonlocal bar
        # Created at the first update, so that the start of the workers and earlier steps do not distort the estimate.
        if bar is None:
            bar = tqdm(
                desc=name, total=steps, initial=step, postfix=text, bar_format=FORMAT, file=terminal,
                dynamic_ncols=True, miniters=1,
            )  # fmt: skip
        bar.set_postfix_str(text, refresh=False)
        bar.update(step - bar.n)

    lines: Any = DummyTqdmFile(terminal)
    try:
        with redirect_stdout(lines), redirect_stderr(lines):
            yield show
    finally:
        if bar is not None:
            bar.refresh()
            bar.close()
