"""Filters on items' attributes: a small language, and the columns it is judged by.

A filter is a tree: comparisons of one column at the leaves, `and`, `or` and `not` above them.

    {"and": [{"column": "year", "gte": 1990}, {"not": {"column": "genres", "in": ["Horror", "War"]}}]}

A column of lists holds a value when one of its elements is that value. An item without a value matches no comparison
but `"eq": null`.

Shape letters: N items, M chosen ones, V distinct values of a column.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from functools import cached_property
from typing import Annotated, Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, StrictStr, model_validator

from features.column import canonical, typed
from features.error import EventError
from models.values import Growable, gather, kept

MOST_DEPTH, MOST_PARTS, MOST_VALUES = 16, 256, 1_000
_SAMPLE = 2_048

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Text = Annotated[StrictStr, Field(max_length=1_024)]
Whole = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Number = Whole | Annotated[FiniteFloat, Field(strict=True)]
Scalar = StrictBool | Number | Text


class Filter(BaseModel):
    """What items must hold: one comparison of a column, or other filters under `and`, `or` or `not`."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        json_schema_extra={
            "examples": [{"and": [{"column": "year", "gte": 1990}, {"not": {"column": "genres", "eq": "Horror"}}]}]
        },
    )

    column: Text | None = Field(default=None, description="A filterable column of the items.")
    eq: Scalar | None = Field(default=None, description="Holds this value; null: holds none.")
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
        """Equal texts are equal filters."""
        return self.model_dump_json(by_alias=True, exclude_unset=True)

    def check_size(self) -> None:
        """Raises EventError where a filter is deeper, or has more parts, than is good for a server."""
        level, parts, depth = [self], 0, 0
        while level:
            parts, depth = parts + len(level), depth + 1
            if depth > MOST_DEPTH or parts > MOST_PARTS:
                raise EventError(f"filter: at most {MOST_DEPTH} levels and {MOST_PARTS} parts are taken")
            level = [below for one in level for below in one.below()]

    def below(self) -> "list[Filter]":
        """The filters right under this one."""
        return [*(self.every or ()), *(self.some or ()), *([self.none] if self.none else ())]


class _Column(Protocol):
    """One attribute of all versions of all items; an item's newest version is the one that counts."""

    def extend(self, values: pl.Series) -> None:
        """Appends versions."""
        ...

    def test(self, leaf: Filter) -> Callable[[Ints], Bools]:
        """What tells for versions (M,) which hold what a comparison asks for."""
        ...

    def share(self, leaf: Filter) -> float:
        """The share of versions, about, for which it would."""
        ...


