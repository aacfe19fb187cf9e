"""Reads the clock or order column of events as whole numbers: microseconds since 1970 in UTC, or positions.

Shape letter: R, the rows of the table.
"""

from dataclasses import replace
from typing import Literal

import polars as pl

from features.config import Config
from features.dataset.column import as_number, first, is_between, parsed, refuse_null
from features.dataset.files import SourceTable
from features.value.expression import INPUT_TYPES

_UNIT_US = {"s": 1_000_000, "ms": 1_000, "us": 1}
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799  # years 1 to 9999
_MOMENT = INPUT_TYPES["time"]
_COUNT = r"^-?[0-9]+(\.[0-9]+)?$"


class Time(Config):
    """Clock of an event. A time without an offset is UTC.

    Attributes:
        column: Column of the time.
        unit: Unit of numbers, or `iso` for text. By default datetimes are read as they are, strings are ISO 8601, and
            numbers are seconds.
    """

    column: str
    unit: Literal["s", "ms", "us", "ns", "iso"] | None = None


def times(table: SourceTable, time: Time) -> pl.Series:
    """Returns the clock column: (R,) Int64, microseconds since 1970 in UTC, without nulls."""
    values, name = table.column(time.column), time.column
    refuse_null(table, name, "the event has no time; fill it in, or remove the row")
    if isinstance(values.dtype, (pl.Date, pl.Datetime)):
        return values.cast(pl.Datetime("us")).dt.epoch("us") if values.dtype == pl.Date else values.dt.epoch("us")
    if isinstance(values.dtype, pl.String):
        return _text_times(table, time)
    if time.unit == "iso":
        raise table.error(name, f"{values[0]!r} is not ISO-8601 text; set unit to s, ms, us or ns", row=0)
    if not values.dtype.is_numeric():
        raise table.error(name, f"holds {values.dtype}, a time expected; name another column as time")
    return _counted(table, name, values, time)


def moments(table: SourceTable, time: Time) -> pl.Series:
    """Returns a column of times as expressions read it: (R,) Datetime in microseconds and UTC. Null stays null."""
    values = table.column(time.column)
    known = values.is_not_null()
    if not known.any():
        return pl.Series(time.column, [None] * len(values), dtype=_MOMENT)
    # The first known time stands in for a null, so that each error names the row in its file.
    filled = values.fill_null(values[known.arg_max()])  # type: ignore[index]
    held = table.frame.clone().replace_column(table.frame.columns.index(time.column), filled)
    counted = times(replace(table, frame=held), time).cast(_MOMENT).alias(time.column)
    return counted if known.all() else counted.zip_with(known, pl.Series([None], dtype=_MOMENT))


def _text_times(table: SourceTable, time: Time) -> pl.Series:
    """Parses times written as text.

    A text that is a number counts the unit, by default seconds. Without a unit, every other text is ISO-8601.
    """
    name = time.column
    texts = table.column(name).str.strip_chars()
    if time.unit == "iso":
        counts = pl.repeat(False, len(texts), eager=True)
    else:
        counts = texts.str.contains(_COUNT) if time.unit is None else pl.repeat(True, len(texts), eager=True)
    moments = None if counts.all() else _iso(table, name, texts, ~counts)
    if not counts.any():
        assert moments is not None
        return moments
    found = _text_counts(table, name, texts.set(~counts, "0"), time)
    return found if moments is None else found.zip_with(counts, moments)


def _text_counts(table: SourceTable, name: str, texts: pl.Series, time: Time) -> pl.Series:
    """Parses numbers written as text. A whole number is exact, whatever the other values are."""
    whole = texts.cast(pl.Int64, strict=False)
    if not whole.null_count():
        return _counted(table, name, whole, time)
    found = as_number(texts).fill_nan(None)
    odd = first(found.is_null() & whole.is_null())
    if odd is not None:
        remedy = f"a number of {time.unit or 's'} is expected; fix the value, or the unit of time"
        raise table.error(name, f"holds '{texts[odd]}'; {remedy}", row=odd)
    counted = _counted(table, name, whole.fill_null(0), time)
    return counted.zip_with(whole.is_not_null(), _counted(table, name, found.fill_null(0), time))


