"""Rows that a fit learns from, and held-out rows that choose among its rounds.

Shape letters: R rows of a task, D dim, B pairs of a batch.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from models.encoder.likes import Neighbours
from models.encoder.measure import recall
from models.encoder.pairs import Task

_HELD_OUT = 0.1
_MOST_ASKED = 1_000
_DRAWN_FROM = 20


class TrainingRows:
    """Rows of one task that may be in a pair, with the most alike rows of each.

    Args:
        task: The task.
        kept: (R,) True if the row may be in a pair.
    """

    def __init__(self, task: Task, kept: NDArray[np.bool_]) -> None:
        inside = sparse.diags(kept.astype(np.float32))
        self.alike: sparse.csr_matrix = (inside @ task.alike @ inside).tocsr()
        self.alike.eliminate_zeros()
        ranked = most_alike(self.alike, _DRAWN_FROM)
        self.anchors, self._counts = np.unique(ranked.of, return_counts=True)
        self._starts, self._others = np.cumsum(self._counts) - self._counts, ranked.item
        self.vectors, self.item = torch.tensor(task.vectors), task.item

    def batches(self, rng: np.random.Generator, size: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Returns the pairs that visit each anchor once, in batches of `size`; a smaller last batch is left out."""
        order = rng.permutation(len(self.anchors))
        drawn = self._starts[order] + (rng.random(len(order)) * self._counts[order]).astype(np.int64)
        first, second = self.anchors[order], self._others[drawn]
        size = min(size, len(order))
        return [(first[start : start + size], second[start : start + size]) for start in _starts(len(order), size)]

    def known(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the likeness (B, B) of a batch, and whether two rows belong to one item."""
        alike = torch.from_numpy(self.alike[first][:, second].toarray())
        return alike, torch.from_numpy(self.item[first][:, None] == self.item[second][None, :])


def _starts(length: int, size: int) -> range:
    return range(0, length - size + 1, size) if size else range(0)


def most_alike(alike: sparse.csr_matrix, count: int) -> Neighbours:
    """Returns the `count` most alike rows of each row; of equal likeness, the lower row comes first."""
    found = alike.tocoo()
    order = np.lexsort((found.col, -found.data, found.row))
    row, column, data = found.row[order], found.col[order], found.data[order]
    top = np.arange(len(row)) - np.searchsorted(row, row) < count
    return Neighbours(row[top].astype(np.int64), column[top].astype(np.int64), data[top])


class HeldOut:
    """Held-out rows of a task, and the rows that each shall find.

    Args:
        task: The task.
        held_out: (R,) True if the row is held out.
    """

    def __init__(self, task: Task, held_out: NDArray[np.bool_]) -> None:
        asked = np.flatnonzero(held_out & (np.diff(task.alike.indptr) > 0))
        asked = asked[:: max(1, len(asked) // _MOST_ASKED)]
        found = most_alike(task.alike[asked], _DRAWN_FROM)
        self._gold = Neighbours(asked[found.of], found.item, found.cosine)
        self._all = np.ones(len(held_out), dtype=bool)

    def recall(self, vectors: NDArray[np.float32]) -> float:
        """Returns the recall of vectors (R, D) of the task's rows."""
        return recall(vectors, self._gold, self._all)


def held_out_rows(task: Task, seed: int) -> NDArray[np.bool_]:
    """Returns (R,) True for the rows of the items that only the choice of a round reads, the same in every task."""
    items = np.random.default_rng([seed, 7]).random(int(task.item.max(initial=-1)) + 1) < _HELD_OUT
    return items[task.item]


def held_out_recall(vectors: NDArray[np.float32], task: Task, seed: int) -> float:
    """Returns how well vectors (R, D) of a task's rows find the pairs of the items that a first phase holds out."""
    return HeldOut(task, held_out_rows(task, seed)).recall(vectors)
