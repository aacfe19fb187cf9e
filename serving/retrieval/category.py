"""Attributes without numbers: strings, booleans, or lists of scalars, by code.

Shape letters: M items, V distinct values.
"""

from bisect import bisect_left, bisect_right
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import EventError
from features.value.attribute import fit
from features.value.canonical import canonical, scalar
from models.table.column_rows import CodeLists, Growable, coded, kept
from serving.retrieval.quantity import LeafCondition, asks_for_none

_SAMPLE = 2_048
# Number of values that may be unused before any are dropped.
_SPARE = 1_024

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


class Categories:
    """Column of strings, booleans, or lists of scalars.

    Args:
        name: Name of the column.
        values: One value per item, in the order of their numbers.
        of_csv: True if the items' table is a csv file; see `features.value.canonical.cell`.
    """

    def __init__(self, name: str, values: pl.Series, *, of_csv: bool) -> None:
        self._name = name
        inner: Any = values.dtype.inner if isinstance(values.dtype, pl.List | pl.Array) else values.dtype
        self._dtype: pl.DataType = inner
        self._of_csv = of_csv
        self._numbers: dict[str, int] = {}
        # Values in order, and their codes. A range of text is a slice of both.
        self._sorted: list[str] = []
        self._order: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._lists = CodeLists()
        self._counts: Growable[np.int64] = Growable(np.zeros(0, dtype=np.int64))
        self._most_values = 0
        self.put(np.arange(len(values), dtype=np.int64), values)

    def put(self, numbers: Ints, values: pl.Series) -> None:
        """Gives distinct items (M,) new values (M,). An item beyond the last is added."""
        local, lengths, distinct = coded(canonical(values))
        codes = self._number(distinct)[local].astype(np.int32)
        replaced, _ = self._lists.take(numbers[numbers < self._lists.size])
        np.subtract.at(self._counts.array, replaced, 1)
        np.add.at(self._counts.array, codes, 1)
        self._lists.put(numbers, codes, lengths)
        if len(self._numbers) > self._most_values:
            self._drop_unused()

    def test(self, leaf: LeafCondition, items: Ints | slice) -> Bools:
        """Returns which of the items (M,) satisfy a comparison."""
        codes, lengths = self._lists.take(items)
        if asks_for_none(leaf):
            empty: Bools = lengths == 0
            return empty
        chosen = self._chosen(leaf)[codes]
        if len(codes) == len(lengths) and (lengths == 1).all():
            return chosen
        return kept(chosen, lengths) > 0

    def share(self, leaf: LeafCondition) -> float:
        """Returns the approximate share of items that satisfy a comparison."""
        size = max(self._lists.size, 1)
        if asks_for_none(leaf):
            _, lengths = self._lists.take(slice(None, None, max(1, size // _SAMPLE)))
            return float((lengths == 0).mean()) if len(lengths) else 0.0
        return min(1.0, float(self._counts.array[self._chosen(leaf)].sum()) / size)

    def values(self, items: Ints) -> tuple[Ints, Ints]:
        """Returns the codes (n,) of the values of items (M,), and their counts (M,)."""
        codes, lengths = self._lists.take(items)
        return codes.astype(np.int64), lengths

    def _number(self, distinct: pl.Series) -> Ints:
        """Returns the codes of distinct values (m,); new values get the next codes."""
        new = [value for value in distinct.to_list() if value not in self._numbers]
        if new:
            first = len(self._numbers)
            self._numbers.update(zip(new, range(first, first + len(new)), strict=True))
            self._counts.extend(np.zeros(len(new), dtype=np.int64))
            order = pl.Series(new).arg_sort().to_numpy().astype(np.int64)
            self._merge([new[index] for index in order.tolist()], first + order)
        return np.array([self._numbers[value] for value in distinct.to_list()], dtype=np.int64)

    def _merge(self, values: list[str], codes: Ints) -> None:
        """Inserts sorted new values into the order."""
        if not self._sorted:
            self._sorted, self._order = values, codes
            return
        positions = [bisect_left(self._sorted, value) for value in values]
        self._order = np.insert(self._order, positions, codes)
        merged: list[str] = []
        start = 0
        for position, value in zip(positions, values, strict=True):
            merged += self._sorted[start:position]
            merged.append(value)
            start = position
        self._sorted = merged + self._sorted[start:]

    def _drop_unused(self) -> None:
        """Removes values without an item, once these are the larger part."""
        used = np.flatnonzero(self._counts.array)
        if 2 * len(used) + _SPARE < len(self._numbers):
            used = self._lists.renumber()
            new = np.full(len(self._numbers), -1, dtype=np.int64)
            new[used] = np.arange(len(used))
            order = new[self._order]
            self._sorted = [value for value, code in zip(self._sorted, order.tolist(), strict=True) if code >= 0]
            self._order = order[order >= 0]
            self._numbers = dict(zip(self._sorted, self._order.tolist(), strict=True))
            self._counts = Growable(self._counts.array[used])
        self._most_values = 2 * len(used) + _SPARE

    def _chosen(self, leaf: LeafCondition) -> Bools:
        """Returns which of the V values satisfy a comparison."""
        chosen = np.zeros(len(self._numbers), dtype=bool)
        if {"gt", "gte", "lt", "lte"} & leaf.model_fields_set:
            chosen[self._order[self._range(leaf)]] = True
            return chosen
        values = leaf.one_of if leaf.one_of is not None else [leaf.eq]
        for text in map(self._text, values):
            if text in self._numbers:
                chosen[self._numbers[text]] = True
        return chosen

    def _text(self, value: Any) -> str | None:
        """Returns the canonical form of a filter's value, in the column's type if the value fits the type."""
        try:
            return scalar(fit(value, self._dtype, of_csv=self._of_csv))
        except ValueError:
            return scalar(value)

    def _range(self, leaf: LeafCondition) -> slice:
        """Returns the slice of the order with values within bounds."""
        bounds = {name: getattr(leaf, name) for name in ("gt", "gte", "lt", "lte")}
        wrong = next((bound for bound in bounds.values() if bound is not None and not isinstance(bound, str)), None)
        if wrong is not None:
            raise EventError(f"filter: column {self._name!r} holds text, which has no order beside {wrong!r}")
        start, stop = 0, len(self._sorted)
        if bounds["gt"] is not None:
            start = max(start, bisect_right(self._sorted, bounds["gt"]))
        if bounds["gte"] is not None:
            start = max(start, bisect_left(self._sorted, bounds["gte"]))
        if bounds["lt"] is not None:
            stop = min(stop, bisect_left(self._sorted, bounds["lt"]))
        if bounds["lte"] is not None:
            stop = min(stop, bisect_right(self._sorted, bounds["lte"]))
        return slice(start, max(start, stop))
