"""Version 1 of the canonical form, for bundles that were trained with it.

It differs from version 2 (`features.value.canonical`) in these values: a number that is not whole has the text that
polars writes ("0.00001", not "1e-05"), a whole float of 2**53 or more has an exponent ("1e+16"), a decimal goes through
float64, and datetimes have a space and six digits of a second ("2026-01-31 08:00:00.000000").

Under the releases that wrote version 1, the column decided: true beside 5 was "1", and a large integer beside a
fraction lost its last digits. Here each value has the text it had alone, as those bundles met in nearly every message.
"""

from collections.abc import Sequence
from typing import Any

import polars as pl

VERSION = 1
_EXACT = 2**53


def canonical(values: pl.Series) -> pl.Series:
    """Returns scalars of one type as (R,) String; "" and NaN are null.

    Raises:
        TypeError: The type is not scalar.
    """
    return values.to_frame("value").select(_text(pl.col("value"), values.dtype)).to_series().alias(values.name)


def canonical_values(name: str, values: Sequence[Any]) -> pl.Series:
    """Returns scalars as JSON has them, (R,) String: each has the text it had in a message alone.

    Raises:
        TypeError: A value is not a scalar.
    """
    texts: list[str | None] = [None] * len(values)
    for kind in set(map(type, values)) - {type(None)}:
        places = [place for place, value in enumerate(values) if type(value) is kind]
        found = [values[place] for place in places]
        text = list(map(str, found)) if kind is int else canonical(pl.Series(found)).to_list()
        for place, value in zip(places, text, strict=True):
            texts[place] = value
    return pl.Series(name, texts, dtype=pl.String)


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
    if isinstance(dtype, pl.DataType) and (dtype.is_temporal() or isinstance(dtype, (pl.Boolean, pl.Decimal, pl.Null))):
        return value.cast(pl.String)
    raise TypeError(f"holds values of type {dtype}")
