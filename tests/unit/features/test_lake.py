"""Tables of Delta Lake, Iceberg and databases give the frames of the parquet file that they were made from."""

import pickle
import sqlite3
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.utils.config import Config as PyIcebergConfig

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.files import file_slices, load
from features.dataset.input_files import InputFiles, file_hashes
from features.dataset.profile import profile
from features.dataset.tables import load_events, read_events, read_items
from features.errors import DatasetError, TesseraError

START = datetime(2026, 1, 1, tzinfo=UTC)
EVENTS = pl.DataFrame(
    {
        "user": ["a", "b", "a", "c"],
        "item": ["7", "8", "8", "7"],
        "at": [START + timedelta(hours=hour) for hour in range(4)],
        "liked": [1, 0, 1, 1],
        "price": [1.5, None, float("nan"), 2.0],
        "tags": [["x", "y"], [], None, ["z"]],
    },
    schema_overrides={"at": pl.Datetime("us", "UTC")},
)
LATER = EVENTS.head(2).with_columns(pl.col("user") + "2")
ITEMS = pl.DataFrame({"id": ["7", "8"], "name": ["red bicycle", "blue kite"], "year": [1999, None]})
Make = Callable[[Path], dict[str, Any]]


def parquet(place: Path) -> dict[str, Any]:
    EVENTS.write_parquet(place / "events.parquet")
    return {"path": "events.parquet"}


def delta(place: Path) -> dict[str, Any]:
    EVENTS.write_delta(place / "lake")
    return {"path": "lake", "format": "delta"}


def _catalog(place: Path) -> SqlCatalog:
    (place / "ice").mkdir(exist_ok=True)
    return SqlCatalog("shop", uri=f"sqlite:///{place}/ice/catalog.db", warehouse=f"file://{place}/ice")


def iceberg(place: Path) -> dict[str, Any]:
    catalog = _catalog(place)
    catalog.create_namespace("sales")
    table = catalog.create_table("sales.events", schema=EVENTS.to_arrow().schema)
    table.append(EVENTS.to_arrow())
    return {"path": table.metadata_location, "format": "iceberg"}


def duckdb(place: Path) -> dict[str, Any]:
    import duckdb as engine

    EVENTS.write_parquet(place / "given.parquet")
    with engine.connect(place / "shop.duckdb") as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(f"CREATE TABLE events AS SELECT * FROM '{place}/given.parquet'")
    return {"path": "shop.duckdb", "format": "sql", "query": "SELECT * FROM events"}


def sqlite(place: Path) -> dict[str, Any]:
    rows = EVENTS.with_columns(pl.col("at").dt.to_string("iso:strict"), tags=pl.lit(None)).rows()
    connection = sqlite3.connect(place / "shop.db")
    connection.execute("CREATE TABLE events (user TEXT, item TEXT, at TEXT, liked INTEGER, price REAL, tags TEXT)")
    connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    return {"path": "shop.db", "format": "sql", "query": "SELECT user, item, at, liked, price FROM events"}


def described(place: Path, source: dict[str, Any], *, features: str = 'categorical = ["tags"]') -> Dataset:
    """The dataset of a descriptor that names the source."""
    values = "\n".join(
        f"{key} = {value.isoformat() if isinstance(value, datetime) else repr(value)}" for key, value in source.items()
    )
    (place / "d.toml").write_text(
        f'name = "shop"\n[events]\n{values}\nuser = "user"\nitem = "item"\ntime = "at"\nnumeric = ["price"]\n'
        f'{features}\nlabel = {{ column = "liked" }}\n[split]\nby = "time"\n'
        "train = 0.5\nvalidation = 0.25\ntest = 0.25\n"
    )
    return load_dataset(place / "d.toml")


@pytest.mark.parametrize("make", [delta, iceberg, duckdb])
def test_a_table_gives_the_frame_the_slices_and_the_profile_of_its_parquet_file(tmp_path: Path, make: Make) -> None:
    given, table = described(tmp_path, parquet(tmp_path)), described(tmp_path, make(tmp_path))
    assert_frame_equal(read_events(table)[0], read_events(given)[0])
    pieces = file_slices(table.events, tmp_path, table="events", rows=2)
    assert len(pieces) == 2
    parts = pl.concat([load_events(table, piece).frame for piece in pieces])
    # DuckDB names the zone Etc/UTC.
    assert_frame_equal(parts.cast({"at": EVENTS.schema["at"]}), load_events(given).frame)
    assert profile(table) == profile(given)


