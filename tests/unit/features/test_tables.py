"""Tables read the same whatever format they are in, and what cannot be read is named by file and row."""

import gzip
import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.dataset.clock import Time
from features.dataset.descriptor import Dataset, Events, Items, Users
from features.dataset.label import Label
from features.dataset.source import Categorical
from features.dataset.split import Split
from features.dataset.tables import read_events, read_items, read_table, read_users
from features.errors import DatasetError

ROWS = [{"id": "7", "name": "a b", "n": "1.5"}, {"id": "8", "name": "", "n": "2"}]


def bare(tmp_path: Path, **parts: Any) -> Dataset:
    """A dataset of these tables, in a directory that holds them."""
    events = Events(path="events.parquet", item="item", user="user", label=Label(implicit=True))
    parts = {"events": events, "split": Split(by="order"), **parts}
    return Dataset(name="d", source=tmp_path / "d.toml", **parts)


def items_of(tmp_path: Path, **fields: Any) -> pl.DataFrame:
    frame = read_items(bare(tmp_path, items=Items(**fields)))
    assert frame is not None
    return frame


def events_of(tmp_path: Path, frame: pl.DataFrame, **fields: Any) -> tuple[pl.DataFrame, int]:
    frame.write_parquet(tmp_path / "events.parquet")
    fields = {"label": Label(implicit=True), "user": "user", "item": "item", **fields}
    return read_events(bare(tmp_path, events=Events(path="events.parquet", **fields)))


