"""Windows: coverage of all frames, overlap, padding, and averages of predictions."""

from itertools import pairwise

import pytest
import torch

from tcan.windows import Windows


@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17, 28, 29, 40, 100])
def test_windows_are_full_overlap_and_cover_all_frames(frames: int) -> None:
    windows = Windows(frames)
    parts = [part.tolist() for part in windows.indices]
    length = 1 if frames == 1 else 16
    assert all(part == list(range(part[0], part[0] + length)) for part in parts)
    assert parts[0][0] == 0
    assert all(b[0] == a[-1] + 1 - 4 for a, b in pairwise(parts))
    padded = parts[-1][-1] + 1
    assert padded >= frames
    assert len(parts) == 1 or parts[-2][-1] + 1 < frames  # there is no redundant window
    assert windows.source.tolist() == [min(i, frames - 1) for i in range(padded)]


def test_average_is_the_mean_over_the_windows_of_each_frame() -> None:
    windows = Windows(30)  # 0..16, 12..28, 24..40
    predictions = [torch.randn(2, 16, 3, dtype=torch.float64) for _ in range(3)]
    mean = windows.average(iter(predictions))
    assert mean.shape == (2, 40, 3)
    for frame in range(40):
        values = [
            p[:, frame - start]
            for p, start in zip(predictions, (0, 12, 24), strict=True)
            if 0 <= frame - start < 16
        ]
        torch.testing.assert_close(mean[:, frame], sum(values) / len(values), rtol=0, atol=1e-15)


@pytest.mark.parametrize("frames", [1, 2, 7, 16, 17, 40])
def test_loop_windows_connect_the_last_frame_to_the_first(frames: int) -> None:
    windows = Windows(frames, loop=True)
    parts = [part.tolist() for part in windows.indices]
    assert windows.source.tolist() == list(range(frames))  # no padding
    assert all(len(part) == min(16, frames) and len(set(part)) == len(part) for part in parts)
    assert all((b - a) % frames == 1 % frames for part in parts for a, b in pairwise(part))
    neighbours = {pair for part in parts for pair in pairwise(part)}
    assert neighbours == {(i, (i + 1) % frames) for i in range(frames)} - {(0, 0)}


def test_loop_average_is_the_mean_over_the_windows_of_each_frame() -> None:
    windows = Windows(20, 8, 2, loop=True)  # 0..7, 6..13, 12..19, 18..5
    predictions = [torch.randn(2, 8, 3, dtype=torch.float64) for _ in range(4)]
    mean = windows.average(iter(predictions))
    assert mean.shape == (2, 20, 3)
    for frame in range(20):
        values = [
            p[:, (frame - start) % 20]
            for p, start in zip(predictions, (0, 6, 12, 18), strict=True)
            if (frame - start) % 20 < 8
        ]
        torch.testing.assert_close(mean[:, frame], sum(values) / len(values), rtol=0, atol=1e-15)


def test_invalid_windows_are_rejected() -> None:
    for arguments in ((0,), (5, 4, 4), (5, 4, -1)):
        with pytest.raises(ValueError):
            Windows(*arguments)
    with pytest.raises(ValueError):
        Windows(30).average([torch.zeros(1, 16)])
