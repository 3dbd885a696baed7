"""Progress of a job that handles items one by one: a bar on a terminal, otherwise lines."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_SECONDS = 10  # minimum between two lines


def progress(items: Iterable[T], unit: str, total: int) -> Iterator[T]:
    """Yield the items. If stderr is no terminal, as in a submitted job, print lines: after the first and the last item, and
    at most every `LINE_SECONDS` in between. An item counts when the caller asks for the next one.

    Args:
        unit: name of an item, such as "video".
        total: number of items.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, f"{unit}s", total=total, unit=unit)
        return
    began = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if done in (1, total) or time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print(f"{done} of {total} {unit}s{time_left(began, done, total)}", flush=True)


def time_left(began: float, done: int, total: int) -> str:
    """The estimated time for the remaining items, for the end of a line; empty if there is no estimate.

    Args:
        began: `time.monotonic()` at the start of the first item.
    """
    if not done or done == total:
        return ""
    seconds = (time.monotonic() - began) / done * (total - done)
    return f", {seconds / 60:.0f} min left"
