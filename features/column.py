"""One column as the files hold it → the values the platform works with.

Identifiers and categorical values become one canonical string whatever type a file gave them, so that 5, 5.0 and "5"
meet; numbers, times and labels get one type each. What cannot be converted is refused by row and value.
Shape letter: R, the rows of the table.
"""

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

import polars as pl

from features.dataset import Categorical, Label, Time
from features.label import Rule, parse_rule
from features.source import Table

_UNIT_US = {"s": 1_000_000, "ms": 1_000, "us": 1}
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799  # years 1 to 9999
_EXACT = 2**53  # below it a float64 holds every integer


def canonical(values: pl.Series) -> pl.Series:
    """Scalars of any type, or lists of them, as strings: a whole float like the integer, "" and NaN as null.

    Returns:
        (R,) String, or (R,) List(String) without null elements where `values` holds lists.

    Raises:
        TypeError: the type is neither scalar nor a list of scalars.
    """
    if isinstance(values.dtype, pl.Array):
        values = values.arr.to_list()
    if isinstance(values.dtype, pl.List):
        return values.list.eval(_text(pl.element(), values.dtype.inner)).list.drop_nulls()
    # The commonest columns without a query plan: a stream shapes small batches, where a plan costs more than its work.
    if values.dtype.is_integer():
        return values.cast(pl.String)
    if values.dtype == pl.String and not (values == "").any():
        return values
    return values.to_frame("value").select(_text(pl.col("value"), values.dtype)).to_series().alias(values.name)


def typed(name: str, values: Sequence[Any], dtype: pl.DataType) -> pl.Series:
    """Python values as JSON or msgpack has them, as a column of a type; a time may be ISO-8601 text, in UTC by default.

    Raises:
        TypeError, ValueError, pl.exceptions.PolarsError: a value does not fit the type.
    """
    if isinstance(dtype, pl.Date | pl.Datetime):
        values = [_moment(value, dtype) for value in values]
    return pl.Series(name, values, dtype=dtype)


def _moment(value: Any, dtype: pl.Date | pl.Datetime) -> date | datetime | None:
    if value is None:
        return None
    found = datetime.fromisoformat(value) if isinstance(value, str) else value
    if isinstance(found, datetime) and found.tzinfo is not None:
        found = found.astimezone(UTC)
    if isinstance(dtype, pl.Date):
        return found.date() if isinstance(found, datetime) else found
    if not isinstance(found, datetime):
        found = datetime(found.year, found.month, found.day)
    zoned = dtype.time_zone is not None
    return found.replace(tzinfo=UTC if zoned else None)


def _text(value: pl.Expr, dtype: object) -> pl.Expr:
    if isinstance(dtype, pl.Decimal) and dtype.scale:
        value, dtype = value.cast(pl.Float64), pl.Float64()
    if isinstance(dtype, (pl.Float32, pl.Float64)):
        whole = value.cast(pl.Int64, strict=False)
        is_whole = (value == whole) & (value.abs() < _EXACT)
        return pl.when(is_whole).then(whole.cast(pl.String)).otherwise(value.fill_nan(None).cast(pl.String))
    if isinstance(dtype, (pl.String, pl.Categorical, pl.Enum)):
        text = value.cast(pl.String)
        return pl.when(text != "").then(text)
    if isinstance(dtype, pl.DataType) and (
        dtype.is_integer() or dtype.is_temporal() or isinstance(dtype, (pl.Boolean, pl.Decimal, pl.Null))
    ):
        return value.cast(pl.String)
    raise TypeError(f"holds values of type {dtype}")


def texts(table: Table, name: str) -> pl.Series:
    """A column as canonical strings or lists of them; see `canonical`."""
    values = table.column(name)
    try:
        return canonical(values)
    except TypeError as error:
        raise table.error(name, f"{error}, text or numbers expected; flatten the column in the files") from error


def ids(table: Table, name: str) -> pl.Series:
    """An identifier column: (R,) String without nulls."""
    values = texts(table, name)
    if isinstance(values.dtype, pl.List):
        raise table.error(name, "holds lists, but an id is one value; name another column")
    row = _first(values.is_null())
    if row is not None:
        raise table.error(name, "the id is null; fill it in, or remove the row", row=row)
    return values


