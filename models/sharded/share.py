"""Share of a process in the examples: a range of rows of every block, and in each batch those rows that are its own.

All processes draw the batches of a training in one process. A process reads its rows of a block alone, and finds them
in the batch. TorchRec wants batches of one size on all processes, so a shorter share is filled with examples of the
process itself, whose weight in the loss is 0. A weight of 0 gives a gradient of exactly 0, which changes no row.

Shape letters: B batch of all processes, b batch of each process.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.frame_blocks import BlockShare


@dataclass(frozen=True)
class OwnExamples:
    """Examples of one batch that a process reads.

    Attributes:
        places: (b,) places in the batch, of a filler any place.
        rows: (b,) rows among the process's rows of the block.
        weights: (b,) float32, 1, and 0 for a filler.
    """

    places: NDArray[np.int64]
    rows: NDArray[np.int64]
    weights: NDArray[np.float32]


def own_examples(share: BlockShare, height: int, rows: NDArray[np.int64]) -> OwnExamples:
    """Returns the examples of a batch that a process reads, in the order of the batch.

    Args:
        share: Share of the process.
        height: Number of examples of the block.
        rows: (B,) rows of the block in the batch.
    """
    ends = np.array([BlockShare(number, share.count).of(height)[1] for number in range(share.count)])
    owner = np.searchsorted(ends, rows, side="right")
    size = int(np.bincount(owner, minlength=share.count).max())
    places = np.flatnonzero(owner == share.number)
    own = rows[places] - share.of(height)[0]
    fill = size - len(own)
    weights = np.concatenate([np.ones(len(own), np.float32), np.zeros(fill, np.float32)])
    nothing = np.zeros(fill, dtype=np.int64)
    return OwnExamples(np.concatenate([places, nothing]), np.concatenate([own, nothing]), weights)
