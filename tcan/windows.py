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
    A clip of one frame is a image: one window of one frame, nothing padded.

    loop: the clip ends where it begins: windows run on over its end into its beginning, so that the last frame is
    joined to the first as any two neighbours are; nothing is padded. A window then has at most all frames.
    """

    num_frames: int
    length: int = 16
    overlap: int = 4
    loop: bool = False

    def __post_init__(self) -> None:
        if self.num_frames < 1 or not 0 <= self.overlap < self.length:
            raise ValueError(f"{self}: needs a frame, and an overlap of at least 0 and less than the length")

    @property
    def indices(self) -> list[Tensor]:
        """The windows, each int64 `[length]`: its frames in the padded clip."""
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
        """int64 `[P]`: which frame of the clip each frame of the padded clip repeats."""
        padded = int(torch.stack(self.indices).max()) + 1
        return torch.arange(padded).clamp(max=self.num_frames - 1)

    def average(self, predictions: Iterable[Tensor]) -> Tensor:
        """The windows' predictions `[B, length, ...]`, in order -> `[B, P, ...]`, each frame their mean."""
        total: Tensor | None = None
        count = torch.zeros(len(self.source))
        for window, prediction in zip(self.indices, predictions, strict=True):
            if total is None:
                total = prediction.new_zeros(len(prediction), len(count), *prediction.shape[2:])
            total[:, window] += prediction
            count[window] += 1
        assert total is not None
        return total / count.to(total).view(-1, *[1] * (total.ndim - 2))