@pytest.mark.parametrize("make", [delta, iceberg, duckdb, sqlite])
def test_a_directory_may_have_any_name(tmp_path: Path, make: Make) -> None:
    place = tmp_path / "kö p"
    place.mkdir()
    assert load_events(described(place, make(place), features="")).frame.height == 4


def test_a_partitioned_table_has_the_partitions_column(tmp_path: Path) -> None:
    EVENTS.write_delta(tmp_path / "lake", delta_write_options={"partition_by": ["item"]})
    found = load_events(described(tmp_path, {"path": "lake", "format": "delta"})).frame
    assert_frame_equal(found.sort("at"), load_events(described(tmp_path, parquet(tmp_path))).frame)


def test_a_table_of_sqlite_gives_the_frame_of_its_parquet_file(tmp_path: Path) -> None:
    plain = EVENTS.with_columns(pl.col("price").fill_nan(None))
    plain.write_parquet(tmp_path / "events.parquet")
    given = described(tmp_path, {"path": "events.parquet"}, features="")
    table = described(tmp_path, sqlite(tmp_path), features="")
    assert_frame_equal(read_events(table)[0], read_events(given)[0])


def test_items_may_come_from_a_table_too(tmp_path: Path) -> None:
    ITEMS.write_delta(tmp_path / "catalogue")
    parquet(tmp_path)
    described(tmp_path, {"path": "events.parquet"})
    more = '[items]\npath = "catalogue"\nformat = "delta"\nid = "id"\ntext = ["name"]\nnumeric = ["year"]\n'
    (tmp_path / "d.toml").write_text((tmp_path / "d.toml").read_text() + more)
    items = read_items(load_dataset(tmp_path / "d.toml"))
    assert items is not None
    assert items["text"].to_list() == ["red bicycle", "blue kite"]


def _grown_delta(place: Path) -> tuple[dict[str, Any], list[int], list[datetime]]:
    source = delta(place)
    between = datetime.now(UTC)
    LATER.write_delta(place / "lake", mode="append")
    return source, [0, 1], [between, datetime.now(UTC)]


def _grown_iceberg(place: Path) -> tuple[dict[str, Any], list[int], list[datetime]]:
    iceberg(place)
    between = datetime.now(UTC)
    table = _catalog(place).load_table("sales.events")
    table.append(LATER.to_arrow())
    ids = [entry.snapshot_id for entry in table.history()]
    return {"path": table.metadata_location, "format": "iceberg"}, ids, [between, datetime.now(UTC)]


@pytest.mark.parametrize("grown", [_grown_delta, _grown_iceberg])
def test_a_snapshot_is_read_by_its_id_or_by_a_time(tmp_path: Path, grown: Any) -> None:
    source, ids, times = grown(tmp_path)
    for place, rows in ((0, 4), (1, 6)):
        for as_of in (ids[place], times[place]):
            assert load_events(described(tmp_path, source | {"as_of": as_of})).frame.height == rows
    assert load_events(described(tmp_path, source)).frame.height == 6


def test_a_descriptor_that_was_read_keeps_its_snapshot_and_a_new_descriptor_sees_the_newest(tmp_path: Path) -> None:
    source = delta(tmp_path)
    dataset = described(tmp_path, source)
    files = InputFiles(dataset)
    LATER.write_delta(tmp_path / "lake", mode="append")
    files.check()
    assert load_events(dataset).frame.height == 4
    assert load_events(pickle.loads(pickle.dumps(dataset))).frame.height == 4
    assert list(files.by_table["events"]) == ["lake@0"]
    again = described(tmp_path, source | {"as_of": 0})
    assert file_hashes(again) == files.hashes
    newest = InputFiles(described(tmp_path, source))
    assert list(newest.by_table["events"]) == ["lake@1"]
    assert newest.hashes != files.hashes


def test_a_query_is_asked_again_for_each_descriptor_that_is_read(tmp_path: Path) -> None:
    source = sqlite(tmp_path)
    first = described(tmp_path, source, features="")
    assert load_events(first).frame.height == 4
    with sqlite3.connect(tmp_path / "shop.db") as connection:
        connection.execute("DELETE FROM events WHERE user = 'a'")
    assert load_events(first).frame.height == 4
    assert load_events(described(tmp_path, source, features="")).frame.height == 2


