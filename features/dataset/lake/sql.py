"""Rows of an SQL query, read by the database's ADBC driver (https://arrow.apache.org/adbc)."""

import hashlib
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from features.dataset.lake.snapshot import AskedTable, TableSnapshot, missing_package, unreadable, write_batches
from features.errors import DatasetError

_FILES = {".duckdb": "duckdb", ".sqlite": "sqlite", ".sqlite3": "sqlite", ".db": "sqlite"}
_SERVERS = ("postgresql", "snowflake", "flightsql")
Connect = Callable[[str], Any]


def find_query(asked: AskedTable) -> TableSnapshot:
    """Returns the rows of the query as they are when they are written.

    The address is a file of DuckDB or SQLite, which is opened for reading alone, or an address whose protocol names an
    ADBC driver. A server's driver reads credentials from its own environment.

    Raises:
        DatasetError: The address names no known database, or the file is missing.
        TesseraError: The database's driver is not installed.
    """
    protocol, mark, _ = asked.address.partition("://")
    name = protocol if mark else _FILES.get(Path(asked.address).suffix.lower(), "")
    if name not in (_SERVERS if mark else _FILES.values()):
        raise DatasetError(
            f"{asked.where} names no database; expected a file that ends in {', '.join(_FILES)}, or an address such as "
            f"{_SERVERS[0]}://host/name"
        )
    if not mark and not Path(asked.address).is_file():
        raise DatasetError(f"{asked.where} no such file; fix path")
    try:
        connect = _driver(name)
    except ImportError as error:
        raise missing_package(asked, error) from error
    digest = hashlib.sha256(f"{asked.address}\n{asked.query}".encode()).hexdigest()[:12]
    return TableSnapshot(f"query-{digest}", partial(_write, asked, connect), lasting=False)


def _driver(name: str) -> Connect:
    """Returns what opens an address of a database.

    Raises:
        ImportError: The driver is not installed.
    """
    driver = importlib.import_module(f"adbc_driver_{name}")
    opened = importlib.import_module("adbc_driver_manager.dbapi").connect
    if name == "duckdb":
        library = {"driver": driver.driver_path(), "entrypoint": "duckdb_adbc_init"}
        return lambda address: opened(**library, db_kwargs={"path": address, "access_mode": "READ_ONLY"})
    by_address = importlib.import_module(f"adbc_driver_{name}.dbapi").connect
    if name == "sqlite":
        return lambda address: by_address(f"{Path(address).as_uri()}?mode=ro")
    return lambda address: by_address(address)


def _write(asked: AskedTable, connect: Connect, path: Path) -> None:
    from adbc_driver_manager import Error

    try:
        with connect(asked.address) as connection, connection.cursor() as cursor:
            cursor.execute(asked.query)
            write_batches(cursor.fetch_record_batch(), path)
    except (Error, OSError, ValueError) as error:
        raise unreadable(asked, error, "fix query and path; cast a column whose values differ in type") from error