def unique_ids(table: Table, name: str) -> pl.Series:
    """An identifier column in which no id comes twice: (R,) String."""
    values = ids(table, name)
    row = _first(~values.is_first_distinct())
    if row is not None:
        file, number = table.place(int((values == values[row]).arg_true()[0]))
        raise table.error(name, f"id '{values[row]}' is also in row {number} of {file.name}; keep one of them", row=row)
    return values


def categories(table: Table, name: str, options: Categorical) -> pl.Series:
    """A categorical feature: (R,) String, or (R,) List(String) where it is multi-valued; null stays null.

    Splitting trims each value and drops the empty ones; a list column is multi-valued with or without `split`.
    """
    values = texts(table, name)
    if options.split is None or isinstance(values.dtype, pl.List):
        return values
    part = pl.element().str.strip_chars()
    return values.str.split(options.split).list.eval(part.filter(part != ""))


def numbers(table: Table, name: str) -> pl.Series:
    """A numeric feature: (R,) Float32; NaN and what is beyond float32 become null."""
    values = table.column(name)
    if isinstance(values.dtype, pl.String):
        values = _parsed(table, name, "a number is expected in a numeric column; mend it, or declare it categorical")
    elif not (values.dtype.is_numeric() or isinstance(values.dtype, (pl.Boolean, pl.Null))):
        raise table.error(name, f"holds {values.dtype}, numbers expected; remove it from numeric")
    numeric = values.cast(pl.Float32).alias("value").to_frame()
    return numeric.select(pl.when(pl.col("value").is_finite()).then("value")).to_series().alias(name)


