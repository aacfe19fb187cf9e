"""Order in which an epoch reads the training part: blocks in a seeded order, in each its examples in a seeded order.

A batch never crosses from one block to the next, so that one block at a time is in memory. The last batch of a block
may be smaller. A part of one block is read in one permutation of all its examples. Each block is a uniform sample of
the part, see `features.frame_blocks`, so a batch is a random sample of the part either way.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Separates the seeds of permutations from those of the values that training hides, which are (seed, epoch, start).
_WITHIN_BLOCK = 1


class Draw(NamedTuple):
    """Examples of one batch.

    Attributes:
        block: Number of the block.
        rows: Rows of the block, (B,) int64.
        start: Number of the epoch's examples before this batch.
    """

    block: int
    rows: NDArray[np.int64]
    start: int


class EpochOrder:
    """Order of one epoch.

    Args:
        heights: Number of examples of each block.
        batch: Examples of a batch.
        seed: Seed of the training run.
        epoch: Number of the epoch, from 0.
    """

    def __init__(self, heights: Sequence[int], batch: int, *, seed: int, epoch: int) -> None:
        self._heights = heights
        self._batch = batch
        self._seed = seed
        self._epoch = epoch

    def draws(self, *, after: int = 0) -> Iterator[Draw]:
        """Yields the batches of the epoch in order, without the first `after`."""
        position = 0
        for block in self.blocks():
            height = self._heights[block]
            count = -(-height // self._batch)
            if after < count:
                order = self._permutation(block)
                for start in range(after * self._batch, height, self._batch):
                    yield Draw(block, order[start : start + self._batch], position + start)
            after = max(0, after - count)
            position += height

    def blocks(self) -> list[int]:
        """Returns the numbers of the blocks in the order of the epoch."""
        if len(self._heights) == 1:
            return [0]
        order: list[int] = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._heights)).tolist()
        return order

    def _permutation(self, block: int) -> NDArray[np.int64]:
        seeds = [self._seed, self._epoch]
        if len(self._heights) > 1:
            seeds += [block, _WITHIN_BLOCK]
        return np.random.default_rng(seeds).permutation(self._heights[block])
