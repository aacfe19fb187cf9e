"""Attributes with an order: numbers, and dates, times and durations as microseconds.

A number is kept as the sum of two float64: the nearest float and the remainder. Integers of 19 digits and prices with
cents are therefore compared exactly, even in one column. The second array exists only if a value needs the remainder.
Shape letter: M, items.
"""

from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import EventError
from features.value.attribute import fit
from models.table.column_rows import Growable

_SAMPLE = 2_048
_EXACT = 2**53  # up to it a float64 holds every integer
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class LeafCondition(Protocol):
    """Comparison of a filter's leaf with a column."""

    eq: Any
    one_of: Any
    gt: Any
    gte: Any
    lt: Any
    lte: Any

    @property
    def model_fields_set(self) -> set[str]: ...


class Quantities:
    """Column of numbers, or temporal values as microseconds: since 1970, since midnight, or of a duration.

    Args:
        name: Name of the column.
        values: One value per item, in the order of their numbers.
    """

    def __init__(self, name: str, values: pl.Series) -> None:
        self._name = name
        self._dtype = values.dtype
        # The number 12.21 of a filter differs from 12.21 in float32, so the filter's number is rounded too.
        self._narrow = values.dtype == pl.Float32
        self._values: Growable[np.float64] = Growable(np.zeros(0))
        self._rest: Growable[np.float64] | None = None
        self._present: Growable[np.bool_] = Growable(np.zeros(0, dtype=bool))
        self.put(np.arange(len(values), dtype=np.int64), values)

    def put(self, numbers: Ints, values: pl.Series) -> None:
        """Gives distinct items (M,) new values (M,).

        An item beyond the last is added; items in between hold no value.
        """
        filled, rest, present = _split(values)
        make_room(self._values, numbers)
        make_room(self._present, numbers)
        if rest is not None and self._rest is None:
            self._rest = Growable(np.zeros(len(self._values.array)))
        self._values.array[numbers] = filled
        self._present.array[numbers] = present
        if self._rest is not None:
            make_room(self._rest, numbers)
            self._rest.array[numbers] = 0.0 if rest is None else rest

    def test(self, leaf: LeafCondition, items: Ints | slice) -> Bools:
        """Returns which of the items (M,) satisfy a comparison."""
        present = self._present.array[items]
        if asks_for_none(leaf):
            return ~present
        rest = None if self._rest is None else self._rest.array[items]
        matching: Bools = self._matches(leaf, self._values.array[items], rest) & present
        return matching

    def share(self, leaf: LeafCondition) -> float:
        """Returns the approximate share of items that satisfy a comparison."""
        size = len(self._present.array)
        return float(self.test(leaf, slice(None, None, max(1, size // _SAMPLE))).mean()) if size else 0.0

    def values(self, items: Ints) -> tuple[Ints, Ints]:
        """Returns numbers (n,) of the values of items (M,), equal for equal values, and their counts (M,)."""
        present = self._present.array[items]
        columns = [self._values.array[items][present]]
        if self._rest is not None:
            columns.append(self._rest.array[items][present])
        _, numbers = np.unique(np.stack(columns), axis=1, return_inverse=True)
        return numbers.reshape(-1).astype(np.int64), present.astype(np.int64)

    def _matches(self, leaf: LeafCondition, values: Floats, rest: Floats | None) -> Bools:
        wanted = leaf.one_of if leaf.one_of is not None else [leaf.eq] if leaf.eq is not None else None
        if wanted is not None:
            pairs = [self._number(value) for value in wanted]
            if rest is None:
                return np.isin(values, [first for first, second in pairs if second == 0.0])
            some: Bools = np.logical_or.reduce([(values == first) & (rest == second) for first, second in pairs])
            return some
        within = np.ones(len(values), dtype=bool)
        for name, (beyond, equal) in _BOUNDS.items():
            bound = getattr(leaf, name)
            if bound is not None:
                first, second = self._number(bound)
                behind = equal(0.0 if rest is None else rest, second)
                within &= beyond(values, first) | ((values == first) & behind)
        return within

    def _number(self, value: Any) -> tuple[float, float]:
        """Returns a value of a filter as two floats, the nearest one and the remainder."""
        temporal = self._dtype.is_temporal()
        spans = isinstance(self._dtype, pl.Duration)
        wrong = isinstance(value, bool) or (not isinstance(value, str) if temporal and not spans else False)
        if wrong or (not temporal and isinstance(value, str)):
            raise EventError(f"filter: column {self._name!r} holds {self._kind}; {value!r} is not one")
        # A day may be compared with a moment of the day.
        dtype = pl.Datetime("us") if self._dtype == pl.Date else self._dtype
        try:
            first, second = _pair(fit(value, dtype) if temporal else value)
        except (ValueError, OverflowError) as error:
            kind = self._kind.split(",")[0]
            raise EventError(f"filter: column {self._name!r} holds {kind}; {value!r} is not ISO 8601") from error
        return (float(np.float32(first)), 0.0) if self._narrow else (first, second)

    @property
    def _kind(self) -> str:
        if isinstance(self._dtype, pl.Duration):
            return "durations, as ISO 8601 text or seconds"
        return "times, as ISO 8601 text" if self._dtype.is_temporal() else "numbers"


def asks_for_none(leaf: LeafCondition) -> bool:
    """Returns whether a comparison asks for items without a value."""
    return "eq" in leaf.model_fields_set and leaf.eq is None


def make_room(column: Growable[Any], numbers: Ints) -> None:
    """Adds items without a value up to the last of `numbers`."""
    more = int(numbers.max(initial=-1)) + 1 - len(column.array)
    if more > 0:
        column.extend(np.zeros(more, dtype=column.array.dtype))


_BOUNDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gt": (np.greater, np.greater),
    "gte": (np.greater, np.greater_equal),
    "lt": (np.less, np.less),
    "lte": (np.less, np.less_equal),
}


def _split(values: pl.Series) -> tuple[Floats, Floats | None, Bools]:
    """Splits values (M,) into floats, their remainders if any is needed, and a mask of the values that exist."""
    dtype = values.dtype
    if isinstance(dtype, pl.Date | pl.Datetime):
        values = values.cast(pl.Datetime("us")).dt.epoch("us")
    elif dtype == pl.Time:
        values = values.to_physical() // 1_000
    elif isinstance(dtype, pl.Duration):
        values = values.dt.total_microseconds()
    elif dtype.is_float():
        values = values.fill_nan(None)
    present = values.is_not_null().to_numpy()
    if dtype == pl.Object or (values.dtype.is_integer() and _is_wide(values)) or isinstance(dtype, pl.Decimal):
        pairs = [(0.0, 0.0) if value is None else _pair(value) for value in values.to_list()]
        both = np.array(pairs, dtype=np.float64).reshape(len(pairs), 2)
        return both[:, 0], both[:, 1] if both[:, 1].any() else None, present
    filled: Floats = values.fill_null(0).cast(pl.Float64).to_numpy()
    return filled, None, present


def _is_wide(values: pl.Series) -> bool:
    return any(isinstance(bound, int) and abs(bound) > _EXACT for bound in (values.min(), values.max()))


def _pair(value: Any) -> tuple[float, float]:
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)) - _EPOCH
    elif isinstance(value, date):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC) - _EPOCH
    elif isinstance(value, time):
        value = timedelta(hours=value.hour, minutes=value.minute, seconds=value.second, microseconds=value.microsecond)
    if isinstance(value, timedelta):
        value = value // _MICROSECOND
    first = float(value)
    exact = isinstance(value, int) or (isinstance(value, Decimal) and value == value.to_integral_value())
    return first, float(int(value) - int(first)) if exact and abs(first) > _EXACT else 0.0
