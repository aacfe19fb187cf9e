"""Exports: the files hold the frame, the schema file describes them, and an export appears whole or not at all."""

import ast
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import DatasetError, TesseraError
from features.hashing import fingerprint
from models.export import tables, write
from models.export.feast import CONFIGURATION, write_repository
from models.export.schema import SCHEMA, ExportColumn, ExportSchema, read_schema
from models.export.write import write_export
from tests.export_source import IDS, LENGTH, event_table, made

DTYPES = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "timestamp": pa.timestamp("us", "UTC"),
}


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.*")}


def examples(export: Path) -> pl.DataFrame:
    return pl.read_parquet(export / "examples", hive_partitioning=True).sort("event", maintain_order=True)


def test_examples_read_back_are_the_rows_of_the_frame(tmp_path: Path) -> None:
    source, frame = made(tmp_path)
    write_export(source, tmp_path / "export")
    found, items, users = examples(tmp_path / "export"), frame.items["item_id"], frame.users["user_id"]
    rows = frame.examples
    assert found["user_id"].to_list() == users.gather(rows["user"]).to_list()
    assert found["item_id"].to_list() == items.gather(rows["item"]).to_list()
    assert found["event_timestamp"].dt.epoch("us").to_list() == rows["time"].to_list()
    assert found["history"].to_list() == [[items[row] for row in history] for history in rows["history"].to_list()]
    assert (found["label"].to_list(), found["split"].to_list()) == (rows["label"].to_list(), rows["split"].to_list())
    assert frame.aggregates.columns
    for name in frame.aggregates.columns:
        assert found[name].to_numpy().tobytes() == rows[name].to_numpy().tobytes()


def test_the_history_of_a_row_ends_strictly_before_its_event(tmp_path: Path) -> None:
    source, _ = made(tmp_path)
    write_export(source, tmp_path / "export")
    found = examples(tmp_path / "export")
    events = event_table(600).to_dicts()
    assert found.height == len(events)
    for event, row in zip(events, found.to_dicts(), strict=True):
        before = [
            one["item_id"]
            for one in events
            if one["user_id"] == event["user_id"] and one["label"] and one["time"] < event["time"]
        ]
        assert row["history"] == before[-LENGTH:]


def test_items_users_and_histories_read_back_as_they_were(tmp_path: Path) -> None:
    source, frame = made(tmp_path)
    write_export(source, tmp_path / "export", buckets=3)
    items = pl.read_parquet(tmp_path / "export" / "items").sort("item_id")
    expected = frame.items.sort("item_id")
    for name in ("item_id", "text", "colour", "listed", "content_vector", "semantic_codes", "semantic_id"):
        assert items[name].to_list() == expected[name].to_list()
    assert items["event_timestamp"].unique().to_list() == [datetime(1970, 1, 1, tzinfo=UTC)]
    # A null list has no elements, or readers would turn the codes of the others into fractions.
    codes = pq.ParquetDataset(tmp_path / "export" / "items").read()["semantic_codes"].combine_chunks()
    assert codes.flatten().null_count == 0 < codes.null_count
    users = pl.read_parquet(tmp_path / "export" / "users").sort("user_id")
    assert users["age"].to_list() == frame.users.sort("user_id")["age"].to_list()
    histories = pl.read_parquet(tmp_path / "export" / "histories").sort("user_id")
    assert histories.select("user_id", "history").rows() == [("u0", ["i1"]), ("u1", ["i3", "i2"])]
    # A microsecond after the newest visit: an event at the visit's own time does not know it.
    assert histories["event_timestamp"].dt.epoch("us").to_list() == [4, 3]


def test_the_schema_file_describes_the_files(tmp_path: Path) -> None:
    source, _ = made(tmp_path)
    schema = write_export(source, tmp_path / "export", buckets=2)
    assert read_schema(tmp_path / "export") == schema
    assert set(schema.tables) == {"examples", "items", "users", "histories"}
    for name, table in schema.tables.items():
        (tmp_path / "export" / name).stat()
        for path in (tmp_path / "export" / name).rglob("*.parquet"):
            file = pq.read_table(path, partitioning=None)
            assert [field.name for field in file.schema] == [column.name for column in table.columns]
            for column in table.columns:
                check_column(file.schema.field(column.name).type, file[column.name].to_pylist(), column)
        assert table.rows == pl.read_parquet(tmp_path / "export" / name).height
        assert [column.name for column in table.columns if not column.meaning] == []
    models = {column.name: column.models for column in schema.tables["items"].columns if column.models}
    assert models["content_vector"] == {"encoder": "lsa-1"}
    assert models["semantic_codes"] == {"encoder": "lsa-1", "codebook": "rq-1"}
    assert set(models["semantic_id"]) == {"encoder", "codebook", "tokens"}
    assert schema.source == IDS


