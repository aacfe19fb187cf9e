"""A csv's rows are the rows that were written: found for each dialect, refused by row where nobody can tell."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.dataset.delimited import read_delimited
from features.dataset.descriptor import Users
from features.dataset.tables import read_table, read_users
from features.errors import DatasetError
from tests.unit.features.test_tables import bare

TEXTS = ["Tea 0", 'The 12"', 'He said "hi"', "back\\slash", "a, b; c\td|e", "two\nlines", "'s", "", "é 茶", '""', "\\"]


def written(rows: list[list[str]], **options: Any) -> bytes:
    out = io.StringIO()
    csv.writer(out, **{"lineterminator": "\n", **options}).writerows(rows)
    return out.getvalue().encode().rstrip(b"\r\n")


def read(directory: Path, data: bytes, **options: Any) -> list[tuple[Any, ...]]:
    (directory / "t.csv").write_bytes(data)
    return read_table(Users(path="t.csv", id="id", **options), directory, table="users").rows()


def refusal(directory: Path, data: bytes, **options: Any) -> str:
    with pytest.raises(DatasetError) as refused:
        read(directory, data, **options)
    return str(refused.value)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "dialect",
    [
        {},
        {"quoting": csv.QUOTE_ALL},
        {"quoting": csv.QUOTE_ALL, "doublequote": False, "escapechar": "\\"},
        {"quoting": csv.QUOTE_NONNUMERIC, "doublequote": False, "escapechar": "\\"},
        {"quoting": csv.QUOTE_NONE, "escapechar": "\\", "quotechar": None},
    ],
)
def test_each_dialect_reads_as_it_was_written(
    tmp_path: Path, separator: str, ends: str, dialect: dict[str, Any]
) -> None:
    rows = [[f"i{number}", text, "x y"] for number, text in enumerate(TEXTS)]
    data = written([["id", "title", "z"], *rows], delimiter=separator, lineterminator=ends, **dialect)
    declared = {"quote": ""} if dialect.get("quoting") == csv.QUOTE_NONE else {}
    assert read(tmp_path, data, separator=separator, **declared) == [
        tuple(value or None for value in row) for row in rows
    ]


@given(st.lists(st.lists(st.text("a\",;\\\n\r é'", max_size=6), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_a_declared_dialect_reads_any_text(rows: list[list[str]]) -> None:
    wide = [[f"i{number}", *row, "end"] for number, row in enumerate(rows)]
    data = written([["id", "b", "c", "d", "e"], *wide], quoting=csv.QUOTE_ALL)
    names, frame = read_delimited(data, Users(path="t.csv", id="id", quote='"', escape=""), "t.csv:", None)
    assert names == ("id", "b", "c", "d", "e")
    assert frame.rows() == [tuple(value or None for value in row) for row in wide]


@given(st.lists(st.lists(st.text("a\",;\\\n\r é'", max_size=6), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_a_dialect_that_is_found_never_loses_a_row(rows: list[list[str]]) -> None:
    wide = [[f"i{number}", *row, "end"] for number, row in enumerate(rows)]
    data = written([["id", "b", "c", "d", "e"], *wide])
    try:
        found = read_delimited(data, Users(path="t.csv", id="id"), "t.csv:", {"id"})[1]["id"].to_list()
    except DatasetError:
        return
    assert found == [row[0] for row in wide]


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_a_field_that_merely_begins_with_a_quote_is_text(tmp_path: Path, separator: str) -> None:
    rows = [
        ["id", "title", "more"],
        ["1", '"Title text without closing quote', '[{"Label": "a"}]'],
        ["2", 'no "quote" at the start', ""],
        ["3", '"Another" begins', "x"],
        ["4", '"closed"', "y"],
        ["5", '"open', "z"],
    ]
    data = "\n".join(separator.join(row) for row in rows).encode()
    found = read(tmp_path, data, separator=separator)
    assert [row[0] for row in found] == [1, 2, 3, 4, 5]
    titles = ['"Title text without closing quote', 'no "quote" at the start', '"Another" begins', "closed", '"open']
    assert [row[1] for row in found] == titles


def test_lines_that_are_rows_or_one_field_are_refused_by_row_and_a_declared_quote_decides(tmp_path: Path) -> None:
    data = b'id,title,n\n1,"open,2\n2,the 12",3\n3,x,4\n'
    assert "row 1: a field begins with a quote that its line does not close" in refusal(tmp_path, data)
    assert [row[0] for row in read(tmp_path, data, quote="")] == [1, 2, 3]
    assert [row[:2] for row in read(tmp_path, data, quote='"')] == [(1, "open,2\n2,the 12"), (3, "x")]
    tabs = data.replace(b",", b"\t")
    assert [row[0] for row in read(tmp_path, tabs, separator="\t")] == [1, 2, 3]


def test_a_declared_quote_that_is_never_closed_is_refused_by_row(tmp_path: Path) -> None:
    assert "row 2: a quote is opened and never closed" in refusal(tmp_path, b'id,b\n1,2\n3,"4\n5,6\n', quote='"')


def test_other_quotes_and_escapes_can_be_declared(tmp_path: Path) -> None:
    data = b"id,t\n1,'a, b'\n2,'it''s'\n"
    assert 'set quote = "\'"' in refusal(tmp_path, data)
    assert read(tmp_path, data, quote="'") == [(1, "a, b"), (2, "it's")]
    data = b"id,t\n1,a^, b\n2,^N\n3,^^\n"
    assert "row 1: holds 3 fields, 2 expected" in refusal(tmp_path, data)
    assert read(tmp_path, data, escape="^") == [(1, "a, b"), (2, None), (3, "^")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quote": "''"}, "at most 1"),
        ({"quote": "é"}, "printable ASCII"),
        ({"quote": ","}, "separator or escape too"),
        ({"qoute": "'"}, "the nearest valid name is 'quote'"),
        ({"escpe": "'"}, "the nearest valid name is 'escape'"),
    ],
)
def test_an_unusable_dialect_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Users(path="t.csv", id="id", **options)


def test_line_ends_of_cr_are_read_and_mixed_ones_refused(tmp_path: Path) -> None:
    assert read(tmp_path, b"id,b\r1,x\r2,y\r") == [(1, "x"), (2, "y")]
    assert "row 1: holds a carriage return (CR)" in refusal(tmp_path, b"id,b\n1,x\r2,y\n3,z\n")
    assert "row 2: holds a carriage return (CR)" in refusal(tmp_path, b"id\n1\n2\r3\n")
    assert read(tmp_path, b'id,b\n1,"x\ry"\n2,y\n') == [(1, "x\ry"), (2, "y")]


def users_refusal(directory: Path, data: bytes, **options: Any) -> str:
    (directory / "u.csv").write_bytes(data)
    fields: dict[str, Any] = {"path": "u.csv", "id": "user", "numeric": ("age",), **options}
    with pytest.raises(DatasetError) as refused:
        read_users(bare(directory, users=Users(**fields)))
    return str(refused.value)


@pytest.mark.parametrize(("separator", "written_as"), [(";", ";"), ("\t", "\\t"), ("|", "|"), (" ", " ")])
def test_another_separator_is_named(tmp_path: Path, separator: str, written_as: str) -> None:
    data = "user,zip,age\n1,x,3\n".replace(",", separator).encode()
    assert f'set separator = "{written_as}"' in users_refusal(tmp_path, data)
    headless = data.split(b"\n", 1)[1]
    options = {"header": False, "columns": ("user", "zip", "age")}
    assert f'set separator = "{written_as}"' in users_refusal(tmp_path, headless, **options)


def test_a_header_that_is_none_and_json_are_named(tmp_path: Path) -> None:
    assert "set header = false" in users_refusal(tmp_path, b"u1,02460,30\nu2,1234,20\n")
    assert 'set format = "jsonl"' in users_refusal(tmp_path, b'{"user": 1, "age": 3}\n{"user": 2, "age": 4}\n')
    assert "column 'age' comes 2 times in the header" in users_refusal(tmp_path, b"user,age,age\n1,2,3\n")
    assert "holds a header and no rows" in users_refusal(tmp_path, b"user,age\n")


def test_what_nothing_declares_may_be_any_mess(tmp_path: Path) -> None:
    users = Users(path="u.csv", id="user", numeric=("age",))
    (tmp_path / "u.csv").write_bytes(b"user,age,note,note\n1,2,caf\xe9,\x00\n3,4,[{,\xff\n")
    frame = read_users(bare(tmp_path, users=users))
    assert frame is not None
    assert frame.rows() == [("1", 2.0), ("3", 4.0)]
    (tmp_path / "u.csv").write_bytes(b"user,age,note\n1,2,caf\xe9\n3,4\xe9,x\n")
    with pytest.raises(DatasetError, match="row 2: byte 0xe9 is not UTF-8"):
        read_users(bare(tmp_path, users=users))
    for number, extra in enumerate((b"", b",note\n5,6,x"), start=1):
        (tmp_path / f"p{number}.csv").write_bytes(b"user,age" + (extra or b"\n7,8"))
    parts = read_users(bare(tmp_path, users=users.model_copy(update={"path": "p*.csv"})))
    assert parts is not None
    assert parts.rows() == [("7", 8.0), ("5", 6.0)]
