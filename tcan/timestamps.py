"""Time stamps of video frames: frame rates, repaired clocks, resampling."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import pairwise
from statistics import median
from typing import TypeVar

TOLERANCE = 2e-3  # seconds; containers round times
MAX_DRIFT = (
    2  # frames; less is not noticed, and containers may declare frames at either end that cannot be decoded
)
MAX_GAP = 10.0  # seconds; FFmpeg's limit for a discontinuity of the clock
STANDARD_RATES = [Fraction(r) for r in (24, 25, 30, 50, 60, 12, 15)] + [
    Fraction(r * 1000, 1001) for r in (24, 30, 60)
]

T = TypeVar("T")


def constant_rate(
    times: list[float], last_duration: float, candidates: Iterable[Fraction | None]
) -> tuple[float, bool]:
    """The frame rate, and whether it varies: whether a frame is more than MAX_DRIFT frames off the constant rate.

    Args:
        times: of the frames in seconds, increasing.
        last_duration: of the last frame in seconds; 0: unknown.
        candidates: rates that the header claims. The first one that explains the times is chosen, else a standard rate.
    """
    rates = [rate for rate in candidates if rate]
    intervals = [b - a for a, b in pairwise(times) if b > a]
    if not intervals:
        return float(rates[0]) if rates else 1 / last_duration if last_duration > 0 else 25.0, False
    usual = [interval for interval in intervals if interval < 1.5 * median(intervals)]
    typical = len(usual) / sum(usual)
    choices = [*rates, *STANDARD_RATES, Fraction(len(intervals) / sum(intervals)).limit_denominator(1001)]
    for limit in (0.5, MAX_DRIFT):
        for rate in choices:
            if rate and all(abs((t - times[0]) * rate - i) <= limit for i, t in enumerate(times)):
                return float(rate), False
    nearest = min([*rates, *STANDARD_RATES], key=lambda rate: abs(rate - typical))
    return float(nearest) if abs(nearest / typical - 1) < 0.01 else typical, True


class Clock:
    """Seconds since the first frame, from times that may be missing, repeated or discontinuous.

    Args:
        interval: seconds between frames whose time is missing.
        discontinuous: whether a forward step of more than MAX_GAP is a discontinuity (broadcast formats).
    """

    def __init__(self, interval: float, discontinuous: bool) -> None:
        self.interval, self.discontinuous = interval, discontinuous
        self.now: float | None = None
        self.offset = 0.0

    def __call__(self, time: float | None) -> float:
        if self.now is None:
            self.offset, self.now = -(time or 0.0), 0.0
            return 0.0
        shown = self.now + self.interval if time is None else time + self.offset
        if shown <= self.now or (self.discontinuous and shown > self.now + MAX_GAP):
            shown = self.now + self.interval
            self.offset = self.offset if time is None else shown - time
        self.now = shown
        return shown


def resample(frames: Iterable[tuple[float, T]], fps: float, last_duration: float) -> Iterator[T]:
    """Yield the frame that is shown at k / fps seconds for k = 0, 1, ...

    Args:
        frames: (time in seconds, frame), times increasing from 0. One frame is held at a time.
        last_duration: of the last frame in seconds; 0: as long as the frame before it.
    """
    count, before, interval = 0, 0.0, 0.0
    shown: list[T] = []
    for time, frame in frames:
        while shown and count / fps < time - TOLERANCE:
            yield shown[0]
            count += 1
        interval, before, shown = time - before, time, [frame]
    total = max(1, round((before + (last_duration or interval or 1 / fps)) * fps))
    while shown and count < total:
        yield shown[0]
        count += 1
