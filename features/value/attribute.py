"""An item's attributes: values for filters, kept exactly in the type that the catalogue gives their column.

A message carries text, numbers, booleans and lists. `fit` converts each of them to the Python value of the column's
type, or refuses it. A number is never cut to the catalogue's width: 12.99 is 12.99 in a column of whole prices.
"""

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import polars as pl

from features.value.canonical import cell, scalar

_INTEGER = re.compile(r"-?[0-9]+")
_MOST_S = 253_402_300_800  # the year 10000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Character that text rarely holds, to build a column of lists without a series for each list.
_SEPARATOR = "\x1f"
_DATES = (19_000_101, 21_001_231)


def fit(value: Any, dtype: pl.DataType, *, of_csv: bool = False) -> Any:
    """Returns a value as the Python value of a column's type; None stays None.

    Args:
        value: Text, a number, a boolean, a list, or a value that `fit` returned.
        dtype: Type of the column in the catalogue.
        of_csv: True if text comes from a csv table; see `features.value.canonical.cell`.

    Returns:
        For numbers an int, float or Decimal of any size. For temporal types a date, datetime (UTC), time or timedelta.
        A number as a time counts seconds, ms, us or ns since 1970 by its magnitude, or is YYYYMMDD for a date; a number
        as a duration counts seconds.

    Raises:
        ValueError: The value is not of that type; names the expected type.
    """
    if of_csv and isinstance(value, str):
        value = cell(value)
    if value is None or value == "":
        return None
    if isinstance(dtype, (pl.List, pl.Array)):
        if not isinstance(value, (list, tuple)):
            raise _unfit(value, "a list")
        inner: Any = dtype.inner
        parts = [fit(part, inner, of_csv=of_csv) for part in value]
        return [part for part in parts if part is not None]
    try:
        return _fit_scalar(value, dtype)
    except (TypeError, ValueError, OverflowError, ArithmeticError) as error:
        raise _unfit(value, _expected(dtype)) from error


def typed(name: str, values: Sequence[Any], dtype: pl.DataType) -> pl.Series:
    """Returns values, each as `fit` takes it, as a column of a type.

    If a number does not fit the type exactly, the column is of Python objects. Text beyond the categories of an Enum
    makes it String, and a column of nulls takes text.

    Raises:
        ValueError: A value is not of the type.
    """
    if (found := _texts(name, values, dtype)) is not None:
        return found
    fitted = [fit(value, dtype) for value in values]
    if dtype == pl.Null:
        return pl.Series(name, fitted, dtype=pl.String)
    if isinstance(dtype, pl.Decimal):
        fitted = [None if value is None else Decimal(value) for value in fitted]
        if all(value is None or -value.as_tuple().exponent <= dtype.scale for value in fitted):
            return pl.Series(name, fitted, dtype=dtype)
        return pl.Series(name, fitted, dtype=pl.Object)
    if dtype.is_integer() and any(isinstance(value, float) for value in fitted):
        return pl.Series(name, fitted, dtype=pl.Object)
    try:
        return pl.Series(name, fitted, dtype=dtype, strict=True)
    except (OverflowError, TypeError, pl.exceptions.PolarsError):
        if isinstance(dtype, (pl.Enum, pl.Categorical)):
            return pl.Series(name, fitted, dtype=pl.String)
        return pl.Series(name, fitted, dtype=pl.Object)


def _texts(name: str, values: Sequence[Any], dtype: pl.DataType) -> pl.Series | None:
    """Returns text, or lists of text, as a column at once: the fast twin of `fit`. None if `fit` must read a value."""
    types = set(map(type, values)) - {type(None)}
    if dtype == pl.String and types == {str}:
        return pl.Series(name, [value or None for value in values], dtype=dtype)
    if types != {list} or dtype != pl.List(pl.String):
        return None
    flat = [part for value in values if value for part in value]
    if [] in values or set(map(type, flat)) != {str} or "" in flat or _SEPARATOR in "".join(flat):
        return None
    joined = [None if value is None else _SEPARATOR.join(value) for value in values]
    return pl.Series(name, joined, dtype=pl.String).str.split(_SEPARATOR)


def listed(value: Any, dtype: pl.DataType) -> Any:
    """Returns a lone value of a list column as a list of one."""
    alone = isinstance(dtype, (pl.List, pl.Array)) and value is not None and not isinstance(value, list)
    return [value] if alone else value


