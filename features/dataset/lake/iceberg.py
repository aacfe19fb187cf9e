"""Iceberg tables, read by pyiceberg (https://iceberg.apache.org/spec)."""

from functools import partial
from pathlib import Path
from typing import Any

from features.dataset.lake.snapshot import (
    AskedTable,
    AsOf,
    TableSnapshot,
    missing_package,
    unreadable,
    utc,
    write_batches,
)
from features.errors import DatasetError


def find_iceberg(asked: AskedTable) -> TableSnapshot:
    """Returns the snapshot that is asked for: a snapshot id, the newest at a time, or the newest.

    The address is a metadata file, or a table of a catalog that pyiceberg's own configuration describes.

    Raises:
        DatasetError: There is no such table, snapshot or catalog, or the table has no snapshot yet; names it.
        TesseraError: pyiceberg is not installed.
    """
    try:
        from pyiceberg.catalog import load_catalog
        from pyiceberg.table import StaticTable
    except ImportError as error:
        raise missing_package(asked, error) from error
    try:
        if asked.catalog is not None:
            table: Any = load_catalog(asked.catalog).load_table(asked.address)
        else:
            table = StaticTable.from_metadata(asked.address)
    except Exception as error:
        # Each catalog and file system raises errors of its own.
        raise unreadable(
            asked, error, "fix path: a metadata file, or a table of the catalog that catalog names"
        ) from error
    chosen = _snapshot(asked, table)
    return TableSnapshot(str(chosen), partial(_write, asked, table, chosen))


def _snapshot(asked: AskedTable, table: Any) -> int:
    newest = table.current_snapshot()
    if newest is None:
        raise DatasetError(f"{asked.where} has no snapshot; write rows to the table first")
    if asked.as_of is None:
        return int(newest.snapshot_id)
    if isinstance(asked.as_of, int):
        if table.snapshot_by_id(asked.as_of) is None:
            raise DatasetError(f"{asked.where}: as_of = {asked.as_of}: no such snapshot; {_there_are(table)}")
        return asked.as_of
    return _at(asked, table, asked.as_of)


def _at(asked: AskedTable, table: Any, moment: AsOf) -> int:
    assert not isinstance(moment, int)
    limit = utc(moment).timestamp() * 1_000
    before = [entry for entry in table.history() if entry.timestamp_ms <= limit]
    if not before:
        raise DatasetError(f"{asked.where}: as_of = {moment.isoformat()}: no snapshot is that old; {_there_are(table)}")
    return int(max(before, key=lambda entry: entry.timestamp_ms).snapshot_id)


def _there_are(table: Any) -> str:
    return f"there are: {', '.join(str(entry.snapshot_id) for entry in table.history()[-10:])}"


def _write(asked: AskedTable, table: Any, snapshot: int, path: Path) -> None:
    try:
        write_batches(table.scan(snapshot_id=snapshot).to_arrow_batch_reader(), path)
    except Exception as error:
        # As in `find_iceberg`.
        raise unreadable(asked, error, "check the table's files") from error
