"""Puts an export into Redis as plain hashes that any client reads, in any language.

    tessera:{features:NAME}:current                  id of the newest whole export
    tessera:{features:NAME}:ID:schema                schema of that export, JSON
    tessera:{features:NAME}:ID:items:ITEM            hash: a field for each column
    tessera:{features:NAME}:ID:users:USER
    tessera:{features:NAME}:ID:histories:USER

`current` changes last, so a reader never meets half an export, and vectors of two encoders never mix. The export before
stays until the next one, so a reader may keep an id for a while. Examples are not put: they are for training.

A field holds text: a number in decimal, true or false as 1 or 0, a time in ISO 8601, a list as JSON. A list of D
float32 is D little-endian float32 numbers, as Redis's vector search reads them. A null has no field.
"""

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as arrow_dataset

from features.errors import TesseraError
from models.export.schema import ExportColumn, ExportTable, read_schema
from serving.store.page import key_of
from serving.store.redis.commands import RedisCommands

_ROWS: Final = 512
_SCANNED: Final = 1_000
_LEFT_OUT: Final = ("examples",)

Progress = Callable[[int, int], None]


def features_key(name: str, *parts: str) -> str:
    """Returns the key of a part of a dataset's exports, such as `features_key("shop", "current")`."""
    return key_of(f"features:{name}", ":".join(parts)).decode()


def push_export(address: str, export: Path, *, progress: Progress = lambda done, total: None) -> int:
    """Puts the items, users and histories of an export into Redis, then makes the export the current one.

    A push that was interrupted leaves the export before as the current one; the next push removes the remains.

    Args:
        address: See `serving.store.redis.servers.open_servers`.
        export: Directory of the export.
        progress: Called with the hashes written and all hashes.

    Returns:
        Number of hashes.

    Raises:
        TesseraError: The directory holds no export, or a damaged one.
        StoreError: The server fails.
    """
    schema = read_schema(export)
    tag = f"features:{schema.name}"
    current = features_key(schema.name, "current")
    tables = {name: table for name, table in schema.tables.items() if name not in _LEFT_OUT}
    total, done = sum(table.rows for table in tables.values()), 0
    commands = RedisCommands(address)
    try:
        for name, table in tables.items():
            prefix = features_key(schema.name, schema.id, name)
            for rows in _batches(export / name, table):
                commands.each(tag, [_command(prefix, table, row) for row in rows])
                done += len(rows)
                progress(done, total)
        commands.command(tag, "SET", features_key(schema.name, schema.id, "schema"), msgspec.json.encode(schema))
        before = commands.command(tag, "GET", current)
        commands.command(tag, "SET", current, schema.id)
        _remove(commands, schema.name, {schema.id, (before or b"").decode()})
    finally:
        commands.close()
    return done


def _batches(directory: Path, table: ExportTable) -> Iterator[list[dict[str, Any]]]:
    names = [column.name for column in table.columns]
    try:
        for batch in arrow_dataset.dataset(directory, format="parquet").to_batches(columns=names, batch_size=_ROWS):
            if batch.num_rows:
                yield batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise TesseraError(f"{directory}: the export cannot be read ({error}); export again") from error


def _command(prefix: str, table: ExportTable, row: dict[str, Any]) -> tuple[Any, ...]:
    words: list[Any] = ["HSET", ":".join((prefix, *(row[key] for key in table.keys)))]
    for column in table.columns:
        if row[column.name] is not None:
            words += [column.name, _field(row[column.name], column)]
    return tuple(words)


def _field(value: Any, column: ExportColumn) -> str | bytes:
    if column.dtype == "float32" and column.shape and column.shape[0] is not None:
        return np.asarray(value, dtype="<f4").tobytes()
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value if isinstance(value, bytes) else str(value)


def _remove(commands: RedisCommands, name: str, kept: set[str]) -> None:
    """Removes all exports of a dataset except some."""
    tag, every = f"features:{name}", features_key(name, "e-*")
    start = len(features_key(name, ""))
    cursor = 0
    while True:
        cursor, keys = commands.command(tag, "SCAN", cursor, "MATCH", every, "COUNT", _SCANNED)
        old = [key for key in keys if key.decode()[start:].partition(":")[0] not in kept]
        if old:
            commands.command(tag, "UNLINK", *old)
        if not int(cursor):
            return
