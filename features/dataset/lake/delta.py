"""Delta Lake tables, read by delta-rs (https://github.com/delta-io/delta, protocol)."""

from functools import partial
from pathlib import Path
from typing import Any

from features.dataset.lake.snapshot import AskedTable, TableSnapshot, missing_package, unreadable, utc, write_batches


def find_delta(asked: AskedTable) -> TableSnapshot:
    """Returns the version that is asked for: a version number, the newest at a time, or the newest.

    Raises:
        DatasetError: There is no such table or version, or a feature of the table is unknown; names it.
        TesseraError: delta-rs is not installed.
    """
    try:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError
    except ImportError as error:
        raise missing_package(asked, error) from error
    try:
        if isinstance(asked.as_of, int):
            table = DeltaTable(asked.address, version=asked.as_of)
        else:
            table = DeltaTable(asked.address)
            if asked.as_of is not None:
                table.load_as_version(utc(asked.as_of))
    except (DeltaError, OSError, ValueError) as error:
        raise unreadable(asked, error, "fix path, or as_of: a version or a time") from error
    return TableSnapshot(str(table.version()), partial(_write, asked, table))


def _write(asked: AskedTable, table: Any, path: Path) -> None:
    from deltalake.exceptions import DeltaError

    try:
        # polars would look for the files under a name in which letters outside of ASCII are escaped.
        write_batches(table.to_pyarrow_dataset().scanner().to_reader(), path)
    except (DeltaError, OSError, ValueError) as error:
        raise unreadable(asked, error, "check the table's files and protocol") from error
