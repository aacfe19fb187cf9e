"""Semantic IDs of the items by number, for policies that compare them."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.table.column_rows import Growable

Ints = NDArray[np.int64]
_NONE = -1


class ItemCodes:
    """Semantic IDs by item number, growing with the catalogue.

    Args:
        published: Codes of the published items, in the order of their numbers; null for an item without content.
    """

    def __init__(self, published: pl.Series) -> None:
        published = published.cast(pl.List(pl.UInt16))
        lengths = published.list.len().fill_null(0)
        self._levels = int(lengths.max() or 0)  # type: ignore[arg-type]
        self._codes: Growable[np.int32] = Growable(np.zeros((0, self._levels), dtype=np.int32))
        self._grow(len(published))
        full = (lengths == self._levels).to_numpy()
        if self._levels:
            values = published.filter(pl.Series(full)).explode().to_numpy()
            self._codes.array[full] = values.reshape(-1, self._levels).astype(np.int32)

    def put(self, numbers: Ints, codes: Sequence[Sequence[int]]) -> None:
        """Gives items (M,) their codes. An empty list is an item without a Semantic ID."""
        if not self._levels or not len(numbers):
            return
        self._grow(int(numbers.max()) + 1 - len(self._codes.array))
        rows = [one if len(one) == self._levels else [_NONE] * self._levels for one in codes]
        self._codes.array[numbers] = np.array(rows, dtype=np.int32)

    def take(self, numbers: Ints) -> Ints:
        """Returns the codes (M, Q) of items (M,), -1 for an item without a Semantic ID."""
        found = np.full((len(numbers), self._levels), _NONE, dtype=np.int64)
        known = numbers < len(self._codes.array)
        found[known] = self._codes.array[numbers[known]]
        return found

    def _grow(self, more: int) -> None:
        if more > 0:
            self._codes.extend(np.full((more, self._levels), _NONE, dtype=np.int32))