def check_column(dtype: pa.DataType, values: list[Any], column: ExportColumn) -> None:
    """A column of a file has the type and the shape that the schema file states."""
    for size in column.shape:
        assert pa.types.is_list(dtype), column
        dtype = dtype.value_type
        assert size is None or {len(value) for value in values if value is not None} <= {size}
    assert dtype == DTYPES[column.dtype], column


def test_each_aggregate_has_a_meaning_of_its_own(tmp_path: Path) -> None:
    source, frame = made(tmp_path)
    columns = write_export(source, tmp_path / "export").tables["examples"].columns
    told = {column.name: column.meaning for column in columns if column.name in frame.aggregates.columns}
    assert len(set(told.values())) == len(frame.aggregates.columns)
    assert told["aggregate.user_rate.all"] == (
        "Aggregate user_rate by user, strictly before the event, of all time: log-odds of the share of positives, "
        "with a prior of 10 events."
    )


def test_partitions_hold_the_rows_that_their_names_say(tmp_path: Path) -> None:
    source, _ = made(tmp_path)
    write_export(source, tmp_path / "export", by="date", buckets=3)
    dates = sorted((tmp_path / "export" / "examples").iterdir())
    assert len(dates) == 13
    for directory in dates:
        rows = pl.read_parquet(directory, hive_partitioning=False)
        assert set(rows["event_timestamp"].dt.date().cast(pl.String)) == {directory.name.partition("=")[2]}
        assert rows["event"].is_sorted()
        assert "split" in rows.columns
    buckets = sorted((tmp_path / "export" / "items").iterdir())
    assert [directory.name for directory in buckets] == ["bucket=0", "bucket=1", "bucket=2"]
    for number, directory in enumerate(buckets):
        ids = pl.read_parquet(directory, hive_partitioning=False)["item_id"].to_list()
        assert set((fingerprint(ids) % 3).tolist()) == {number}


def test_the_rows_do_not_depend_on_the_size_of_a_chunk_and_equal_exports_have_equal_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = made(tmp_path)
    first = write_export(source, tmp_path / "a")
    assert write_export(source, tmp_path / "b") == first
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")
    monkeypatch.setattr(write, "CHUNK_ROWS", 7)
    assert write_export(source, tmp_path / "c").id == first.id
    for name in first.tables:
        assert pl.read_parquet(tmp_path / "c" / name).equals(pl.read_parquet(tmp_path / "a" / name))


def test_a_second_export_replaces_the_first_and_progress_ends_at_all_rows(tmp_path: Path) -> None:
    source, _ = made(tmp_path)
    told: list[tuple[int, int]] = []
    write_export(source, tmp_path / "export", by="date", progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == 600 + 40 + 20 + 2
    write_export(source, tmp_path / "export", by="split")
    assert sorted(path.name for path in (tmp_path / "export" / "examples").iterdir()) == [
        "split=test",
        "split=train",
        "split=validation",
    ]


def test_an_export_that_fails_leaves_the_earlier_one_and_no_remains(tmp_path: Path) -> None:
    source, frame = made(tmp_path)
    write_export(source, tmp_path / "export")
    before = content_of(tmp_path / "export")
    odd = frame.users.with_columns(age=pl.struct("age"))
    with pytest.raises(TesseraError, match=r"table users, column 'age': the type Struct.* cannot be exported"):
        write_export(replace(source, users=odd.lazy()), tmp_path / "export")
    assert content_of(tmp_path / "export") == before
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"examples", "export"}