def moment(value: Any) -> datetime:
    """Returns ISO 8601 text, a date, a datetime or a number as a moment in UTC; without an offset, text is UTC.

    A number counts seconds, milliseconds, microseconds or nanoseconds since 1970, whichever puts it before the year
    5138, and one of eight digits that reads as YYYYMMDD from 1900 to 2100 is that day.

    Raises:
        ValueError, TypeError, OverflowError: The value is not a moment.
    """
    if isinstance(value, str):
        value = float(value) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value) else datetime.fromisoformat(value)
    if isinstance(value, bool):
        raise TypeError("a boolean is no moment")
    if isinstance(value, int | float):
        return _by_magnitude(value)
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    found: datetime = value.astimezone(UTC) if value.tzinfo is not None else value.replace(tzinfo=UTC)
    return found


def _by_magnitude(value: float) -> datetime:
    if _DATES[0] <= value <= _DATES[1] and value == int(value):
        try:
            return datetime.strptime(str(int(value)), "%Y%m%d").replace(tzinfo=UTC)
        except ValueError:
            pass
    per_second = next((scale for scale in (1, 1_000, 1_000_000, 1_000_000_000) if abs(value) < 1e11 * scale), None)
    if per_second is None:
        raise ValueError("beyond any clock")
    if isinstance(value, int):
        return _EPOCH + timedelta(microseconds=value * 1_000_000 // per_second)
    return _EPOCH + timedelta(seconds=value / per_second)


def _fit_scalar(value: Any, dtype: pl.DataType) -> Any:
    if isinstance(value, (list, tuple, dict)):
        raise TypeError("one value expected")
    if dtype.is_numeric():
        return _number(value, dtype)
    if dtype == pl.Boolean:
        return _boolean(value)
    if dtype == pl.Date:
        return value if type(value) is date else moment(value).date()
    if isinstance(dtype, pl.Datetime):
        found = moment(value)
        return found if dtype.time_zone is not None else found.replace(tzinfo=None)
    if dtype == pl.Time:
        found_time = value if isinstance(value, time) else time.fromisoformat(value)
        return found_time.replace(tzinfo=None)
    if isinstance(dtype, pl.Duration):
        return _span(value)
    return scalar(value)


def _number(value: Any, dtype: pl.DataType) -> Any:
    if isinstance(value, bool):
        raise TypeError("a boolean is no number")
    if isinstance(dtype, pl.Decimal):
        found = Decimal(repr(value) if isinstance(value, float) else value)
        if not found.is_finite():
            raise ValueError("not finite")
        return found
    if isinstance(value, str):
        value = int(value) if _INTEGER.fullmatch(value) else float(value)
    if isinstance(value, Decimal):
        value = int(value) if value == value.to_integral_value() else float(value)
    if value != value:
        return None
    if abs(value) == float("inf"):
        raise ValueError("not finite")
    if dtype.is_float():
        return float(value) if float(value) == value else value
    if value != int(value):
        return value
    whole = int(value)
    if -(2**63) <= whole < 2**64:
        return whole
    # A record holds 64 bits; a float holds some of the larger ones.
    if float(whole) != whole:
        raise ValueError("beyond 64 bits")
    return float(whole)


def _boolean(value: Any) -> bool:
    found = {"true": True, "false": False, "1": True, "0": False}.get(str(scalar(value)).lower())
    if found is None:
        raise ValueError("no boolean")
    return found


def _span(value: Any) -> timedelta:
    if isinstance(value, timedelta):
        return value
    if isinstance(value, bool):
        raise TypeError("a boolean is no duration")
    if isinstance(value, int | float):
        return timedelta(seconds=value)
    return msgspec.convert(value, timedelta)


def _expected(dtype: pl.DataType) -> str:
    if dtype.is_numeric():
        return "a number"
    names: dict[Any, str] = {
        pl.Boolean: "true or false",
        pl.Date: "a date, as ISO 8601 text or a number since 1970",
        pl.Datetime: "a time, as ISO 8601 text or a number since 1970",
        pl.Time: "a time of day such as 08:30:00",
        pl.Duration: "a duration, as ISO 8601 text such as PT5S or a number of seconds",
    }
    return names.get(dtype.base_type(), "one value")


def _unfit(value: Any, expected: str) -> ValueError:
    return ValueError(f"expected {expected}, got {str(value)[:80]!r}")