class Attributes:
    """The filterable columns of a catalogue's items, by item number, growing with it.

    Args:
        items: one row an item, in the order of their numbers.
        names: the filterable columns.
    """

    def __init__(self, items: pl.DataFrame, names: Sequence[str]) -> None:
        self._types = {name: items.schema[name] for name in names}
        self._columns: dict[str, _Column] = {name: _open(name, items[name]) for name in names}
        self._at = Growable(np.arange(items.height, dtype=np.int64))
        self._versions = items.height
        self.changes = 0

    def put(self, numbers: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
        """Gives items (M,) new attributes, or new items their first; a row without a column holds no value there."""
        if not numbers:
            return
        most = max(numbers)
        if most >= len(self._at.array):
            self._at.extend(np.full(most + 1 - len(self._at.array), -1, dtype=np.int64))
        for name, column in self._columns.items():
            column.extend(typed(name, [row.get(name) for row in rows], self._types[name]))
        self._at.array[list(numbers)] = np.arange(self._versions, self._versions + len(numbers))
        self._versions += len(numbers)
        self.changes += 1

    def mask(self, wanted: Filter, size: int) -> Bools:
        """Which of the items 0..size-1 match, (size,)."""
        return self.matches(wanted, np.arange(size, dtype=np.int64))

    def matches(self, wanted: Filter, numbers: Ints) -> Bools:
        """Which of some items (M,) match, (M,).

        Raises:
            EventError: the filter names a column that is not filterable, or compares one with a value of another kind.
        """
        inside = numbers < len(self._at.array)
        versions = np.where(inside, self._at.array[np.where(inside, numbers, 0)], -1) if len(numbers) else numbers
        return self._judge(wanted, versions)

    def share(self, wanted: Filter) -> float:
        """About which share of the items matches, from counts and samples; columns are taken as independent."""
        if wanted.every:
            return float(np.prod([self.share(part) for part in wanted.every]))
        if wanted.some:
            return 1.0 - float(np.prod([1.0 - self.share(part) for part in wanted.some]))
        if wanted.none:
            return 1.0 - self.share(wanted.none)
        return self._column(wanted).share(wanted)

    def _judge(self, wanted: Filter, versions: Ints) -> Bools:
        if wanted.every:
            every: Bools = np.logical_and.reduce([self._judge(part, versions) for part in wanted.every])
            return every
        if wanted.some:
            some: Bools = np.logical_or.reduce([self._judge(part, versions) for part in wanted.some])
            return some
        if wanted.none:
            # An item of which nothing is known matches nothing, negated or not.
            return ~self._judge(wanted.none, versions) & (versions >= 0)
        found = np.zeros(len(versions), dtype=bool)
        known = versions >= 0
        test = self._column(wanted).test(wanted)
        if known.all():
            return test(versions)
        found[known] = test(versions[known])
        return found

    def _column(self, leaf: Filter) -> _Column:
        name = str(leaf.column)
        if name not in self._columns:
            raise EventError(
                f"filter: column {name!r} is not filterable; the filterable columns are: "
                f"{', '.join(self._columns) or 'none'}"
            )
        return self._columns[name]


class _Categories:
    """Strings, booleans, or lists of scalars, by code."""

    def __init__(self, name: str, values: pl.Series) -> None:
        self._name = name
        self._numbers: dict[str, int] = {}
        self._codes = Growable(np.zeros(0, dtype=np.int32))
        self._offsets = Growable(np.zeros(1, dtype=np.int64))
        self._single = True
        self._counts: NDArray[np.int64] | None = None
        self.extend(values)

    def extend(self, values: pl.Series) -> None:
        found = canonical(values)
        if found.dtype == pl.List:
            lengths = found.list.len().fill_null(0).to_numpy().astype(np.int64)
            flat = found.filter(found.list.len().fill_null(0) > 0).explode()
        else:
            lengths = found.is_not_null().to_numpy().astype(np.int64)
            flat = found.drop_nulls()
        distinct = flat.unique(maintain_order=True)
        for value in distinct.to_list():
            self._numbers.setdefault(value, len(self._numbers))
        local = flat.cast(pl.Enum(distinct)).to_physical().to_numpy() if len(flat) else np.zeros(0, dtype=np.int32)
        places = np.array([self._numbers[value] for value in distinct.to_list()], dtype=np.int32)
        self._codes.extend(places[local] if len(local) else local.astype(np.int32))
        self._offsets.extend(self._offsets.array[-1] + np.cumsum(lengths))
        self._single = self._single and bool((lengths == 1).all())
        self._counts = None

    def test(self, leaf: Filter) -> Callable[[Ints], Bools]:
        if _asks_for_none(leaf):
            return lambda versions: np.diff(self._offsets.array)[versions] == 0
        chosen = self._chosen(leaf)
        if self._single:
            return lambda versions: chosen[self._codes.array[versions]]
        return lambda versions: self._any(chosen, versions)

    def share(self, leaf: Filter) -> float:
        size = max(len(self._offsets.array) - 1, 1)
        if _asks_for_none(leaf):
            return float((np.diff(self._offsets.array) == 0).sum()) / size
        if self._counts is None:
            self._counts = np.bincount(self._codes.array, minlength=len(self._numbers))
        return min(1.0, float(self._counts[self._chosen(leaf)].sum()) / size)

    def _any(self, chosen: Bools, versions: Ints) -> Bools:
        positions, lengths = gather(self._offsets.array, versions)
        return kept(chosen[self._codes.array[positions]], lengths) > 0

    def _chosen(self, leaf: Filter) -> Bools:
        """Which of the V values are asked for."""
        chosen = np.zeros(len(self._numbers), dtype=bool)
        if leaf.column is not None and {"gt", "gte", "lt", "lte"} & leaf.model_fields_set:
            bounds = {name: getattr(leaf, name) for name in ("gt", "gte", "lt", "lte")}
            wrong = next((v for v in bounds.values() if v is not None and not isinstance(v, str)), None)
            if wrong is not None:
                raise EventError(f"filter: column {self._name!r} holds text, which has no order beside {wrong!r}")
            for value, number in self._numbers.items():
                chosen[number] = _within(value, **bounds)
            return chosen
        asked = leaf.one_of if leaf.one_of is not None else [leaf.eq]
        for text in (canonical(pl.Series([value]))[0] for value in asked):
            if text in self._numbers:
                chosen[self._numbers[text]] = True
        return chosen


class _Numbers:
    """Numbers, and times as microseconds since 1970."""

    def __init__(self, name: str, values: pl.Series) -> None:
        self._name = name
        self._time = values.dtype.is_temporal()
        whole = self._time or values.dtype.is_integer()
        # A feature is kept in float32, where 12.21 is another number.
        self._narrow = values.dtype == pl.Float32
        self._values: Growable[Any] = Growable(np.zeros(0, dtype=np.int64 if whole else np.float64))
        self._present: Growable[np.bool_] = Growable(np.zeros(0, dtype=bool))
        self._sample: NDArray[Any] | None = None
        self.extend(values)

    def extend(self, values: pl.Series) -> None:
        if self._time:
            values = values.cast(pl.Datetime("us")).dt.epoch("us")
        elif values.dtype.is_float():
            values = values.fill_nan(None)
        dtype = self._values.array.dtype
        present = values.is_not_null().to_numpy()
        self._values.extend(values.fill_null(0).cast(pl.Float64 if dtype == np.float64 else pl.Int64).to_numpy())
        self._present.extend(present)
        self._sample = None

    def test(self, leaf: Filter) -> Callable[[Ints], Bools]:
        holds = self._holds(leaf)
        if _asks_for_none(leaf):
            return lambda versions: ~self._present.array[versions]
        return lambda versions: holds(self._values.array[versions]) & self._present.array[versions]

    def share(self, leaf: Filter) -> float:
        present = float(self._present.array.mean()) if len(self._present.array) else 0.0
        if _asks_for_none(leaf):
            return 1.0 - present
        if self._sample is None:
            values = self._values.array[self._present.array]
            step = max(1, len(values) // _SAMPLE)
            self._sample = values[::step]
        return present * float(self._holds(leaf)(self._sample).mean()) if len(self._sample) else 0.0

    def _holds(self, leaf: Filter) -> Callable[[NDArray[Any]], Bools]:
        if leaf.one_of is not None:
            asked = [self._number(value) for value in leaf.one_of]
            return lambda values: np.isin(values, asked)
        if leaf.eq is not None:
            equal = self._number(leaf.eq)
            return lambda values: values == equal
        bounds = {
            name: None if getattr(leaf, name) is None else self._number(getattr(leaf, name))
            for name in ("gt", "gte", "lt", "lte")
        }
        return lambda values: _within(values, **bounds)

    def _number(self, value: Any) -> int | float:
        if self._time and isinstance(value, str):
            try:
                found = datetime.fromisoformat(value)
                return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1_000_000)
            except (ValueError, OverflowError) as error:
                raise EventError(f"filter: column {self._name!r} holds times; {value!r} is not ISO 8601") from error
        if isinstance(value, bool) or not isinstance(value, int | float) or self._time:
            kind = "times, as ISO 8601 text" if self._time else "numbers"
            raise EventError(f"filter: column {self._name!r} holds {kind}; {value!r} is none")
        return float(np.float32(value)) if self._narrow else value


def attribute_json(value: Any) -> Any:
    """An attribute's value as JSON has it: a time as ISO 8601."""
    return value.isoformat() if isinstance(value, date | datetime) else value


def _open(name: str, values: pl.Series) -> _Column:
    dtype = values.dtype
    if (dtype.is_numeric() and dtype != pl.Boolean) or isinstance(dtype, pl.Date | pl.Datetime):
        return _Numbers(name, values)
    if dtype == pl.Null:
        values = values.cast(pl.String)
    return _Categories(name, values)


def _asks_for_none(leaf: Filter) -> bool:
    return "eq" in leaf.model_fields_set and leaf.eq is None


def _within(values: Any, gt: Any = None, gte: Any = None, lt: Any = None, lte: Any = None) -> Any:
    found: Any = True
    if gt is not None:
        found = found & (values > gt)
    if gte is not None:
        found = found & (values >= gte)
    if lt is not None:
        found = found & (values < lt)
    if lte is not None:
        found = found & (values <= lte)
    return found


def _wire(name: str) -> str:
    return {"one_of": "in"}.get(name, name)
