"""Progress on the driver's terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


@contextmanager
def progress(name: str, steps: int) -> Iterator[Callable[[int, str], None]]:
    """A bar with the time left, from the first call with a step and how it goes. What is printed meanwhile, by Ray for its
    workers too, goes above the bar."""
    terminal, bar = sys.stderr, None

    def show(step: int, text: str) -> None:
        nonlocal bar
        # Not before: neither the workers' start nor the steps of an earlier one count in the time left.
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
