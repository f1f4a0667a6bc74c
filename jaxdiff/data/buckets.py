"""Batches of one shape each, out of a fixed set: which shape a step has, and which images of it.

Every image belongs to the bucket of the nearest aspect, so each bucket is a stream of images of its own: epochs of
its members, each in an order of its own, one after the other. Epoch e of a run is as many whole batches of each bucket
as its stream's first e + 1 epochs fill and the first e do not: what is left of a bucket at the end of an epoch comes
first in the next one, and no image is lost or repeated. The order of the buckets within an epoch is random.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def nearest_shapes(sizes: Int[np.ndarray, "n 2"], shapes: Sequence[tuple[int, int]]) -> Int[np.ndarray, " n"]:
    """The position in `shapes` (height, width) of the aspect nearest to each of `sizes` (width, height).

    Nearest is by ratio: twice as wide is as far as half as wide. What has no size counts as square.
    """
    wide, high = np.where(sizes > 0, sizes, 1).T
    ratios = np.log([width / height for height, width in shapes])
    return np.abs(np.log(wide / high)[:, None] - ratios).argmin(1)


class Schedule:
    """Step -> its bucket, and which of the bucket's batches it is: a function of the seed and the step alone."""

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int) -> None:
        self._counts, self._batch_size, self._seed = [int(n) for n in counts], batch_size, seed
        self._labels: tuple[int, np.ndarray] = (-1, np.empty(0))  # of the epoch that was asked for last

    def __call__(self, step: int) -> tuple[int, int]:
        """The bucket of the step, and the number of this bucket's batches before it."""
        epoch = self._epoch(step)
        which, labels = self._labels  # read and set at once: threads share this
        if which != epoch:
            labels = self._draw(epoch)
            self._labels = epoch, labels
        place = step - self._first_step(epoch)
        bucket = int(labels[place])
        return bucket, self._before(bucket, epoch) + int(np.count_nonzero(labels[:place] == bucket))

    def _before(self, bucket: int, epoch: int) -> int:
        """Whole batches that the bucket's stream fills in the epochs before `epoch`."""
        return epoch * self._counts[bucket] // self._batch_size

    def _first_step(self, epoch: int) -> int:
        return sum(self._before(bucket, epoch) for bucket in range(len(self._counts)))

    def _epoch(self, step: int) -> int:
        """The last epoch that starts at or before the step."""
        # Epoch e starts at most at e * total / batch_size, and less than one step a bucket before that.
        total = sum(self._counts)
        first = step * self._batch_size // total
        last = (step + len(self._counts)) * self._batch_size // total + 1
        return first + bisect_right(range(first, last + 1), step, key=self._first_step) - 1

    def _draw(self, epoch: int) -> np.ndarray:
        batches = [self._before(b, epoch + 1) - self._before(b, epoch) for b in range(len(self._counts))]
        labels = np.repeat(np.arange(len(batches)), batches)
        return np.random.default_rng([self._seed, epoch]).permutation(labels)
