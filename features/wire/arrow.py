"""Reads and writes Arrow batches: messages of many rows, column by column.

A message is an Arrow IPC stream or file. A value means what it means in a parquet file: the columns become those that
JSON messages of the same rows have (`features.value.mixed_column.wire`).
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from pyarrow import ipc

from features.errors import EventError
from features.value.mixed_column import column_of, wire
from features.wire.fields import DeclaredFields, Kinds

MAGICS = (b"\xff\xff\xff\xff", b"ARROW1\0\0")
"""First bytes of an IPC stream, and of an IPC file."""
MOST_ROWS = 10_000
"""Largest number of rows of a message."""
_FAULTS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, NotImplementedError)
_OWN = ("_schema", "_event_id", "_version", "_deleted", "_backfill")


@dataclass(frozen=True)
class DecodedBatch:
    """Rows of one message, by column.

    Attributes:
        frame: (R rows) the declared columns, in the order of `Decoder.columns`, as JSON messages carry them.
        places: (R,) position of each row in the message.
        refused: Reason of each other row, by its position in the message.
        event_ids, versions, deleted, backfill: (R,) as in `Decoded`.
    """

    frame: pl.DataFrame
    places: list[int]
    refused: dict[int, str]
    event_ids: list[str | int | None]
    versions: list[int | None]
    deleted: list[bool]
    backfill: list[bool]


def is_batch(data: bytes) -> bool:
    """Returns whether a message is an Arrow batch, by its first bytes."""
    return data.startswith(MAGICS)


def row_count(data: bytes) -> int:
    """Returns the number of rows of a batch without reading values. A batch that cannot be read counts as one row."""
    try:
        rows: int = sum(batch.num_rows for batch in _batches(data))
        return max(1, rows)
    except _FAULTS:
        return 1


def decode_batch(data: bytes, fields: DeclaredFields, *, wire_version: int) -> DecodedBatch:
    """Decodes a batch.

    Args:
        data: The message.
        fields: Columns of the table.
        wire_version: Expected value of `_schema`.

    Raises:
        EventError: The bytes are no batch, or its columns are not those that the table declares.
    """
    table = _table(data, fields.table)
    held = {name: _kinds(dtype) for name, dtype in zip(table.schema.names, table.schema.types, strict=True)}
    if (problem := fields.misfit(held, {})) is not None:
        raise EventError(f"{fields.table} message: the Arrow batch {problem}")
    sent = _columns(table, fields)
    own = {name: sent.get(name) for name in _OWN}
    if (schema := own["_schema"]) is not None and not (schema.drop_nulls() == wire_version).all():
        raise EventError(
            f"{fields.table} message: _schema {schema.to_list()[:3]}, this release reads {wire_version}",
            cause="unknown-version",
        )
    frame = pl.DataFrame([sent[name] for name in fields.columns])
    missing = {name: frame[name].is_null() for name in fields.required if frame[name].null_count()}
    refused: dict[int, str] = {}
    for name, null in missing.items():
        for place in null.arg_true().to_list():
            refused.setdefault(
                place, f"{fields.table} message: column {name!r} is null in row {place + 1} of the batch"
            )
    kept = np.ones(table.num_rows, dtype=np.bool_)
    kept[list(refused)] = False

    def values(name: str, default: Any) -> list[Any]:
        column = own[name]
        if column is None:
            return [default] * int(kept.sum())
        found = (column if default is None else column.fill_null(default)).to_list()
        return found if not refused else [value for value, keep in zip(found, kept.tolist(), strict=True) if keep]

    return DecodedBatch(
        frame=frame if not refused else frame.filter(pl.Series(kept)),
        places=np.flatnonzero(kept).tolist(),
        refused=refused,
        event_ids=values("_event_id", None),
        versions=values("_version", None),
        deleted=values("_deleted", False),
        backfill=values("_backfill", False),
    )


def take_rows(data: bytes, places: Sequence[int]) -> bytes:
    """Returns a batch with some rows of a batch, in order.

    Args:
        data: A message that `decode_batch` reads.
        places: Positions of the rows.
    """
    table = _table(data, "events")
    return _stream(table.take(pa.array(places, type=pa.int64())))


def encode_batch(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Encodes JSON objects as a batch. A field that an object lacks is null.

    Raises:
        ValueError: A field holds an object.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        columns = [column_of(name, [row.get(name) for row in rows]) for name in names]
    except TypeError as error:
        raise ValueError(f"a field {error}") from error
    return _stream(pl.DataFrame(columns).to_arrow(compat_level=pl.CompatLevel.oldest()))


def _stream(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _batches(data: bytes) -> list[Any]:
    buffer = pa.py_buffer(data)
    if data.startswith(MAGICS[1]):
        file = ipc.open_file(buffer)
        return [file.get_batch(number) for number in range(file.num_record_batches)]
    return list(ipc.open_stream(buffer))


def _table(data: bytes, name: str) -> pa.Table:
    """Reads a batch and checks that every offset and every text of it is valid."""
    try:
        buffer = pa.py_buffer(data)
        table = (ipc.open_file if data.startswith(MAGICS[1]) else ipc.open_stream)(buffer).read_all()
        table.validate(full=True)
        if len(set(table.schema.names)) != len(table.schema.names):
            raise ValueError("two columns have one name")
    except _FAULTS as error:
        raise EventError(f"{name} message: no Arrow batch: {error}", cause="undecodable") from error
    if table.num_rows > MOST_ROWS:
        raise EventError(
            f"{name} message: {table.num_rows} rows, at most {MOST_ROWS} are read from a batch", cause="oversized"
        )
    return table


def _columns(table: pa.Table, fields: DeclaredFields) -> dict[str, pl.Series]:
    names = [name for name in (*fields.columns, *_OWN) if name in table.schema.names]
    try:
        frame: Any = pl.from_arrow(table.select(names))
        return {values.name: _as_sent(values, vector=values.name in fields.vectors) for values in frame}
    except (*_FAULTS, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise EventError(f"{fields.table} message: the Arrow batch cannot be read: {error}") from error


def _as_sent(values: pl.Series, *, vector: bool) -> pl.Series:
    """Returns a column as JSON messages carry it: integers of 64 bits, numbers that are finite, text, booleans."""
    if vector:
        return values.cast(pl.List(pl.Float64))
    values = wire(values)
    if values.dtype.is_float():
        # A null is no finite number here, and `set` keeps it. NumPy takes a tenth of the time of a polars expression.
        return values if np.isfinite(values.to_numpy()).all() else values.set(~values.is_finite(), None)
    if values.dtype.is_integer() and values.dtype != pl.Int64:
        most = values.max()
        wide = values.dtype == pl.UInt64 and isinstance(most, int) and most >= 2**63
        return values if wide else values.cast(pl.Int64)
    return values


@lru_cache(maxsize=256)
def _kinds(dtype: Any) -> Kinds:
    types = pa.types
    if types.is_dictionary(dtype):
        return _kinds(dtype.value_type)
    if types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype):
        inner = _kinds(dtype.value_type) - {"null"}
        return frozenset("other" if kind == "other" or kind.startswith("list") else f"list of {kind}" for kind in inner)
    checks = {
        "null": types.is_null,
        "text": lambda found: (
            types.is_string(found)
            or types.is_large_string(found)
            or types.is_string_view(found)
            # Times and dates are text in JSON.
            or (types.is_temporal(found) and not types.is_interval(found))
        ),
        "integer": types.is_integer,
        "number": lambda found: types.is_floating(found) or types.is_decimal(found),
        "boolean": types.is_boolean,
    }
    return frozenset(kind for kind, check in checks.items() if check(dtype)) or frozenset({"other"})
