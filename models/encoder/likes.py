"""Co-likes: two items are alike if the same users like them.

The likeness of two items is the cosine of their columns in the matrix of users and liked items: the number of common
fans over the geometric mean of both numbers of fans.

Shape letters: U users, N items, n asked items, M pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from features.dataset.split import Split, assign_split

COMMON_FANS = 3
"""Fewest common fans of two items that count as alike."""
_BLOCK = 1_024


@dataclass(frozen=True)
class Neighbours:
    """Nearest items of asked items, nearest first.

    Attributes:
        of: (M,) int64 asked item, ascending.
        item: (M,) int64 its neighbour.
        cosine: (M,) float32 their likeness, in (0, 1].
    """

    of: NDArray[np.int64]
    item: NDArray[np.int64]
    cosine: NDArray[np.float32]


class Likes:
    """Liked items of users; a user who likes an item several times counts once.

    Args:
        users: (E,) user of each positive event, from 0.
        items: (E,) item of each positive event, in [0, `size`).
        size: N.
    """

    def __init__(self, users: NDArray[np.integer], items: NDArray[np.integer], size: int) -> None:
        height = int(users.max()) + 1 if len(users) else 0
        ones = np.ones(len(users), dtype=np.float32)
        matrix = sparse.csr_matrix((ones, (users, items)), shape=(height, size))
        matrix.data[:] = 1.0
        self.matrix = matrix
        self.fans = np.bincount(matrix.indices, minlength=size)
        """(N,) number of users who like each item."""

    def cosines(self, of: NDArray[np.integer], common: int = COMMON_FANS) -> sparse.csr_matrix:
        """Returns the likeness of items (n,) to all items, (n, N) sparse float32; an item is not like itself.

        Args:
            of: (n,) asked items.
            common: Fewest common fans; a pair with fewer has likeness 0.
        """
        shared = (self._by_item[of] @ self.matrix).tocoo()
        kept = (shared.data >= common) & (shared.col != of[shared.row])
        row, column = shared.row[kept], shared.col[kept]
        norms = np.sqrt(self.fans[of[row]] * self.fans[column].astype(np.float64))
        data = (shared.data[kept] / norms).astype(np.float32)
        return sparse.csr_matrix((data, (row, column)), shape=shared.shape)

    @cached_property
    def _by_item(self) -> sparse.csr_matrix:
        return self.matrix.T.tocsr()

    def neighbours(
        self, of: NDArray[np.integer], among: NDArray[np.bool_], *, count: int, common: int = COMMON_FANS
    ) -> Neighbours:
        """Returns the items that are most like each asked item. Of equal likeness, the lower row comes first.

        Args:
            of: (n,) asked items, ascending.
            among: (N,) True if the item may be a neighbour.
            count: Most neighbours of an item. An item has fewer, or none, if it shares fans with fewer items.
            common: Fewest common fans.
        """
        parts = list(self._parts(of, among, count, common))
        empty = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        first, second, cosine = (np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True))
        return Neighbours(first, second, cosine)

    def _parts(
        self, of: NDArray[np.integer], among: NDArray[np.bool_], count: int, common: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
        for start in range(0, len(of), _BLOCK):
            block = np.asarray(of[start : start + _BLOCK])
            alike = self.cosines(block, common).tocoo()
            kept = among[alike.col]
            row, column, data = alike.row[kept], alike.col[kept], alike.data[kept]
            order = np.lexsort((column, -data, row))
            row, column, data = row[order], column[order], data[order]
            # Place of each pair among those of its row.
            place = np.arange(len(row)) - np.searchsorted(row, row)
            top = place < count
            yield block[row[top]].astype(np.int64), column[top].astype(np.int64), data[top]


def training_likes(events: pl.DataFrame, split: Split, ids: pl.Series) -> Likes:
    """Returns the likes of the training part, before a run has a frame.

    Args:
        events: Events of `features.dataset.tables.read_events`.
        split: Split of the run.
        ids: (N,) ids of the items; events of other items are left out.
    """
    if not {"user_id", "item_id"} <= set(events.columns):
        return Likes(np.empty(0, np.int64), np.empty(0, np.int64), len(ids))
    liked = events.filter((assign_split(events, split) == "train") & (pl.col("label") == 1))
    rows = liked.select("user_id", "item_id").join(
        pl.DataFrame({"item_id": ids}).with_row_index("row"), on="item_id", maintain_order="left"
    )
    users = rows["user_id"].rank("dense").to_numpy().astype(np.int64) - 1
    return Likes(users, rows["row"].to_numpy().astype(np.int64), len(ids))
