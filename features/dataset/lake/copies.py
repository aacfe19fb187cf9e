"""Copies of tables: each as one parquet file, made once for a descriptor that was read.

All readers of files then read tables too: slices, jobs, hashes of the inputs, errors with a row. A descriptor that was
read names one snapshot of each table, however often and wherever the table is read afterwards.
"""

import secrets
from pathlib import Path

from features.dataset.lake.delta import find_delta
from features.dataset.lake.iceberg import find_iceberg
from features.dataset.lake.snapshot import AskedTable
from features.dataset.lake.sql import find_query
from features.dataset.source import TableCopy, TableSource
from features.storage.copy import made_once
from features.storage.location import absolute, locate, refuse_password

_FIND = {"delta": find_delta, "iceberg": find_iceberg, "sql": find_query}


def table_copy(source: TableSource, directory: Path, table: str) -> TableCopy:
    """Returns the copy of a table; the first call makes the copy.

    Args:
        source: Declaration of the table.
        directory: Directory to which a path is relative.
        table: items, users or events; named in errors.

    Raises:
        DatasetError: The table, its snapshot or its rows cannot be read; names the table.
        TesseraError: A package is not installed, or the address holds a password.
    """
    if source.copy_of_table is not None:
        return source.copy_of_table
    refuse_password(source.path)
    elsewhere = source.catalog is not None or "://" in source.path
    address = source.path if elsewhere else str(absolute(locate(source.path, directory)))
    asked = AskedTable(f"{address}: [{table}]", address, source.as_of, source.query, source.catalog)
    found = _FIND[str(source.format)](asked)
    name = f"{Path(source.path).name}@{found.version}"
    # Rows of a query may change: each descriptor that is read asks the database again.
    once = "" if found.lasting else secrets.token_hex(8)
    made = made_once(
        (source.format, address, found.version, once), lambda place: found.write(place / f"{name}.parquet")
    )
    copy = TableCopy(made / f"{name}.parquet", f"{source.path}@{found.version}")
    source.pin(copy)
    return copy