def _counted(table: SourceTable, name: str, values: pl.Series, time: Time) -> pl.Series:
    """Converts counts of the unit to microseconds."""
    unit = time.unit or "s"
    if time.unit is None and table.kind != "message" and _are_dates(values):
        problem = f"{values[0]} reads as a day, YYYYMMDD, and would be a second of 1970"
        raise table.error(name, f'{problem}; write ISO-8601 in the files, or set unit = "s" if they are seconds', row=0)
    per_second = 1_000_000_000 if unit == "ns" else 1_000_000 // _UNIT_US[unit]
    if values.dtype.is_integer() and is_between(values, _FIRST_S * per_second, _LAST_S * per_second):
        whole = values.cast(pl.Int64)
        return whole // 1_000 if unit == "ns" else whole * _UNIT_US[unit]
    seconds = values.cast(pl.Float64) / per_second
    row = first(~seconds.is_between(_FIRST_S, _LAST_S))
    if row is not None:
        raise table.error(
            name, f"{values[row]} {unit} is beyond the year 9999; fix the value, or the unit of time", row=row
        )
    if values.dtype.is_float() or isinstance(values.dtype, pl.Decimal):
        return (seconds * 1_000_000).round().cast(pl.Int64)
    whole = values.cast(pl.Int64)
    return whole // 1_000 if unit == "ns" else whole * _UNIT_US[unit]


def _are_dates(values: pl.Series) -> bool:
    """Returns whether all values are numbers YYYYMMDD from 1900 to 2100."""
    if not values.is_between(19_000_101, 21_001_231).all():
        return False
    days = values.cast(pl.Int64).cast(pl.String).str.to_date("%Y%m%d", strict=False)
    return not days.null_count()


def _iso(table: SourceTable, name: str, values: pl.Series, where: pl.Series) -> pl.Series:
    """Parses ISO-8601 text: a date, or a date and time with or without seconds, fraction and offset (none: UTC)."""
    found = (
        pl.col(values.name)
        .str.replace(r"^(\d{4}-\d{2}-\d{2})$", "${1}T00:00")
        .str.replace(r"^(\d{4}-\d{2}-\d{2})[ t]", "${1}T")
        .str.replace(r" ?([Zz]|UTC)$", "+00:00")
        .str.replace(r"(T[\d:.,]+)$", "${1}+00:00")
        .str.replace(r"(T\d{2}:\d{2})([+-])", "${1}:00${2}")
        .str.replace(r"([+-]\d{2})$", "${1}:00")
        .str.replace(",", ".", literal=True)
        .str.strptime(pl.Datetime("us", "UTC"), "%Y-%m-%dT%H:%M:%S%.f%z", strict=False)
    )
    # One query for all replacements: a stream parses small batches, and each query has a fixed cost.
    moments = values.to_frame().select(found).to_series()
    row = first(moments.is_null() & where)
    if row is not None:
        problem = f"'{values[row]}' is not a time; write ISO-8601 such as 2024-01-31T12:00:00Z, or set unit for numbers"
        raise table.error(name, problem, row=row)
    return moments.dt.epoch("us")


def positions(table: SourceTable, name: str) -> pl.Series:
    """Returns the order column: (R,) Int64 without nulls."""
    refuse_null(table, name, "the event has no position; fill it in, or remove the row")
    values = table.column(name)
    remedy = "a whole number is expected in the order column; fix the value, or name another column"
    if isinstance(values.dtype, pl.String):
        counted = values.cast(pl.Int64, strict=False)
        values = parsed(table, name, remedy) if counted.null_count() else counted
    elif not values.dtype.is_numeric():
        raise table.error(name, f"holds {values.dtype}; {remedy}")
    whole = values.cast(pl.Int64, strict=False)
    row = first(~whole.eq_missing(values))
    if row is not None:
        raise table.error(name, f"holds {values[row]}; {remedy}", row=row)
    return whole
