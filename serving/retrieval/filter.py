"""Columns of items' attributes, on which filters are evaluated (`features.value.filter`).

Attributes change in place, so a caller of `put` must exclude searches.

Shape letters: N items, M chosen items.
"""

from collections.abc import Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import EventError
from features.value.attribute import typed
from features.value.canonical import scalar
from features.value.filter import Filter
from models.table.column_rows import Growable
from serving.retrieval.category import Categories
from serving.retrieval.quantity import LeafCondition, Quantities, make_room

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


class _Column(Protocol):
    """Attribute of all items, by item number, changed in place."""

    def put(self, numbers: Ints, values: pl.Series) -> None:
        """Gives distinct items (M,) new values (M,).

        An item beyond the last is added; items in between hold no value.
        """
        ...

    def test(self, leaf: LeafCondition, items: Ints | slice) -> Bools:
        """Returns which of the items (M,) satisfy a comparison."""
        ...

    def share(self, leaf: LeafCondition) -> float:
        """Returns the approximate share of items that satisfy a comparison."""
        ...

    def values(self, items: Ints) -> tuple[Ints, Ints]:
        """Returns the values of items (M,) as numbers (n,), equal for equal values, and their counts (M,)."""
        ...


class Attributes:
    """Filterable columns of a catalogue's items, by item number, growing with it.

    Args:
        items: One row per item, in the order of their numbers.
        names: Names of the filterable columns.
        of_csv: True if the items' table is csv; see `features.value.canonical.cell`.
    """

    def __init__(self, items: pl.DataFrame, names: Sequence[str], *, of_csv: bool = False) -> None:
        self._types = {name: items.schema[name] for name in names}
        self._columns: dict[str, _Column] = {name: _open(name, items[name], of_csv=of_csv) for name in names}
        # Items with any known value; a number between them may belong to no item.
        self._known: Growable[np.bool_] = Growable(np.ones(items.height, dtype=bool))

    def put(self, numbers: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
        """Gives items (M,) new attributes, or new items their first. A row without a column holds no value there.

        If an item occurs twice, the last row counts. If a value does not fit its column, nothing is changed.
        """
        last = dict(zip(numbers, rows, strict=True))
        if not last:
            return
        index = np.fromiter(last, dtype=np.int64, count=len(last))
        values = {
            name: typed(name, [row.get(name) for row in last.values()], dtype) for name, dtype in self._types.items()
        }
        for name, column in self._columns.items():
            column.put(index, values[name])
        make_room(self._known, index)
        self._known.array[index] = True

    def mask(self, wanted: Filter, size: int) -> Bools:
        """Returns which of the items 0..size-1 match, (size,)."""
        matching = np.zeros(size, dtype=bool)
        inside = slice(0, min(size, len(self._known.array)))
        matching[inside] = self._judge(wanted, inside) & self._known.array[inside]
        return matching

    def matches(self, wanted: Filter, numbers: Ints) -> Bools:
        """Returns which of some items (M,) match, (M,).

        Raises:
            EventError: The filter names a column that is not filterable, or compares a column with another kind of
                value.
        """
        matching = np.zeros(len(numbers), dtype=bool)
        inside = np.flatnonzero(numbers < len(self._known.array))
        known = inside[self._known.array[numbers[inside]]]
        matching[known] = self._judge(wanted, numbers[known])
        return matching

    def values(self, name: str, numbers: Ints) -> tuple[Ints, Ints]:
        """Returns the values of a column for items (M,), as numbers that are equal for equal values.

        Returns:
            Numbers (n,), item after item, and the count of each item's values (M,). An unknown item has none.
        """
        lengths = np.zeros(len(numbers), dtype=np.int64)
        inside = np.flatnonzero(numbers < len(self._known.array))
        known = inside[self._known.array[numbers[inside]]]
        codes, lengths[known] = self._columns[name].values(numbers[known])
        return codes, lengths

    def share(self, wanted: Filter) -> float:
        """Returns the approximate share of matching items, from counts and samples; columns count as independent."""
        if wanted.every:
            return float(np.prod([self.share(part) for part in wanted.every]))
        if wanted.some:
            return 1.0 - float(np.prod([1.0 - self.share(part) for part in wanted.some]))
        if wanted.none:
            return 1.0 - self.share(wanted.none)
        return self._column(wanted).share(wanted)

    def _judge(self, wanted: Filter, items: Ints | slice) -> Bools:
        """Evaluates the filter as if all items were known."""
        if wanted.every:
            every: Bools = np.logical_and.reduce([self._judge(part, items) for part in wanted.every])
            return every
        if wanted.some:
            some: Bools = np.logical_or.reduce([self._judge(part, items) for part in wanted.some])
            return some
        if wanted.none:
            return ~self._judge(wanted.none, items)
        return self._column(wanted).test(wanted, items)

    def _column(self, leaf: Filter) -> _Column:
        name = str(leaf.column)
        if name not in self._columns:
            raise EventError(
                f"filter: column {name!r} is not filterable; the filterable columns are: "
                f"{', '.join(self._columns) or 'none'}"
            )
        return self._columns[name]


def attribute_json(value: Any) -> Any:
    """Returns an attribute's value as JSON has it: dates, times and durations as ISO 8601, a decimal as a number."""
    if isinstance(value, list):
        return [attribute_json(part) for part in value]
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return scalar(value) if isinstance(value, date | time | timedelta) else value


def _open(name: str, values: pl.Series, *, of_csv: bool) -> _Column:
    dtype = values.dtype
    if dtype.is_numeric() or dtype.is_temporal():
        return Quantities(name, values)
    if dtype == pl.Null:
        values = values.cast(pl.String)
    return Categories(name, values, of_csv=of_csv)
