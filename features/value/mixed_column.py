"""Columns of values that differ in type: each value is kept exactly, whatever the other values are.

A polars column has one type, and the common type of two is often lossy: an integer of 19 digits becomes a float beside
0.5, true becomes 1 beside 5. If no type holds all values of a column, they become canonical text.
Shape letter: R, rows.
"""

from collections.abc import Sequence
from typing import Any

import polars as pl

from features.value.canonical import canonical, canonical_values, scalar, whole_numbers

_EXACT = 2**53  # up to it a float64 holds every integer


def column_of(name: str, values: Sequence[Any], *, split: str | None = None) -> pl.Series:
    """Returns Python values as a column that keeps each exactly: typed if one type holds them all, else text.

    Args:
        name: Name of the column.
        values: (R,) scalars, lists of scalars, or None.
        split: Separator of a multi-valued column; it splits text beside lists.

    Raises:
        TypeError: A value is neither scalar nor a list of scalars.
    """
    types = set(map(type, values)) - {type(None)}
    if not types:
        return pl.Series(name, values, dtype=pl.Null)
    if types == {list}:
        inner = column_of("", [part for value in values if value for part in value])
        if inner.dtype == pl.Float64:
            values = [value and [None if part is None else float(part) for part in value] for value in values]
        elif inner.dtype == pl.String:
            return canonical_values(name, values)
        return pl.Series(name, values, dtype=pl.List(inner.dtype))
    if list in types and split is not None:
        values = [
            value if value is None or type(value) is list else split_text(scalar(value), split) for value in values
        ]
    if types <= {int, float} and float in types:
        if all(type(value) is not int or -_EXACT <= value <= _EXACT for value in values):
            return pl.Series(name, [None if value is None else float(value) for value in values], dtype=pl.Float64)
    elif types == {int}:
        if (found := whole_numbers(name, values)) is not None:
            return found
        try:
            return pl.Series(name, values, dtype=pl.UInt64)
        except (OverflowError, TypeError):
            pass
    elif types in ({str}, {bool}):
        return pl.Series(name, values, dtype=pl.String if types == {str} else pl.Boolean)
    return canonical_values(name, values)


def split_text(text: str | None, separator: str) -> list[str]:
    """Returns the parts of a multi-valued text, trimmed, without the empty ones."""
    return [] if text is None else [part.strip() for part in text.split(separator) if part.strip()]


def joined(parts: Sequence[pl.Series]) -> pl.Series:
    """Returns the parts of a column one after another: typed if one type holds them all exactly, else text.

    Raises:
        TypeError: The parts differ in type and one holds neither scalars nor lists of scalars.
    """
    types = {part.dtype for part in parts} - {pl.Null()}
    if len(types) <= 1:
        return pl.concat([part.cast(dtype) for part in parts for dtype in types or {pl.Null()}])
    if all(dtype.is_integer() for dtype in types) or types <= {pl.String(), pl.Categorical()}:
        return pl.concat([part.to_frame() for part in parts], how="vertical_relaxed").to_series()
    if all(dtype.is_integer() or dtype.is_float() for dtype in types) and not any(map(_beyond_float, parts)):
        return pl.concat([_float64(part) for part in parts])
    texts = [canonical(part) for part in parts]
    if any(part.dtype == pl.List for part in texts):
        texts = [part if part.dtype == pl.List else _listed(part) for part in texts]
    return pl.concat(texts)


def wire(values: pl.Series) -> pl.Series:
    """Returns values as a message carries them, so that a message means the same as the file.

    Dates, times and decimals become canonical text; a float32 becomes the float64 of its shortest decimal.
    """
    dtype = values.dtype
    if isinstance(dtype, (pl.List, pl.Array)):
        inner: Any = dtype.inner
        as_is = inner.is_integer() or inner in (pl.Float64, pl.String, pl.Boolean, pl.Null)
        return values if as_is else canonical(values)
    if isinstance(dtype, pl.Float32):
        return _float64(values)
    if isinstance(dtype, pl.Decimal) or dtype.is_temporal():
        return canonical(values)
    return values.cast(pl.String) if isinstance(dtype, (pl.Categorical, pl.Enum)) else values


def _beyond_float(values: pl.Series) -> bool:
    if not values.dtype.is_integer():
        return False
    least, most = values.min(), values.max()
    return any(isinstance(bound, int) and abs(bound) > _EXACT for bound in (least, most))


def _float64(values: pl.Series) -> pl.Series:
    exact = values.cast(pl.Float64)
    if values.dtype != pl.Float32:
        return exact
    whole = exact == exact.round()
    return exact.zip_with(whole, values.cast(pl.String).cast(pl.Float64))


def _listed(values: pl.Series) -> pl.Series:
    return pl.select(pl.when(values.is_not_null()).then(values.reshape((-1, 1)).arr.to_list())).to_series()
