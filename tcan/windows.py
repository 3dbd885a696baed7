"""A clip of any length as overlapping windows of frames, and their predictions averaged."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Windows of `length` frames, each overlapping the next by `overlap` (method "Inference").

    The clip is padded by repeating its last frame until its windows are whole: work on `source.numel()`
    frames, frame i of them standing for `source[i]`, and drop what is beyond `num_frames` at the end.
    A clip of one frame is a picture: one window of one frame, nothing padded.
    """

    num_frames: int
    length: int = 16
    overlap: int = 4

    def __post_init__(self) -> None:
        if self.num_frames < 1 or not 0 <= self.overlap < self.length:
            raise ValueError(f"{self}: needs a frame, and an overlap of at least 0 and less than the length")

    @property
    def slices(self) -> list[slice]:
        """The windows, each a slice of the padded clip."""
        if self.num_frames == 1:
            return [slice(0, 1)]
        stride = self.length - self.overlap
        last = max(0, -(-(self.num_frames - self.length) // stride))
        return [slice(i * stride, i * stride + self.length) for i in range(last + 1)]

    @property
    def source(self) -> Tensor:
        """int64 `[P]`: which frame of the clip each frame of the padded clip repeats."""
        return torch.arange(self.slices[-1].stop).clamp(max=self.num_frames - 1)

    def average(self, predictions: Iterable[Tensor]) -> Tensor:
        """The windows' predictions `[B, length, ...]`, in order -> `[B, P, ...]`, each frame their mean."""
        slices = self.slices
        total: Tensor | None = None
        count = torch.zeros(slices[-1].stop)
        for window, prediction in zip(slices, predictions, strict=True):
            if total is None:
                total = prediction.new_zeros(len(prediction), len(count), *prediction.shape[2:])
            total[:, window] += prediction
            count[window] += 1
        assert total is not None
        return total / count.to(total).view(-1, *[1] * (total.ndim - 2))
