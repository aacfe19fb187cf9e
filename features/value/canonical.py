"""The canonical form: the text of an identifier or a categorical value, whatever type and file it came in.

A value alone decides its text, never its column, batch or file. So values of a file, a message and a request match:

    an integer, or a number that is whole    its digits, at any size and of any type: 5, 5.0 and Decimal("5.00") are "5"
    another number                           the shortest text that reads back as it: "0.1", "1e-07"
    a boolean                                "true" or "false"
    a date, time, datetime or duration       one ISO 8601 form; a datetime with a zone is in UTC and ends in Z
    text                                     itself, to the character: "5.10", "0108775015" and "1e3" stay
    null, NaN, infinity and ""               no value

Text is not normalised: "é" as one code point (NFC) and as two (NFD) are two values, and so are " x" and "x".
A float32 that is not whole has the text of the shortest decimal that reads back as it: 0.1, not 0.10000000149011612.

A csv has only text, so one more rule reads the text of a csv table, in its files and in messages about it; see `cell`.
Version 1 of the form, which older bundles keep, is in `features.value.canonical_v1`.
Shape letter: R, rows.
"""

import math
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import polars as pl

from features.value import canonical_v1

VERSION = 2

_INT64 = 2**63
# Between these bounds polars writes a float as Python does; outside, the two differ in the exponent.
_PLAIN_FROM, _PLAIN_TO = 1e-4, 1e16
_CELL = r"^(?:(-?(?:0|[1-9][0-9]*))\.0+|[Tt]rue|TRUE|[Ff]alse|FALSE|nan|NaN)$"
_CELL_PATTERN = re.compile(_CELL)


