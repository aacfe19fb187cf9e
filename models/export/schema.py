"""Schema of an export: each table and column with its type, shape and meaning, and the models behind its values.

The schema is the file `schema.json` of an export. A reader needs no other file to know the columns.
"""

import hashlib
from pathlib import Path

import msgspec

from features.durable import write_file
from features.errors import TesseraError
from features.storage.location import Location

SCHEMA = "schema.json"
FORMAT = 1
EVENT_TIMESTAMP = "event_timestamp"
"""Column of the time from which a row is valid, where the events have a clock."""


class ExportColumn(msgspec.Struct, frozen=True):
    """Column of an exported table.

    Attributes:
        name: Name in the parquet files.
        dtype: Type of a value, or of the elements of a list: string, bool, int32, int64, float32, float64, binary or
            timestamp (microseconds since 1970, UTC).
        shape: `[]` for one value, `[D]` for lists of one length, `[null]` for lists of any length.
        meaning: Content of the column, in a sentence.
        models: Ids of the models that computed the values, by kind: `encoder`, `codebook`, `tokens`.
    """

    name: str
    dtype: str
    shape: list[int | None]
    meaning: str
    models: dict[str, str] = {}


class Partitioning(msgspec.Struct, frozen=True):
    """Partitioning of an exported table into directories `COLUMN=VALUE`.

    Attributes:
        column: Name of the column. The files do not hold the column.
        meaning: Rule from a row to its partition.
    """

    column: str
    meaning: str


class ExportTable(msgspec.Struct, frozen=True):
    """Exported table.

    Attributes:
        rows: Number of rows.
        keys: Columns of the entities' ids.
        timestamp: Column of the time from which a row is valid. None if the events have no clock.
        partitioning: Division into directories.
        columns: Columns of the files, in their order.
    """

    rows: int
    keys: list[str]
    timestamp: str | None
    partitioning: Partitioning
    columns: list[ExportColumn]


class ExportSchema(msgspec.Struct, frozen=True):
    """Content of `schema.json`.

    Attributes:
        format: Version of the format.
        id: Hash of all other fields. Exports of the same run or bundle with the same partitioning have equal ids.
        name: Name of the dataset.
        source: Ids of what was exported: `bundle`, `frame` (key of the run's stage), `encoder`, `codebook`, `tokens`.
        tables: Exported tables by name, which is the name of their directory.
    """

    format: int
    id: str
    name: str
    source: dict[str, str]
    tables: dict[str, ExportTable]


def identified(schema: ExportSchema) -> ExportSchema:
    """Returns the schema with its id."""
    content = msgspec.json.encode(msgspec.structs.replace(schema, id=""), order="sorted")
    return msgspec.structs.replace(schema, id=f"e-{hashlib.sha256(content).hexdigest()[:16]}")


def write_schema(schema: ExportSchema, directory: Path) -> None:
    """Writes the schema file of an export."""
    write_file(directory / SCHEMA, msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n")


def read_schema(directory: Location) -> ExportSchema:
    """Reads the schema file of an export.

    Raises:
        TesseraError: The directory holds no export, or an export of another format.
    """
    path = directory / SCHEMA
    try:
        found = msgspec.json.decode(path.read_bytes(), type=ExportSchema)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TesseraError(f"{path}: {directory} holds no export ({error}); make one with `tessera export`") from error
    if found.format != FORMAT:
        raise TesseraError(f"{path}: format {found.format}, this release reads {FORMAT}; export again")
    return found
