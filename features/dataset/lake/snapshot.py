"""A snapshot of a table that is no file: its name, and its rows written as one parquet file.

Each kind of table finds the snapshot that the descriptor asks for, and writes its rows batch by batch. Nothing here
holds a whole table in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from features.errors import DatasetError, TesseraError

AsOf = int | datetime
"""Snapshot id or version, or the time at which the snapshot was the newest."""


@dataclass(frozen=True)
class AskedTable:
    """Table as the descriptor names it.

    Attributes:
        where: Address and table of the descriptor, for errors.
        address: Absolute path, address, or name in the catalog.
        as_of: Snapshot to read; None for the newest.
        query: SQL whose rows are the table.
        catalog: Name of the Iceberg catalog.
    """

    where: str
    address: str
    as_of: AsOf | None = None
    query: str | None = None
    catalog: str | None = None


@dataclass(frozen=True)
class TableSnapshot:
    """Rows of a table at one moment.

    Attributes:
        version: Name of the snapshot: a version, an id, or the digest of a query.
        write: Writes the rows as a parquet file.
        lasting: True if a version has the same rows for ever.
    """

    version: str
    write: Callable[[Path], None]
    lasting: bool = True


def write_batches(batches: Any, path: Path) -> None:
    """Writes a stream of Arrow batches as one parquet file; holds one batch at a time.

    Args:
        batches: A `pyarrow.RecordBatchReader`.
        path: The file.
    """
    from pyarrow.parquet import ParquetWriter

    with ParquetWriter(path, batches.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def utc(moment: datetime) -> datetime:
    """Returns the moment with an offset; without an offset it is UTC."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def missing_package(asked: AskedTable, error: ImportError) -> TesseraError:
    """Returns the error to raise where a package of the extra `lake` is not installed."""
    return TesseraError(f"{asked.where} needs the package {error.name}; pip install 'tessera[lake]'")


def unreadable(asked: AskedTable, error: BaseException, remedy: str) -> DatasetError:
    """Returns the error to raise where a table cannot be read."""
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DatasetError(f"{asked.where} cannot be read ({words}); {remedy}")