def lines(separator: str, *, header: bool) -> str:
    rows = [list(ROWS[0])] * header + [list(row.values()) for row in ROWS]
    return "".join(separator.join(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("file", "data", "options"),
    [
        ("t.csv", lines(",", header=True).encode(), {}),
        ("t.csv", lines(",", header=True).replace("\n", "\r\n").encode(), {}),
        ("t.csv", b"\xef\xbb\xbf" + lines(",", header=True).encode() + b"\n\n", {}),
        ("t.csv", lines(";", header=True).encode(), {"separator": ";"}),
        ("t.dat", lines("::", header=False).encode(), {"separator": "::", "format": "csv", "header": False}),
        (
            "t.tsv",
            gzip.compress(lines("\t", header=False).encode(), mtime=0),
            {"separator": "\t", "format": "csv", "header": False},
        ),
        ("t.csv.gz", gzip.compress(lines(",", header=True).encode(), mtime=0), {}),
        ("t.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode(), {}),
        ("t.jsonl.gz", gzip.compress("\n\n".join(json.dumps(row) for row in ROWS).encode(), mtime=0), {}),
    ],
)
def test_every_format_reads_the_same(tmp_path: Path, file: str, data: bytes, options: dict[str, Any]) -> None:
    (tmp_path / file).write_bytes(data)
    names = None if options.get("header", True) else ("id", "name", "n")
    fields = {"path": file, "id": "id", "categorical": {"name": {}}, "numeric": ("n",), "columns": names, **options}
    assert items_of(tmp_path, **fields).rows() == [("7", "", "a b", 1.5), ("8", "", None, 2.0)]


def test_parts_of_a_glob_are_read_in_sorted_order_and_widened(tmp_path: Path) -> None:
    pl.DataFrame({"a": [3.5], "b": ["z"]}).write_parquet(tmp_path / "part-2.parquet")
    pl.DataFrame({"b": ["x", "y"], "a": [1, 2]}).write_parquet(tmp_path / "part-1.parquet")
    frame = read_table(Users(path="part-*.parquet", id="a"), tmp_path, table="users")
    assert frame.to_dict(as_series=False) == {"b": ["x", "y", "z"], "a": [1.0, 2.0, 3.5]}


def test_csv_types_are_inferred_over_the_whole_file_and_lose_nothing(tmp_path: Path) -> None:
    rows = ["whole,late,zip,hex,big,flag,empty,real", *["1,1,1234,12e4,1,true,,1e-05"] * 1500]
    rows.append("-2,x,02460,7,99999999999999999999,False,,2")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    frame = read_table(Users(path="t.csv", id="whole"), tmp_path, table="users")
    types = [pl.Int64, pl.String, pl.String, pl.String, pl.String, pl.Boolean, pl.String, pl.Float64]
    assert frame.dtypes == types
    assert frame.row(-1) == (-2, "x", "02460", "7", "99999999999999999999", False, None, 2.0)


def test_quoted_csv_fields_hold_separators_quotes_and_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('id,note\n1,"a, ""b""\nc"\n2,\n"3",""\n')
    frame = read_table(Users(path="t.csv", id="id"), tmp_path, table="users")
    assert frame.rows() == [(1, 'a, "b"\nc'), (2, None), (3, None)]


def test_a_long_separator_leaves_quotes_alone_and_latin_1_is_read_when_declared(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes('1::"Amélie" (2001)\n2::"Great\n'.encode("latin-1"))
    source = Users(path="t.csv", id="a", separator="::", header=False, columns=("a", "b"), encoding="latin-1")
    assert read_table(source, tmp_path, table="users").rows() == [(1, '"Amélie" (2001)'), (2, '"Great')]


def test_declared_columns_replace_a_header(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,y\n1,2\n")
    source = Users(path="t.csv", id="a", columns=("a", "b"))
    assert read_table(source, tmp_path, table="users").to_dicts() == [{"a": 1, "b": 2}]


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        ("t.csv", b"a,b\n1,2\n1,2,3\n", "row 2: holds 3 fields, 2 expected"),
        ("t.csv", b"a,b\n1,2\n3,\n4\n", "row 3: holds 1 fields, 2 expected"),
        ("t.csv", b'a,b\n"1\n1","2,2"\n3,4\n"5"\n6,7\n', "row 3: holds 1 fields, 2 expected"),
        ("t.csv", b"a,b\n1,2\n3,\xe9\n", "row 2: byte 0xe9 is not UTF-8"),
        ("t.csv", b"\n", "is empty"),
        ("t.csv", b"a,b\n", "holds a header and no rows"),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-9], "cannot be read (Compressed file ended"),
        ("t.jsonl", b'{"a": 1}\n\n{"a": 2,\n', "row 2: is not JSON"),
        ("t.jsonl", b'{"a": 1}\n3\n', "row 2: is not a JSON object"),
        ("t.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "row 2: byte 0xe9 is not UTF-8"),
        ("t.parquet", b"PAR1 but not really", "cannot be read as parquet"),
    ],
)
def test_an_unreadable_file_is_refused_by_name_and_row(tmp_path: Path, file: str, data: bytes, said: str) -> None:
    (tmp_path / file).write_bytes(data)
    with pytest.raises(DatasetError) as refused:
        read_table(Users(path=file, id="a"), tmp_path, table="users")
    assert f"{tmp_path / file}: [users] {said}" in str(refused.value)


def test_a_headerless_csv_with_other_fields_than_declared_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1::2::3\n1::2::3\n")
    source = Users(path="t.csv", id="a", separator="::", header=False, columns=("a", "b"))
    with pytest.raises(DatasetError, match=r"t\.csv: \[users\] row 1: holds 3 fields, 2 expected"):
        read_table(source, tmp_path, table="users")


@pytest.mark.parametrize(
    ("path", "said"),
    [("none.csv", "no such file"), ("none-*.csv", "no file matches"), ("parts.csv", "is a directory")],
)
def test_a_path_without_files_is_refused(tmp_path: Path, path: str, said: str) -> None:
    (tmp_path / "parts.csv").mkdir()
    with pytest.raises(DatasetError) as refused:
        read_table(Users(path=path, id="a"), tmp_path, table="users")
    assert str(tmp_path / path) in str(refused.value)
    assert "[users]" in str(refused.value)
    assert said in str(refused.value)


def test_parts_that_do_not_share_their_columns_are_refused(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1], "b": [1]}).write_parquet(tmp_path / "p1.parquet")
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "p2.parquet")
    with pytest.raises(DatasetError, match=r"p2\.parquet: \[users\] column 'b': this file lacks it"):
        read_table(Users(path="p*.parquet", id="a"), tmp_path, table="users")


def test_ids_of_any_type_become_the_same_string(tmp_path: Path) -> None:
    columns = [pl.Series([5, 12], dtype=pl.Int16), pl.Series(["5", "12"]), pl.Series([5.0, 12.0])]
    columns += [column.cast(pl.Decimal(10, 2)) for column in columns[:1]] + [columns[1].cast(pl.Categorical)]
    for column in columns:
        frame, _ = events_of(tmp_path, pl.DataFrame({"user": column, "item": column}))
        assert frame["user_id"].to_list() == frame["item_id"].to_list() == ["5", "12"]


