"""Filters on items' attributes: a small language, and the columns it is evaluated on.

A filter is a tree: comparisons of one column at the leaves, `and`, `or` and `not` above them.

    {"and": [{"column": "year", "gte": 1990}, {"not": {"column": "genres", "in": ["Horror", "War"]}}]}

A column of lists holds a value if one of its elements is that value. An item without a value matches no comparison
except `"eq": null`.

Attributes change in place, so a caller of `put` must exclude searches.

Shape letters: N items, M chosen items, V distinct values of a column.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from functools import cached_property
from typing import Annotated, Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, StrictStr, model_validator

from features.errors import EventError
from features.value.attribute import fit, typed
from features.value.canonical import canonical, scalar
from models.table.column_rows import CodeLists, Growable, coded, kept
from serving.retrieval.quantity import Quantities, make_room

MOST_DEPTH, MOST_PARTS, MOST_VALUES = 16, 256, 1_000
_SAMPLE = 2_048
# Number of values that may be unused before any are dropped.
_SPARE = 1_024

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Text = Annotated[StrictStr, Field(max_length=1_024)]
# Beyond 64 bits an integer would be read as a float, which is another number.
Whole = Annotated[StrictInt, Field(ge=-(10**308), le=10**308)]
Number = Whole | Annotated[FiniteFloat, Field(strict=True)]
Scalar = StrictBool | Number | Text


class Filter(BaseModel):
    """Condition on items: one comparison of a column, or other filters under `and`, `or` or `not`."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        json_schema_extra={
            "examples": [{"and": [{"column": "year", "gte": 1990}, {"not": {"column": "genres", "eq": "Horror"}}]}]
        },
    )

    column: Text | None = Field(default=None, description="A filterable column of the items.")
    eq: Scalar | None = Field(default=None, description="The value is equal to this one; null: there is no value.")
    one_of: list[Scalar] | None = Field(default=None, alias="in", min_length=1, max_length=MOST_VALUES)
    gt: Number | Text | None = None
    gte: Number | Text | None = None
    lt: Number | Text | None = None
    lte: Number | Text | None = None
    every: "list[Filter] | None" = Field(default=None, alias="and", min_length=1, max_length=MOST_PARTS)
    some: "list[Filter] | None" = Field(default=None, alias="or", min_length=1, max_length=MOST_PARTS)
    none: "Filter | None" = Field(default=None, alias="not")

    @model_validator(mode="after")
    def _one_meaning(self) -> "Filter":
        given = self.model_fields_set
        kinds = given & {"column", "every", "some", "none"}
        if len(kinds) != 1:
            raise ValueError("expected exactly one of column, and, or, not")
        compared = given - {"column", "every", "some", "none"}
        if "column" not in given:
            if compared:
                raise ValueError(f"{_wire(min(compared))} needs a column")
            return self
        if {"eq"} != compared and {"one_of"} != compared and not (compared and compared <= {"gt", "gte", "lt", "lte"}):
            raise ValueError("column needs eq, or in, or a range of gt, gte, lt and lte")
        if any(getattr(self, name) is None for name in (given - {"eq"})):
            raise ValueError("null can be compared by eq alone")
        return self

    @cached_property
    def key(self) -> str:
        """Text of the filter; equal texts are equal filters."""
        return self.model_dump_json(by_alias=True, exclude_unset=True)

    def check_size(self) -> None:
        """Raises EventError if a filter is deeper, or has more parts, than a server accepts."""
        level, parts, depth = [self], 0, 0
        while level:
            parts, depth = parts + len(level), depth + 1
            if depth > MOST_DEPTH or parts > MOST_PARTS:
                raise EventError(f"filter: at most {MOST_DEPTH} levels and {MOST_PARTS} parts are accepted")
            level = [below for one in level for below in one.below()]

    def below(self) -> "list[Filter]":
        """Returns the filters right under this one."""
        return [*(self.every or ()), *(self.some or ()), *([self.none] if self.none else ())]


class _Column(Protocol):
    """Attribute of all items, by item number, changed in place."""

    def put(self, numbers: Ints, values: pl.Series) -> None:
        """Gives distinct items (M,) new values (M,).

        An item beyond the last is added; items in between hold no value.
        """
        ...

    def test(self, leaf: Filter, items: Ints | slice) -> Bools:
        """Returns which of the items (M,) satisfy a comparison."""
        ...

    def share(self, leaf: Filter) -> float:
        """Returns the approximate share of items that satisfy a comparison."""
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
        found = np.zeros(size, dtype=bool)
        inside = slice(0, min(size, len(self._known.array)))
        found[inside] = self._judge(wanted, inside) & self._known.array[inside]
        return found

    def matches(self, wanted: Filter, numbers: Ints) -> Bools:
        """Returns which of some items (M,) match, (M,).

        Raises:
            EventError: The filter names a column that is not filterable, or compares a column with another kind of
                value.
        """
        found = np.zeros(len(numbers), dtype=bool)
        inside = np.flatnonzero(numbers < len(self._known.array))
        known = inside[self._known.array[numbers[inside]]]
        found[known] = self._judge(wanted, numbers[known])
        return found

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