def test_a_directory_with_other_files_is_refused_and_stays(tmp_path: Path) -> None:
    source, _ = made(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(TesseraError, match=r"notes is no export .*choose another directory"):
        write_export(source, tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    (tmp_path / "notes" / SCHEMA).write_text("{}")
    with pytest.raises(TesseraError, match="holds no export"):
        write_export(source, tmp_path / "notes")


def test_without_a_clock_rows_have_a_position_and_neither_dates_nor_feast(tmp_path: Path) -> None:
    source, frame = made(tmp_path, clock=False)
    schema = write_export(source, tmp_path / "export")
    assert {table.timestamp for table in schema.tables.values()} == {None}
    assert examples(tmp_path / "export")["event_order"].to_list() == frame.examples["time"].to_list()
    with pytest.raises(DatasetError, match="cannot be partitioned by date, since the events have no clock"):
        write_export(source, tmp_path / "export", by="date")
    with pytest.raises(TesseraError, match="Feast needs an event timestamp"):
        write_repository(schema, tmp_path / "export", tmp_path / "repository")


def test_a_column_whose_name_an_export_needs_is_refused(tmp_path: Path) -> None:
    source, frame = made(tmp_path)
    taken = frame.items.rename({"colour": "bucket"})
    with pytest.raises(TesseraError, match=r"table items: an export adds a column 'bucket'"):
        write_export(replace(source, items=taken.lazy()), tmp_path / "export")


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1, None], pl.UInt8, [1, None]),
        ([2**31, None], pl.UInt32, [2**31, None]),
        ([Decimal("1.50"), None], pl.Decimal(10, 2), [1.5, None]),
        ([date(2025, 1, 2), None], pl.Date, [datetime(2025, 1, 2, tzinfo=UTC), None]),
        (["a", None], pl.Categorical, ["a", None]),
        ([None, None], pl.Null, [None, None]),
        ([[1, 2], None], pl.List(pl.UInt16), [[1, 2], None]),
    ],
)
def test_types_are_widened_to_those_that_all_readers_know(
    values: list[Any], dtype: Any, expected: list[Any], tmp_path: Path
) -> None:
    source, frame = made(tmp_path, events=40)
    odd = frame.users[:2].with_columns(pl.Series("age", values, dtype=dtype))
    write_export(replace(source, users=odd.lazy(), examples=None), tmp_path / "export")
    found = pq.ParquetDataset(tmp_path / "export" / "users").read()["age"]
    assert found.to_pylist() == expected
    assert not str(found.type).startswith(("uint", "large", "dictionary", "decimal"))


def test_a_value_that_fits_no_exported_type_is_refused_with_its_column(tmp_path: Path) -> None:
    source, frame = made(tmp_path, events=40)
    odd = frame.users[:1].with_columns(pl.Series("age", [2**64 - 1], dtype=pl.UInt64))
    with pytest.raises(TesseraError, match=r"table users: a value does not fit .*'age'"):
        write_export(replace(source, users=odd.lazy(), examples=None), tmp_path / "export")


def calls(text: str, name: str) -> list[dict[str, Any]]:
    """Arguments of the calls of a function in a program."""
    return [
        {word.arg or "": word.value for word in node.keywords}
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def test_the_views_of_a_repository_name_the_columns_of_the_files(tmp_path: Path) -> None:
    source, frame = made(tmp_path)
    schema = write_export(source, tmp_path / "export")
    views, configuration = write_repository(schema, tmp_path / "export", tmp_path / "repository")
    assert "type: sqlite\n" in configuration.read_text()
    by_view = {ast.literal_eval(view["name"]): view for view in calls(views.read_text(), "FeatureView")}
    assert set(by_view) == {f"coloured_{name}" for name in schema.tables}
    fields = {
        view: [ast.literal_eval(field["name"]) for field in calls(ast.unparse(found["schema"]), "Field")]
        for view, found in by_view.items()
    }
    # Label and split are of the entity rows; a feature of them would tell the target.
    assert fields["coloured_examples"] == ["user_id", "item_id", "history", *frame.aggregates.columns]
    assert {"content_vector", "semantic_codes", "semantic_id", "colour"} <= set(fields["coloured_items"])
    online = {view: ast.literal_eval(found["online"]) for view, found in by_view.items()}
    assert [view for view, value in online.items() if not value] == ["coloured_examples"]


def repository(schema: ExportSchema, place: Path, **options: Any) -> Callable[[], str]:
    write_repository(schema, place / "export", place / "repository", **options)
    return lambda: (place / "repository" / CONFIGURATION).read_text()


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("redis://127.0.0.1:16379/3", '"127.0.0.1:16379,db=3"'),
        ("rediss://me:secret@cache:6380", '"cache:6380,db=0,ssl=true,password=${FEAST_REDIS_PASSWORD}"'),
        ("redis+cluster://cache", "redis_type: redis_cluster"),
    ],
)
def test_a_new_repository_names_redis_without_its_password(address: str, line: str, tmp_path: Path) -> None:
    source, _ = made(tmp_path, events=40)
    schema = write_export(source, tmp_path / "export")
    text = repository(schema, tmp_path, redis=address)()
    assert line in text
    assert "secret" not in text


def test_a_repository_keeps_its_own_files(tmp_path: Path) -> None:
    source, _ = made(tmp_path, events=40)
    schema = write_export(source, tmp_path / "export")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / CONFIGURATION).write_text("project: ours\n")
    assert repository(schema, tmp_path)() == "project: ours\n"
    with pytest.raises(TesseraError, match=r"not at unix://"):
        write_repository(schema, tmp_path / "export", tmp_path / "other", redis="unix:///run/redis")


def test_rows_are_read_in_chunks(tmp_path: Path) -> None:
    source, _ = made(tmp_path)
    table = tables.tables_of(source)[0]
    assert [chunk.height for chunk in table.chunks(250)] == [250, 250, 100]