def test_item_text_is_joined_in_order_and_nulls_are_skipped(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"id": [1, 2, 3], "title": ["T", None, ""], "tags": [["a", None, "b"], ["c"], []], "year": [1999, None, None]}
    )
    frame.write_parquet(tmp_path / "items.parquet")
    items = items_of(tmp_path, path="items.parquet", id="id", text=("title", "year", "tags"))
    assert items.schema == {"item_id": pl.String, "text": pl.String}
    assert items["text"].to_list() == ["T\n1999\na, b", "c", ""]


def test_features_have_one_type_each_and_a_filterable_feature_comes_once(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "id": ["x", "y", "z"],
            "tags": ["a| b|", None, "|"],
            "codes": [[1, 2], [], None],
            "size": [1.0, 2.5, float("nan")],
            "price": [1.0, float("nan"), float("inf")],
            "year": [1999, 2000, None],
        }
    )
    frame.write_parquet(tmp_path / "items.parquet")
    items = items_of(
        tmp_path,
        path="items.parquet",
        id="id",
        categorical={"tags": Categorical(split="|"), "codes": Categorical(), "size": Categorical()},
        numeric=("price",),
        filterable=("year", "tags"),
    )
    many = pl.List(pl.String)
    features = {"tags": many, "codes": many, "size": pl.String, "price": pl.Float32, "year": pl.Int64}
    assert items.schema == {"item_id": pl.String, "text": pl.String, **features}
    assert items["tags"].to_list() == [["a", "b"], None, []]
    assert items["codes"].to_list() == [["1", "2"], [], None]
    assert items["size"].to_list() == ["1", "2.5", None]
    assert items["price"].to_list() == [1.0, None, None]


def test_users_have_their_id_and_features(tmp_path: Path) -> None:
    (tmp_path / "u.csv").write_text("user,zip,age\n1,02460,30\n2,1234,\n")
    frame = read_users(bare(tmp_path, users=Users(path="u.csv", id="user", categorical={"zip": {}}, numeric=("age",))))
    assert frame is not None
    assert frame.rows() == [("1", "02460", 30.0), ("2", "1234", None)]


def test_tables_that_are_not_declared_are_none(tmp_path: Path) -> None:
    assert read_items(bare(tmp_path)) is None
    assert read_users(bare(tmp_path)) is None


def test_events_have_position_ids_time_label_and_context(tmp_path: Path) -> None:
    raw = pl.DataFrame({"user": [1, 1], "item": [2, 3], "page": [7, 8], "dwell": [0.5, None]})
    frame, dropped = events_of(tmp_path, raw, categorical={"page": {}}, numeric=("dwell",))
    names = ["event", "user_id", "item_id", "time", "label", "page", "dwell"]
    types = [pl.UInt32, pl.String, pl.String, pl.Int64, pl.Int8, pl.String, pl.Float32]
    assert frame.schema == dict(zip(names, types, strict=True))
    assert frame.rows() == [(0, "1", "2", 0, 1, "7", 0.5), (1, "1", "3", 1, 1, "8", None)]
    assert dropped == 0


def test_the_order_column_is_the_time_where_there_is_no_clock(tmp_path: Path) -> None:
    frame, _ = events_of(tmp_path, pl.DataFrame({"user": [1, 1], "item": [2, 3], "pos": [9.0, 4.0]}), order="pos")
    assert frame["time"].to_list() == [9, 4]


NOON = datetime(2024, 1, 31, 12, 0, 0, 500_000, tzinfo=UTC)
NOON_US = 1_706_702_400_500_000
SECOND_US = NOON_US - 500_000