def times(table: Table, time: Time) -> pl.Series:
    """The clock: (R,) Int64, microseconds since 1970 in UTC, without nulls."""
    values, name = table.column(time.column), time.column
    _refuse_null(table, name, "the event has no time; fill it in, or remove the row")
    if isinstance(values.dtype, (pl.Date, pl.Datetime)):
        return values.cast(pl.Datetime("us")).dt.epoch("us") if values.dtype == pl.Date else values.dt.epoch("us")
    if isinstance(values.dtype, pl.String) and time.unit in (None, "iso"):
        return _iso(table, name)
    if time.unit == "iso":
        raise table.error(name, f"{values[0]!r} is not ISO-8601 text; set unit to s, ms, us or ns", row=0)
    unit = time.unit or "s"
    if isinstance(values.dtype, pl.String):
        values = _parsed(table, name, f"a number of {unit} is expected; mend it, or the unit of time")
        if (empty := _first(values.is_null())) is not None:
            raise table.error(name, "the event has no time; fill it in, or remove the row", row=empty)
    elif not values.dtype.is_numeric():
        raise table.error(name, f"holds {values.dtype}, a time expected; name another column as time")
    seconds = values.cast(pl.Float64) / (1_000_000_000 if unit == "ns" else 1_000_000 // _UNIT_US[unit])
    row = _first(~seconds.is_between(_FIRST_S, _LAST_S))
    if row is not None:
        raise table.error(name, f"{values[row]} {unit} is beyond the year 9999; mend it, or the unit of time", row=row)
    if values.dtype.is_float() or isinstance(values.dtype, pl.Decimal):
        return (seconds * 1_000_000).round().cast(pl.Int64)
    whole = values.cast(pl.Int64)
    return whole // 1_000 if unit == "ns" else whole * _UNIT_US[unit]


def _iso(table: Table, name: str) -> pl.Series:
    """ISO-8601 text: a date, or a date and time with or without seconds, fraction and offset (none: UTC)."""
    values = table.column(name)
    parsed = (
        values.str.strip_chars()
        .str.replace(r"^(\d{4}-\d{2}-\d{2})$", "${1}T00:00")
        .str.replace(r"^(\d{4}-\d{2}-\d{2})[ t]", "${1}T")
        .str.replace(r" ?([Zz]|UTC)$", "+00:00")
        .str.replace(r"(T[\d:.,]+)$", "${1}+00:00")
        .str.replace(r"(T\d{2}:\d{2})([+-])", "${1}:00${2}")
        .str.replace(r"([+-]\d{2})$", "${1}:00")
        .str.replace(",", ".", literal=True)
        .str.strptime(pl.Datetime("us", "UTC"), "%Y-%m-%dT%H:%M:%S%.f%z", strict=False)
    )
    row = _first(parsed.is_null())
    if row is not None:
        problem = f"'{values[row]}' is not a time; write ISO-8601 such as 2024-01-31T12:00:00Z, or set unit for numbers"
        raise table.error(name, problem, row=row)
    return parsed.dt.epoch("us")


def positions(table: Table, name: str) -> pl.Series:
    """The order column: (R,) Int64 without nulls."""
    _refuse_null(table, name, "the event has no position; fill it in, or remove the row")
    values = table.column(name)
    remedy = "a whole number is expected in the order column; mend it, or name another"
    if isinstance(values.dtype, pl.String):
        values = _parsed(table, name, remedy)
    elif not values.dtype.is_numeric():
        raise table.error(name, f"holds {values.dtype}; {remedy}")
    whole = values.cast(pl.Int64, strict=False)
    row = _first(~whole.eq_missing(values))
    if row is not None:
        raise table.error(name, f"holds {values[row]}; {remedy}", row=row)
    return whole


def labels(table: Table, label: Label) -> pl.Series:
    """What each row's label is: (R,) Int8 of 0 and 1; null where it is neither and the row is to be dropped."""
    if label.column is None:
        return pl.repeat(1, table.frame.height, dtype=pl.Int8, eager=True)
    if label.positive is None:
        return _zero_or_one(table, label.column)
    positive = _matches(table, label.column, parse_rule(label.positive))
    if label.implicit:
        return positive.replace_strict({True: 1}, default=None, return_dtype=pl.Int8)
    if label.negative is None:
        return positive.cast(pl.Int8)
    negative = _matches(table, label.column, parse_rule(label.negative))
    row = _first(positive & negative)
    if row is not None:
        value = table.column(label.column)[row]
        problem = f"{value!r} matches both positive = '{label.positive}' and negative = '{label.negative}'"
        raise table.error(label.column, f"{problem}; change one of the rules so that they exclude each other", row=row)
    matched = pl.DataFrame({"positive": positive, "negative": negative})
    return matched.select(pl.when("positive").then(1).when("negative").then(0).cast(pl.Int8)).to_series()


def _zero_or_one(table: Table, name: str) -> pl.Series:
    values = _scalars(table, name)
    if isinstance(table.column(name).dtype, pl.Boolean):
        return table.column(name).cast(pl.Int8)
    row = _first(values.is_not_null() & ~values.is_in(["0", "1"]))
    if row is not None:
        problem = f"holds {table.column(name)[row]!r}, but a label without rules is 0 or 1"
        raise table.error(name, f'{problem}; add rules, e.g. positive = ">= 4"', row=row)
    return values.cast(pl.Int8)


def _matches(table: Table, name: str, rule: Rule) -> pl.Series:
    """Where a rule holds: (R,) Boolean, null where the column is."""
    values = _scalars(table, name)
    dtype = table.column(name).dtype
    if dtype.is_numeric() and isinstance(rule.value, str):
        problem = f"holds numbers, but the rule '{rule.op} {rule.raw}' compares with text"
        raise table.error(name, f"{problem}; write a number in the rule")
    if isinstance(dtype, pl.Boolean) and isinstance(rule.value, float):
        return pl.Series(rule.compare(table.column(name).cast(pl.Int8), rule.value))
    if isinstance(rule.value, str) or (rule.op in ("==", "!=") and not dtype.is_numeric()):
        return pl.Series(rule.compare(values, rule.raw))
    remedy = f"the rule '{rule.op} {rule.raw}' compares with a number; mend the value, or the rule"
    compared = _parsed(table, name, remedy)
    return pl.Series(rule.compare(compared.fill_nan(None), rule.value))


def _scalars(table: Table, name: str) -> pl.Series:
    values = texts(table, name)
    if isinstance(values.dtype, pl.List):
        raise table.error(name, "holds lists, but a label is judged from one value; name another column")
    return values


def _parsed(table: Table, name: str, remedy: str) -> pl.Series:
    """A column as Float64, its empty text null; the first text that is not a number is refused."""
    if table.column(name).dtype.is_integer():
        return table.column(name).cast(pl.Float64)
    values = texts(table, name)
    parsed = values.cast(pl.Float64, strict=False)
    row = _first(parsed.is_null() & values.is_not_null())
    if row is not None:
        raise table.error(name, f"holds '{values[row]}'; {remedy}", row=row)
    return parsed


def _refuse_null(table: Table, name: str, problem: str) -> None:
    row = _first(table.column(name).is_null())
    if row is not None:
        raise table.error(name, problem, row=row)


def _first(where: pl.Series) -> int | None:
    """The first row where a Boolean series holds."""
    return where.arg_max() if where.any() else None