class _Categories:
    """Column of strings, booleans, or lists of scalars, by code."""

    def __init__(self, name: str, values: pl.Series, *, of_csv: bool) -> None:
        self._name = name
        inner: Any = values.dtype.inner if isinstance(values.dtype, pl.List | pl.Array) else values.dtype
        self._dtype: pl.DataType = inner
        self._of_csv = of_csv
        self._numbers: dict[str, int] = {}
        # Values in order, and their codes: a range of text is a slice of them.
        self._sorted: list[str] = []
        self._order: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._lists = CodeLists()
        self._counts: Growable[np.int64] = Growable(np.zeros(0, dtype=np.int64))
        self._most_values = 0
        self.put(np.arange(len(values), dtype=np.int64), values)

    def put(self, numbers: Ints, values: pl.Series) -> None:
        local, lengths, distinct = coded(canonical(values))
        codes = self._number(distinct)[local].astype(np.int32)
        replaced, _ = self._lists.take(numbers[numbers < self._lists.size])
        np.subtract.at(self._counts.array, replaced, 1)
        np.add.at(self._counts.array, codes, 1)
        self._lists.put(numbers, codes, lengths)
        if len(self._numbers) > self._most_values:
            self._drop_unused()

    def test(self, leaf: Filter, items: Ints | slice) -> Bools:
        codes, lengths = self._lists.take(items)
        if _asks_for_none(leaf):
            empty: Bools = lengths == 0
            return empty
        chosen = self._chosen(leaf)[codes]
        if len(codes) == len(lengths) and (lengths == 1).all():
            return chosen
        return kept(chosen, lengths) > 0

    def share(self, leaf: Filter) -> float:
        size = max(self._lists.size, 1)
        if _asks_for_none(leaf):
            _, lengths = self._lists.take(slice(None, None, max(1, size // _SAMPLE)))
            return float((lengths == 0).mean()) if len(lengths) else 0.0
        return min(1.0, float(self._counts.array[self._chosen(leaf)].sum()) / size)

    def _number(self, distinct: pl.Series) -> Ints:
        """Returns the codes of distinct values (m,); new values get the next codes."""
        new = [value for value in distinct.to_list() if value not in self._numbers]
        if new:
            first = len(self._numbers)
            self._numbers.update(zip(new, range(first, first + len(new)), strict=True))
            self._counts.extend(np.zeros(len(new), dtype=np.int64))
            order = pl.Series(new).arg_sort().to_numpy().astype(np.int64)
            self._merge([new[place] for place in order.tolist()], first + order)
        return np.array([self._numbers[value] for value in distinct.to_list()], dtype=np.int64)

    def _merge(self, values: list[str], codes: Ints) -> None:
        """Inserts new values, in order, into the order."""
        if not self._sorted:
            self._sorted, self._order = values, codes
            return
        places = [bisect_left(self._sorted, value) for value in values]
        self._order = np.insert(self._order, places, codes)
        merged: list[str] = []
        start = 0
        for place, value in zip(places, values, strict=True):
            merged += self._sorted[start:place]
            merged.append(value)
            start = place
        self._sorted = merged + self._sorted[start:]

    def _drop_unused(self) -> None:
        """Removes values that no item holds any more, once they are the larger part."""
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

    def _chosen(self, leaf: Filter) -> Bools:
        """Returns which of the V values satisfy a comparison."""
        chosen = np.zeros(len(self._numbers), dtype=bool)
        if leaf.column is not None and {"gt", "gte", "lt", "lte"} & leaf.model_fields_set:
            chosen[self._order[self._range(leaf)]] = True
            return chosen
        asked = leaf.one_of if leaf.one_of is not None else [leaf.eq]
        for text in map(self._text, asked):
            if text in self._numbers:
                chosen[self._numbers[text]] = True
        return chosen

    def _text(self, value: Any) -> str | None:
        """Returns the canonical form of a value in a filter: that of the column's type if the value is one of it."""
        try:
            return scalar(fit(value, self._dtype, of_csv=self._of_csv))
        except ValueError:
            return scalar(value)

    def _range(self, leaf: Filter) -> slice:
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
    return _Categories(name, values, of_csv=of_csv)


def _asks_for_none(leaf: Filter) -> bool:
    return "eq" in leaf.model_fields_set and leaf.eq is None


def _wire(name: str) -> str:
    return {"one_of": "in"}.get(name, name)