def test_an_iceberg_table_is_found_in_a_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iceberg(tmp_path)
    monkeypatch.setenv("PYICEBERG_CATALOG__SHOP__URI", f"sqlite:///{tmp_path}/ice/catalog.db")
    monkeypatch.setenv("PYICEBERG_CATALOG__SHOP__TYPE", "sql")
    monkeypatch.setattr("pyiceberg.catalog._ENV_CONFIG", PyIcebergConfig())
    source = {"path": "sales.events", "format": "iceberg", "catalog": "shop"}
    assert load_events(described(tmp_path, source)).frame.height == 4
    with pytest.raises(DatasetError, match=r"sales\.nothing: \[events\] cannot be read .*fix path"):
        load_events(described(tmp_path, source | {"path": "sales.nothing"}))


def _empty_iceberg(place: Path) -> dict[str, Any]:
    catalog = _catalog(place)
    catalog.create_namespace("sales")
    table = catalog.create_table("sales.events", schema=EVENTS.to_arrow().schema)
    return {"path": table.metadata_location, "format": "iceberg"}


@pytest.mark.parametrize(
    ("make", "changed", "words"),
    [
        (delta, {"path": "nothing"}, r"nothing: \[events\] cannot be read .*fix path"),
        (delta, {"as_of": 7}, r"lake: \[events\] cannot be read .*fix path, or as_of"),
        (iceberg, {"path": "nothing.json"}, r"nothing\.json: \[events\] cannot be read .*metadata file"),
        (iceberg, {"as_of": 7}, r"as_of = 7: no such snapshot; there are: \d+"),
        (iceberg, {"as_of": START}, r"no snapshot is that old; there are: \d+"),
        (_empty_iceberg, {}, r"has no snapshot; write rows"),
        (duckdb, {"path": "nothing.duckdb"}, r"nothing\.duckdb: \[events\] no such file"),
        (duckdb, {"query": "SELECT * FROM nothing"}, r"shop\.duckdb: \[events\] cannot be read .*fix query"),
        (duckdb, {"query": "CREATE TABLE x (a INT)"}, r"cannot be read .*read-only"),
        (sqlite, {"query": "SELEC"}, r"shop\.db: \[events\] cannot be read .*syntax"),
        (sqlite, {"query": "DELETE FROM events"}, r"cannot be read .*readonly"),
        (sqlite, {"path": "shop.xls"}, r"names no database; expected a file that ends in \.duckdb"),
        (sqlite, {"path": "oracle://host/shop"}, r"names no database; .*postgresql://"),
        (sqlite, {"query": None}, r"needs query"),
        (delta, {"query": "SELECT 1"}, r"query belongs to a table of format sql"),
        (parquet, {"as_of": 3}, r"as_of belongs to a table of format delta or iceberg"),
        (delta, {"catalog": "shop"}, r"catalog belongs to a table of format iceberg"),
        (delta, {"from": "impressions", "outcomes_path": "x.parquet"}, r"joins two logs of files"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, make: Make, changed: Any, words: str) -> None:
    source = {key: value for key, value in (make(tmp_path) | changed).items() if value is not None}
    with pytest.raises(DatasetError, match=words):
        load_events(described(tmp_path, source))


def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path: Path) -> None:
    dataset = described(tmp_path, {"path": "postgresql://me:secret@host/shop", "format": "sql", "query": "SELECT 1"})
    with pytest.raises(TesseraError, match=r"postgresql://…@host/shop: .*must not hold a password") as refused:
        load_events(dataset)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (delta, "deltalake"),
        (iceberg, "pyiceberg.catalog"),
        (duckdb, "adbc_driver_duckdb"),
        (sqlite, "adbc_driver_sqlite"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, package: str
) -> None:
    dataset = described(tmp_path, make(tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TesseraError, match=rf"needs the package {package}; pip install 'tessera\[lake\]'"):
        load_events(dataset)


def test_a_row_that_cannot_be_used_is_named_by_the_table_and_its_snapshot(tmp_path: Path) -> None:
    EVENTS.with_columns(user=pl.Series(["a", None, "b", "c"])).write_delta(tmp_path / "lake")
    with pytest.raises(DatasetError, match=r"lake@0\.parquet: \[events\] column 'user', row 2"):
        read_events(described(tmp_path, {"path": "lake", "format": "delta"}))


def test_rows_keep_the_order_of_the_table(tmp_path: Path) -> None:
    rows = 50_000
    pl.DataFrame({"n": range(rows)}).write_delta(tmp_path / "lake")
    dataset = described(tmp_path, {"path": "lake", "format": "delta"})
    found = load(dataset.events, tmp_path, table="events")
    assert found.frame["n"].to_list() == list(range(rows))
