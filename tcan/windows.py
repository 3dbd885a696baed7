"""Overlapping windows over a clip of any length, and the average of their predictions."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Windows of `length` frames; consecutive windows overlap by `overlap` frames (method "Inference").

    The clip is padded with its last frame until the last window is full. Process the `source.numel()` padded frames,
    where padded frame i is frame `source[i]` of the clip, and drop the frames after `num_frames`. A clip of one frame
    is an image: one window of one frame, without padding.

    Args:
        num_frames: number of frames of the clip, at least 1.
        length: frames per window.
        overlap: frames shared by consecutive windows, `0 <= overlap < length`.
        loop: treat the clip as a closed loop: windows wrap around from the last frame to the first. There is no
            padding, and a window has at most `num_frames` frames.

    Raises:
        ValueError: `num_frames` or `overlap` is out of its range.
    """

    num_frames: int
    length: int = 16
    overlap: int = 4
    loop: bool = False

    def __post_init__(self) -> None:
        if self.num_frames < 1 or not 0 <= self.overlap < self.length:
            raise ValueError(f"{self}: requires num_frames >= 1 and 0 <= overlap < length")

    @property
    def indices(self) -> list[Tensor]:
        """Frame indices of each window in the padded clip, int64 `[length]`."""
        if self.num_frames == 1:
            return [torch.zeros(1, dtype=torch.int64)]
        if self.loop:
            frames = torch.arange(min(self.length, self.num_frames))
            stride = max(1, len(frames) - self.overlap)
            return [(start + frames) % self.num_frames for start in range(0, self.num_frames, stride)]
        stride = self.length - self.overlap
        last = max(0, -(-(self.num_frames - self.length) // stride))
        return [i * stride + torch.arange(self.length) for i in range(last + 1)]

    @property
    def source(self) -> Tensor:
        """Index in the clip of each of the P padded frames, int64 `[P]`."""
        padded = int(torch.stack(self.indices).max()) + 1
        return torch.arange(padded).clamp(max=self.num_frames - 1)

    def average(self, predictions: Iterable[Tensor]) -> Tensor:
        """Average predictions `[B, length, ...]`, one per window in order, to `[B, P, ...]`: the mean for each frame."""
        total: Tensor | None = None
        count = torch.zeros(len(self.source))
        for window, prediction in zip(self.indices, predictions, strict=True):
            if total is None:
                total = prediction.new_zeros(len(prediction), len(count), *prediction.shape[2:])
            total[:, window] += prediction
            count[window] += 1
        assert total is not None
        return total.div_(count.to(total).view(-1, *[1] * (total.ndim - 2)))