@pytest.mark.parametrize(
    ("values", "unit", "time_us"),
    [
        (pl.Series([1_706_702_400]), None, SECOND_US),
        (pl.Series([1_706_702_400], dtype=pl.Int32), "s", SECOND_US),
        (pl.Series([1_706_702_400.5]), "s", NOON_US),
        (pl.Series(["1706702400500"]), "ms", NOON_US),
        (pl.Series([NOON_US]), "us", NOON_US),
        (pl.Series([NOON_US * 1000 + 999]), "ns", NOON_US),
        (pl.Series([NOON]), None, NOON_US),
        (pl.Series([NOON]).dt.convert_time_zone("Asia/Tokyo"), None, NOON_US),
        (pl.Series([NOON.replace(tzinfo=None)]).cast(pl.Datetime("ns")), None, NOON_US),
        (pl.Series([date(2024, 1, 31)]), None, SECOND_US - 43_200_000_000),
        (pl.Series(["2024-01-31T12:00:00.5Z"]), None, NOON_US),
        (pl.Series(["2024-01-31 14:00:00,500+02:00"]), "iso", NOON_US),
        (pl.Series(["2024-01-31T07:00-0500"]), None, SECOND_US),
        (pl.Series(["2024-01-31T12:00+00"]), None, SECOND_US),
        (pl.Series(["2024-01-31 12:00:00"]), None, SECOND_US),
        (pl.Series(["2024-01-31 12:00:00.5 UTC"]), None, NOON_US),
        (pl.Series(["2024-01-31T12:00"]), None, SECOND_US),
        (pl.Series(["2024-01-31"]), None, SECOND_US - 43_200_000_000),
    ],
)
def test_every_clock_becomes_microseconds(tmp_path: Path, values: pl.Series, unit: Any, time_us: int) -> None:
    raw = pl.DataFrame({"user": [1], "item": [2], "at": values})
    frame, _ = events_of(tmp_path, raw, time=Time(column="at", unit=unit))
    assert frame["time"].to_list() == [time_us]


@pytest.mark.parametrize(
    ("values", "label", "kept"),
    [
        ([1, 3, 5, None], Label(column="y", positive=">= 4", negative="<= 2"), [(0, 0), (2, 1)]),
        ([1, 3, 5, None], Label(column="y", positive="> 3"), [(0, 0), (1, 0), (2, 1)]),
        ([1.0, float("nan"), 5.0], Label(column="y", positive=">= 4"), [(0, 0), (2, 1)]),
        ([1, 3, 5, None], Label(column="y", positive="!= 1", implicit=True), [(1, 1), (2, 1)]),
        ([1, 3, 5, None], Label(implicit=True), [(0, 1), (1, 1), (2, 1), (3, 1)]),
        (["buy", "view", None, "skip"], Label(column="y", positive="== buy", negative="== skip"), [(0, 1), (3, 0)]),
        (["4", "2", "3"], Label(column="y", positive=">= 4", negative="== 2"), [(0, 1), (1, 0)]),
        ([True, False, None], Label(column="y"), [(0, 1), (1, 0)]),
        ([True, False], Label(column="y", positive="== true"), [(0, 1), (1, 0)]),
        ([True, False], Label(column="y", positive="== 1"), [(0, 1), (1, 0)]),
        ([1, None, 0], Label(column="y"), [(0, 1), (2, 0)]),
        (["1", "0"], Label(column="y"), [(0, 1), (1, 0)]),
        ([1.0, 0.0], Label(column="y"), [(0, 1), (1, 0)]),
    ],
)
def test_rows_that_match_neither_rule_are_dropped_and_counted(
    tmp_path: Path, values: list[Any], label: Label, kept: list[tuple[int, int]]
) -> None:
    raw = pl.DataFrame({"user": values, "item": values, "y": values}).with_columns(user=1, item=2)
    frame, dropped = events_of(tmp_path, raw, label=label)
    assert frame.select("event", "label").rows() == kept
    assert dropped == len(values) - len(kept)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"label": Label(column="y")}, "holds lists, but a label"),
        ({"label": Label(column="y", positive="> 1")}, "holds lists, but a label"),
        ({"order": "y"}, "a whole number is expected"),
        ({"time": Time(column="y")}, "a time expected"),
        ({"numeric": ("y",)}, "numbers expected"),
        ({"item": "y"}, "an id is one value"),
    ],
)
def test_a_list_is_refused_where_one_value_is_meant(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DatasetError) as refused:
        events_of(tmp_path, pl.DataFrame({"user": [1], "item": [2], "y": [[1]]}), **fields)
    assert f"{tmp_path / 'events.parquet'}: [events] column 'y': " in str(refused.value)
    assert said in str(refused.value)
