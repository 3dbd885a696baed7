"""The video of each training sample, as a function of the seed, the step and the index in the global batch."""

import functools
from collections.abc import Callable

import numpy as np

_EPOCH, _BATCHES = 0, 3  # purpose of a generator: see `pipelines.train.data`


class VideoOrder:
    """Draws every global batch from one bucket: the videos of one size.

    Each bucket goes through its videos in a new random order again and again; batch m contains its samples m * batch_size to
    (m + 1) * batch_size - 1. In e epochs, a bucket of n videos gets floor(e * n / batch_size) batches: all their samples, except
    fewer than batch_size, which come first in the next epoch. So no video is ever drawn more than e times in e epochs, and none
    is skipped. The batches of an epoch are in random order.

    With one bucket, epochs follow each other without a remainder: n = step * batch_size + index counts the samples, and
    n // number of videos is the epoch.

    Args:
        buckets: int64 `[N]`, the number of the bucket of each video, from 0.
        rng: key -> random generator.
    """

    def __init__(self, buckets: np.ndarray, batch_size: int, rng: Callable[..., np.random.Generator]) -> None:
        self._buckets, self._batch_size, self._rng = buckets, batch_size, rng
        self._sizes = np.bincount(buckets)
        # Caches: other threads may request steps of other epochs.
        self._permutation = functools.lru_cache(2 * len(self._sizes))(self._new_permutation)
        self._schedule = functools.lru_cache(2)(self._new_schedule)

    def __reduce__(self) -> tuple[type["VideoOrder"], tuple]:
        """In another process: without the cached values, which cannot be pickled."""
        return VideoOrder, (self._buckets, self._batch_size, self._rng)

    def video(self, step: int, index: int) -> int:
        """Number of the video, 0 to N - 1."""
        bucket, batch = self.batch(step)
        epoch, position = divmod(batch * self._batch_size + index, int(self._sizes[bucket]))
        return int(self._permutation(bucket, epoch)[position])

    def batch(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and the number of its batch in the bucket."""
        epoch = step * self._batch_size // len(self._buckets)
        while self._batches_before(epoch + 1).sum() <= step:  # a bucket's incomplete batches delay the epoch
            epoch += 1
        before, schedule = self._batches_before(epoch), self._schedule(epoch)
        position = step - int(before.sum())
        bucket = int(schedule[position])
        return bucket, int(before[bucket]) + int(np.count_nonzero(schedule[:position] == bucket))

    def _batches_before(self, epoch: int) -> np.ndarray:
        """int64 `[buckets]`: the number of batches of each bucket before an epoch."""
        return epoch * self._sizes // self._batch_size

    def _new_schedule(self, epoch: int) -> np.ndarray:
        """The bucket of each batch of an epoch."""
        batches = self._batches_before(epoch + 1) - self._batches_before(epoch)
        return self._rng(_BATCHES, epoch).permutation(np.repeat(np.arange(len(batches)), batches))

    def _new_permutation(self, bucket: int, epoch: int) -> np.ndarray:
        """The videos of a bucket in the order of one of its epochs."""
        order = self._rng(_EPOCH, epoch).permutation(len(self._buckets))
        return order[self._buckets[order] == bucket]
