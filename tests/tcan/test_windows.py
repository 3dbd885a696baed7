"""Windows: every frame covered, whole windows, averages by count."""

from itertools import pairwise

import pytest
import torch

from tcan.windows import Windows


@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17, 28, 29, 40, 100])
def test_windows_are_whole_overlap_and_cover(frames: int) -> None:
    windows = Windows(frames)
    slices = windows.slices
    length = 1 if frames == 1 else 16
    assert slices[0].start == 0
    assert all(s.stop - s.start == length for s in slices)
    assert all(b.start == a.stop - 4 for a, b in pairwise(slices))
    padded = slices[-1].stop
    assert padded >= frames
    assert len(slices) == 1 or slices[-2].stop < frames  # no window too many
    assert windows.source.tolist() == [min(i, frames - 1) for i in range(padded)]


def test_predictions_are_averaged_by_count() -> None:
    windows = Windows(30)  # 0..16, 12..28, 24..40
    predictions = [torch.randn(2, 16, 3, dtype=torch.float64) for _ in range(3)]
    mean = windows.average(iter(predictions))
    assert mean.shape == (2, 40, 3)
    for frame in range(40):
        seen = [
            p[:, frame - start]
            for p, start in zip(predictions, (0, 12, 24), strict=True)
            if 0 <= frame - start < 16
        ]
        torch.testing.assert_close(mean[:, frame], sum(seen) / len(seen), rtol=0, atol=1e-15)


def test_impossible_windows_are_refused() -> None:
    for arguments in ((0,), (5, 4, 4), (5, 4, -1)):
        with pytest.raises(ValueError):
            Windows(*arguments)
    with pytest.raises(ValueError):
        Windows(30).average([torch.zeros(1, 16)])
