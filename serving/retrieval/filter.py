"""Filters on items' attributes: a small language, and the columns it is evaluated on.

A filter is a tree: comparisons of one column at the leaves, `and`, `or` and `not` above them.

    {"and": [{"column": "year", "gte": 1990}, {"not": {"column": "genres", "in": ["Horror", "War"]}}]}

A column of lists holds a value if one of its elements is that value. An item without a value matches no comparison
except `"eq": null`.

Attributes change in place, so a caller of `put` must exclude searches.

Shape letters: N items, M chosen items.
"""

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
from features.value.attribute import typed
from features.value.canonical import scalar
from models.table.column_rows import Growable
from serving.retrieval.category import Categories
from serving.retrieval.quantity import LeafCondition, Quantities, make_room

MOST_DEPTH, MOST_PARTS, MOST_VALUES = 16, 256, 1_000

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Text = Annotated[StrictStr, Field(max_length=1_024)]
# An integer beyond 64 bits would be read as a float, and lose digits.
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
            level = [below for part in level for below in part.below()]

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

    def test(self, leaf: LeafCondition, items: Ints | slice) -> Bools:
        """Returns which of the items (M,) satisfy a comparison."""
        ...

    def share(self, leaf: LeafCondition) -> float:
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


def _wire(name: str) -> str:
    return {"one_of": "in"}.get(name, name)