def scalar(value: Any) -> str | None:
    """Returns the canonical form of one Python value: the readable twin of `canonical`.

    Raises:
        TypeError: The value is not a scalar.
    """
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, Decimal):
        return _decimal(value)
    if isinstance(value, datetime):
        return _moment(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, time):
        return value.replace(tzinfo=None).isoformat()
    if isinstance(value, timedelta):
        return _duration(value // timedelta(microseconds=1) * 1_000)
    raise TypeError(f"holds values of type {type(value).__name__}")


def cell(text: str) -> str | None:
    """Returns the text of a csv table as the value it stands for.

    `5.0` and `5.00` are the integer 5: programs write that way when the column once held a missing value. `True`,
    `TRUE` and `true` are the boolean; `nan` and `NaN` are a missing value. Every other text stays unchanged.
    """
    match = _CELL_PATTERN.fullmatch(text)
    if match is None:
        return text or None
    if match[1] is not None:
        return "0" if match[1] == "-0" else match[1]
    return None if text.lower() == "nan" else text.lower()


def cells(texts: pl.Series) -> pl.Series:
    """Returns (R,) String: `cell` of every text; see there."""
    special = texts.str.contains(_CELL)
    if not special.any():
        return texts
    whole = pl.col("text").str.extract(_CELL, 1)
    lower = pl.col("text").str.to_lowercase()
    read = (
        pl.when(~pl.col("special"))
        .then("text")
        .when(whole.is_not_null())
        .then(pl.when(whole == "-0").then(pl.lit("0")).otherwise(whole))
        .when(lower != "nan")
        .then(lower)
    )
    return pl.DataFrame({"text": texts, "special": special}).select(read).to_series().alias(texts.name)


def canonical(values: pl.Series, *, version: int = VERSION) -> pl.Series:
    """Returns scalars of one type, or lists of them, as text.

    Args:
        values: (R,) scalars or lists of scalars.
        version: Version of the canonical form: that of the bundle whose table is read.

    Returns:
        (R,) String, or (R,) List(String) without null elements if `values` holds lists.

    Raises:
        TypeError: The type is neither scalar nor a list of scalars.
    """
    if isinstance(values.dtype, pl.Array):
        values = values.arr.to_list()
    if isinstance(values.dtype, pl.List):
        return _lists(values, version)
    if values.dtype == pl.Object:
        return canonical_values(values.name, values.to_list(), version=version)
    # The commonest columns skip the query plan: a stream shapes small batches, whose plan costs more than its work.
    if values.dtype.is_integer():
        return values.cast(pl.String)
    if values.dtype == pl.String and not (values == "").any():
        return values
    if version == canonical_v1.VERSION:
        return canonical_v1.canonical(values)
    return _scalars(values)


def canonical_values(name: str, values: Sequence[Any], *, version: int = VERSION, of_csv: bool = False) -> pl.Series:
    """Returns Python values, as JSON has them and of any types together, as canonical text.

    Args:
        name: Name of the column.
        values: (R,) scalars, lists of scalars, or None.
        version: Version of the canonical form.
        of_csv: True if text comes from a csv table; see `cell`.

    Returns:
        (R,) String; or (R,) List(String) if there is a list, where a scalar is a list of one.

    Raises:
        TypeError: A value is neither scalar nor a list of scalars.
    """
    of_csv = of_csv and version != canonical_v1.VERSION
    types = set(map(type, values)) - {type(None)}
    if list in types:
        flat = [part for value in values for part in (value if type(value) is list else [value])]
        texts = iter(canonical_values(name, flat, version=version, of_csv=of_csv).to_list())
        lists = [
            [text for _ in value if (text := next(texts)) is not None] if type(value) is list else _single(next(texts))
            for value in values
        ]
        return pl.Series(name, lists, dtype=pl.List(pl.String))
    if types == {str}:
        found = pl.Series(name, values, dtype=pl.String)
        return canonical(cells(found) if of_csv else found, version=version)
    if types == {int}:
        return _whole_numbers(name, values)
    if version == canonical_v1.VERSION:
        return canonical_v1.canonical_values(name, values)
    texts_of = [cell(value) if of_csv and type(value) is str else scalar(value) for value in values]
    return pl.Series(name, texts_of, dtype=pl.String)


def _whole_numbers(name: str, values: Sequence[int | None]) -> pl.Series:
    found = whole_numbers(name, values)
    if found is not None:
        return found.cast(pl.String)
    return pl.Series(name, [None if value is None else str(value) for value in values], dtype=pl.String)


def whole_numbers(name: str, values: Sequence[int | None]) -> pl.Series | None:
    """Returns integers (R,) as Int64, or None if one of them does not fit."""
    try:
        return pl.Series(name, values, dtype=pl.Int64)
    except (OverflowError, TypeError):
        return None


def _single(text: str | None) -> list[str] | None:
    return None if text is None else [text]


def _lists(values: pl.Series, version: int) -> pl.Series:
    """Converts the elements to canonical text; each distinct place of the flat column goes back to its list."""
    lengths = values.list.len()
    flat = canonical(values.filter(lengths > 0).explode(), version=version)
    frame = pl.DataFrame({"row": pl.int_range(len(values), eager=True), "length": lengths})
    rows = frame.filter(pl.col("length") > 0).select(pl.col("row").repeat_by("length").explode()).to_series()
    grouped = (
        pl.DataFrame({"row": rows, "text": flat})
        .drop_nulls("text")
        .group_by("row", maintain_order=True)
        .agg(pl.col("text"))
    )
    joined = frame.join(grouped, on="row", how="left", maintain_order="left")
    empty = pl.lit([], dtype=pl.List(pl.String))
    return (
        joined.select(pl.when(pl.col("length").is_not_null()).then(pl.col("text").fill_null(empty)))
        .to_series()
        .alias(values.name)
    )


def _scalars(values: pl.Series) -> pl.Series:
    """Returns (R,) String of scalars of one type."""
    dtype, name = values.dtype, values.name
    if isinstance(dtype, (pl.Float32, pl.Float64)):
        return _floats(values).alias(name)
    if isinstance(dtype, pl.Decimal):
        return _decimals(values).alias(name)
    if isinstance(dtype, (pl.String, pl.Categorical, pl.Enum)):
        text = values.cast(pl.String)
        return text.set(text == "", None)
    if isinstance(dtype, (pl.Date, pl.Time, pl.Datetime, pl.Duration)):
        return _temporal(values).alias(name)
    if isinstance(dtype, (pl.Boolean, pl.Null)):
        return values.cast(pl.String)
    raise TypeError(f"holds values of type {dtype}")


def _floats(values: pl.Series) -> pl.Series:
    exact = values.cast(pl.Float64)
    whole = exact.is_finite() & (exact == exact.round())
    if isinstance(values.dtype, pl.Float32):
        exact = exact.zip_with(whole, values.cast(pl.String).cast(pl.Float64))
    small = whole & (exact.abs() < _INT64)
    texts = exact.set(~exact.is_finite(), None).cast(pl.String)
    texts = exact.set(~small, None).cast(pl.Int64).cast(pl.String).zip_with(small, texts)
    size = exact.abs()
    odd = exact.is_finite() & ~small & ((size < _PLAIN_FROM) | (size >= _PLAIN_TO))
    return _one_by_one(texts, exact, odd)


def _decimals(values: pl.Series) -> pl.Series:
    texts = values.cast(pl.String)
    plain = texts.str.replace(r"\.0*$", "").str.replace(r"(\.[0-9]*[1-9])0+$", "${1}").replace("-0", "0")
    odd = texts.str.contains(r"^-?0\.0000")
    return _one_by_one(plain, values, odd)


def _one_by_one(texts: pl.Series, values: pl.Series, where: pl.Series) -> pl.Series:
    """Replaces `texts` at a few places by the text of the readable twin."""
    if not where.any():
        return texts
    distinct = values.filter(where).unique()
    read = values.replace_strict(
        distinct, pl.Series(map(scalar, distinct), dtype=pl.String), default=None, return_dtype=pl.String
    )
    return read.zip_with(where, texts)


def _decimal(value: Decimal) -> str:
    if value == value.to_integral_value():
        return str(int(value))
    short = repr(float(value))
    return short if Decimal(short) == value else f"{value:f}".rstrip("0")


def _temporal(values: pl.Series) -> pl.Series:
    dtype = values.dtype
    if dtype == pl.Date:
        return values.cast(pl.String)
    if isinstance(dtype, pl.Duration):
        factor = {"ms": 1_000_000, "us": 1_000, "ns": 1}[dtype.time_unit]
        spans = [None if span is None else _duration(span * factor) for span in values.to_physical().to_list()]
        return pl.Series(spans, dtype=pl.String)
    zone = ""
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        values, zone = values.dt.convert_time_zone("UTC"), "Z"
    # Nine digits of a second; zeros after the sixth are left out, and so is a fraction of zero.
    clock = "%H:%M:%S%.9f"
    texts = values.dt.strftime(clock if dtype == pl.Time else f"%Y-%m-%dT{clock}")
    texts = texts.str.replace(r"\.0{9}$", "").str.replace(r"(\.[0-9]{6})000$", "${1}")
    return texts + zone if zone else texts


def _moment(value: datetime) -> str:
    if value.tzinfo is None:
        return value.isoformat()
    return value.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"


def _duration(span_ns: int) -> str:
    """Formats a duration as ISO 8601: days, then non-zero hours, minutes and seconds; "-" first if negative."""
    sign, rest = ("-", -span_ns) if span_ns < 0 else ("", span_ns)
    seconds, ns = divmod(rest, 1_000_000_000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    fraction = f".{ns:09d}".rstrip("0") if ns else ""
    clock = "".join(f"{number}{unit}" for number, unit in ((hours, "H"), (minutes, "M")) if number)
    clock += f"{seconds}{fraction}S" if seconds or fraction or not (clock or days) else ""
    return f"{sign}P{f'{days}D' if days else ''}{f'T{clock}' if clock else ''}"
