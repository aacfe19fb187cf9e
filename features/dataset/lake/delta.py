"""Delta Lake tables, read by delta-rs and polars (https://github.com/delta-io/delta, protocol)."""

from functools import partial
from pathlib import Path

from features.dataset.lake.snapshot import AskedTable, TableSnapshot, missing_package, unreadable, utc


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
    return TableSnapshot(str(table.version()), partial(_write, asked, table.version()))


def _write(asked: AskedTable, version: int, path: Path) -> None:
    import polars as pl
    from deltalake.exceptions import DeltaError

    try:
        pl.scan_delta(asked.address, version=version).sink_parquet(path, maintain_order=True)
    except (DeltaError, OSError, ValueError, NotImplementedError, pl.exceptions.PolarsError) as error:
        raise unreadable(asked, error, "check the table's files and protocol") from error
