"""Types of exported columns: those that Spark, DuckDB, pandas and Feast all read.

Unsigned and short integers are widened. Lists of one length are lists in the files, since some readers turn whole
numbers into fractions where such a list is null; the schema file gives the length.
"""

from typing import TypeAlias

import polars as pl
import pyarrow as pa
from polars.datatypes import DataTypeClass

from features.errors import TesseraError

PlType: TypeAlias = pl.DataType | DataTypeClass
TIMESTAMP = pl.Datetime("us", "UTC")
_NAMES: dict[PlType, str] = {
    pl.String: "string",
    pl.Boolean: "bool",
    pl.Int32: "int32",
    pl.Int64: "int64",
    pl.Float32: "float32",
    pl.Float64: "float64",
    pl.Binary: "binary",
    TIMESTAMP: "timestamp",
}
_WIDER: dict[PlType, PlType] = {
    pl.Int8: pl.Int32,
    pl.Int16: pl.Int32,
    pl.UInt8: pl.Int32,
    pl.UInt16: pl.Int32,
    pl.UInt32: pl.Int64,
    pl.UInt64: pl.Int64,
    pl.Int128: pl.Int64,
    pl.Decimal: pl.Float64,
    pl.Date: TIMESTAMP,
    pl.Datetime: TIMESTAMP,
    pl.Time: pl.String,
    pl.Categorical: pl.String,
    pl.Enum: pl.String,
    pl.Null: pl.String,
}


def described(dtype: PlType) -> tuple[str, list[int | None]]:
    """Returns the name and the shape of a type of the frame, as `ExportColumn` has them.

    Raises:
        ValueError: The type cannot be exported.
    """
    if isinstance(dtype, pl.Array):
        name, inner = described(dtype.inner)
        return name, [dtype.size, *inner]
    if isinstance(dtype, pl.List):
        name, inner = described(dtype.inner)
        return name, [None, *inner]
    return _NAMES[_plain(dtype)], []


def to_arrow(frame: pl.DataFrame, table: str) -> pa.Table:
    """Returns a frame with the types of an export.

    Raises:
        TesseraError: A column's type or a value cannot be exported; names table and column.
    """
    columns: list[pl.Expr] = []
    for name, dtype in frame.schema.items():
        try:
            columns.append(pl.col(name).cast(_plain(dtype), strict=True))
        except ValueError as error:
            raise TesseraError(
                f"table {table}, column {name!r}: {error}; remove the column from the descriptor, or write it as text"
            ) from error
    try:
        found = frame.select(columns).to_arrow(compat_level=pl.CompatLevel.oldest())
    except pl.exceptions.PolarsError as error:
        raise TesseraError(
            f"table {table}: a value does not fit the type of its export: {error}; remove the column from the "
            "descriptor, or write it as text"
        ) from error
    return found.cast(pa.schema([pa.field(field.name, _small(field.type)) for field in found.schema]))


def _plain(dtype: PlType) -> PlType:
    if isinstance(dtype, (pl.Array, pl.List)):
        return pl.List(_plain(dtype.inner))
    for known in (dtype, dtype.base_type()):
        if known in _NAMES:
            return known
        if known in _WIDER:
            return _WIDER[known]
    raise ValueError(f"the type {dtype} cannot be exported")


def _small(dtype: pa.DataType) -> pa.DataType:
    """Returns the arrow type with 32-bit offsets, which all readers know."""
    if pa.types.is_large_string(dtype):
        return pa.string()
    if pa.types.is_large_binary(dtype):
        return pa.binary()
    return pa.list_(_small(dtype.value_type)) if pa.types.is_large_list(dtype) else dtype
