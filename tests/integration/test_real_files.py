"""Files that people really have, one folder a kind in tests/realfiles: read as they are meant, or refused by name."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.dataset import Events, Items, Label, load_dataset
from features.error import DatasetError
from features.profile import Profile, profile
from features.table import read_events, read_items
from tests.unit.test_table import bare

FILES = Path(__file__).parents[1] / "realfiles"


def checked(descriptor: str) -> Profile:
    return profile(load_dataset(FILES / descriptor))


def catalogue(descriptor: str) -> pl.DataFrame:
    items = read_items(load_dataset(FILES / descriptor))
    assert items is not None
    return items


def refusal(descriptor: str) -> str:
    with pytest.raises(DatasetError) as refused:
        checked(descriptor)
    return str(refused.value)


def shop(directory: Path, lines: list[Any], **fields: Any) -> pl.DataFrame:
    """The catalogue that JSON lines hold."""
    (directory / "i.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    items = read_items(bare(directory, items=Items(path="i.jsonl", id="id", **fields)))
    assert items is not None
    return items


def shop_refusal(directory: Path, lines: list[Any], **fields: Any) -> str:
    with pytest.raises(DatasetError) as refused:
        shop(directory, lines, **fields)
    return str(refused.value)


def test_03_backslash_escapes_are_found_and_no_row_vanishes() -> None:
    items = catalogue("03-csv-backslash-quotes/d.toml")
    assert items["item_id"].to_list() == [f"i{number:03}" for number in range(10)]
    assert items["text"][2] == 'The 12"'
    assert items["price"].to_list() == [number + 0.5 for number in range(10)]
    assert checked("03-csv-backslash-quotes/d.toml").unknown_items == 0


def test_05_nested_sessions_are_told_with_the_columns_there_are() -> None:
    said = refusal("05-nested-sessions/d.toml")
    assert "events.jsonl: [events] has none of the columns" in said
    assert "there are: session, events" in said
    assert "'events' holds a list of objects with aid, ts, type" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"user": "u", "events": [{"item": 1, "at": 2}]}, "'events' holds a list of objects with item, at"),
        ({"data": {"user": 1, "item": 2}}, "'data' holds an object with user, item: lift its fields to the top"),
        ({"uid": 1, "iid": 2}, "there are: uid, iid; mend the names"),
    ],
)
def test_other_nestings_are_told(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    (tmp_path / "e.jsonl").write_text(f"{json.dumps(line)}\n" * 5)
    events = Events(path="e.jsonl", user="user", item="item", label=Label(implicit=True))
    with pytest.raises(DatasetError) as refused:
        read_events(bare(tmp_path, events=events))
    assert said in str(refused.value)


def test_07_utf_16_is_named_with_its_remedy() -> None:
    assert "events.csv: [events] is UTF-16; save it as UTF-8" in refusal("07-utf16/d.toml")


def zipped(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, data)
    return out.getvalue()


CSV = b"user,item\n" + b"u1,i1\n" * 30


@pytest.mark.parametrize("extension", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (CSV.decode().encode("utf-16-le"), "is UTF-16 without a byte order mark; save it as UTF-8"),
        (CSV.decode().encode("utf-16-be"), "is UTF-16 without a byte order mark"),
        (b"\xfe\xff" + CSV.decode().encode("utf-16-be"), "is UTF-16; save it"),
        (CSV.decode().encode("utf-32"), "is UTF-32; save it"),
        (gzip.compress(CSV.decode().encode("utf-16")), "is UTF-16; save it"),
        (bz2.compress(CSV), "is compressed with bzip2; unpack it"),
        (lzma.compress(CSV), "is compressed with xz; unpack it"),
        (zipped("e.csv", CSV), "is a zip archive; unpack it"),
        (zipped("xl/workbook.xml", CSV), "is an Excel workbook; save it as CSV UTF-8"),
        (b"PAR1\x15\x04" + CSV, 'is a parquet file; set format = "parquet"'),
        (b"SQLite format 3\x00", "is an SQLite database"),
        (b"<!DOCTYPE html>\n<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer"),
        (b"\x04\x22\x4d\x18abc", "is compressed with lz4"),
        (b"\n\n", "is empty"),
    ],
)
def test_another_format_is_named_whatever_the_file_is_called(
    tmp_path: Path, extension: str, data: bytes, said: str
) -> None:
    (tmp_path / f"e.{extension}").write_bytes(data)
    events = Events(path=f"e.{extension}", user="user", item="item", label=Label(implicit=True), encoding="latin-1")
    for declared in (events, events.model_copy(update={"encoding": "utf-8"})):
        with pytest.raises(DatasetError) as refused:
            read_events(bare(tmp_path, events=declared))
        assert f"e.{extension}: [events] {said}" in str(refused.value)


@pytest.mark.parametrize("name", ["PAR1", "ORC", "BZh", "Obj"])
def test_a_text_that_begins_with_the_letters_of_a_format_is_text(tmp_path: Path, name: str) -> None:
    (tmp_path / "e.csv").write_text(f"{name},item\nu1,i1\n")
    events = Events(path="e.csv", user=name, item="item", label=Label(implicit=True))
    assert read_events(bare(tmp_path, events=events))[0]["user_id"].to_list() == ["u1"]


def test_08_zip_and_zstd_are_named_with_their_remedy() -> None:
    assert "events.csv.zip: [events] is a zip archive; unpack it" in refusal("08-zip-zst/zip.toml")
    assert "events.csv.zst: [events] is compressed with zstd; unpack it" in refusal("08-zip-zst/zst.toml")


def test_09_nan_in_json_is_null() -> None:
    assert catalogue("09-json-nan/d.toml")["price"].to_list()[5:8] == [7.5, None, 10.5]


def test_the_infinities_are_null_and_other_damage_is_refused_by_row(tmp_path: Path) -> None:
    lines = ['{"id": 1, "x": Infinity}', '{"id": 2, "x": -Infinity, "y": NaN}', '{"id": 3, "x": 1, "y": "\\ud83d"}']
    assert shop(tmp_path, lines, numeric=("x",))["x"].to_list() == [None, None, 1]
    assert "column 'y', row 3: half of a character" in shop_refusal(tmp_path, lines, categorical={"y": {}})
    assert "row 2: is not JSON" in shop_refusal(tmp_path, [lines[0], '{"id": 2, "x": nan}'])
    assert "row 2: is nested too deeply" in shop_refusal(tmp_path, [lines[0], '{"id": 2, "y": ' + "[" * 9**6])


def test_10_a_column_that_nothing_declares_may_hold_anything() -> None:
    assert catalogue("10-unused-mixed-column/d.toml").height == 10
    assert checked("10-unused-mixed-column/d.toml").unknown_items == 0


@pytest.mark.parametrize("mess", [[1, {"a": 2}, [3]], [{"a": {"b": 1}}, {"a": 2}, "x"], [[[]], [{}], None]])
def test_any_mix_is_read_past_and_refused_by_row_where_it_is_wanted(tmp_path: Path, mess: list[Any]) -> None:
    lines = [{"id": number, "mess": value} for number, value in enumerate(mess)]
    assert shop(tmp_path, lines)["item_id"].to_list() == ["0", "1", "2"]
    assert "i.jsonl: [items] column 'mess', row " in shop_refusal(tmp_path, lines, text=("mess",))


def test_11_a_list_in_some_rows_makes_the_column_multi_valued() -> None:
    assert catalogue("11-list-or-string/d.toml")["tags"].to_list() == [["tea"], ["green", "tea"]] * 5


def test_lists_beside_values_of_any_type_are_multi_valued_or_refused_by_row(tmp_path: Path) -> None:
    mixed = [5, [1, "b"], None, [2.0, True], [], "c", 9148955329465708066]
    lines = [{"id": number, "x": value} for number, value in enumerate(mixed)]
    found = shop(tmp_path, lines, categorical={"x": {}}, text=("x",))
    assert found["x"].to_list() == [["5"], ["1", "b"], None, ["2", "true"], [], ["c"], ["9148955329465708066"]]
    assert found["text"].to_list() == ["5", "1, b", "", "2, true", "", "c", "9148955329465708066"]
    assert "column 'x', row 2: holds a list, but one value" in shop_refusal(tmp_path, lines, numeric=("x",))
    lists_of_ids = [{"id": 1}, {"id": [2]}]
    assert "column 'id', row 2: holds a list, but one value" in shop_refusal(tmp_path, lists_of_ids)


def test_values_of_several_types_keep_their_own_text(tmp_path: Path) -> None:
    lines = [{"id": value} for value in (9148955329465708066, 0.5, 9148955329465708067, "x", True, 2.0, 10**30)]
    ids = ["9148955329465708066", "0.5", "9148955329465708067", "x", "true", "2", "1" + "0" * 30]
    assert shop(tmp_path, lines)["item_id"].to_list() == ids


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[\n {"id": 1}\n]', "is a JSON array; write one object per line"),
        ('[{"id": 1}]', "is a JSON array"),
        ('{\n "id": 1\n}', "is JSON over several lines; write one object per line"),
        ('{"items": [\n{"id": 1}\n]}', "is JSON over several lines"),
        ("id,title\n1,x", "row 1: is not JSON"),
        ('{"id": 1}{"id": 2}', "row 1: is not JSON"),
    ],
)
def test_json_in_another_layout_is_named(tmp_path: Path, text: str, said: str) -> None:
    assert f"i.jsonl: [items] {said}" in shop_refusal(tmp_path, [text])


def test_bom_cr_and_gzip_are_read_in_json_lines_too(tmp_path: Path) -> None:
    for data in (b'\xef\xbb\xbf{"id": 1}\n{"id": 2}', b'{"id": 1}\r{"id": 2}\r', b'\r\n{"id": 1}\r\n\r\n{"id": 2}\r\n'):
        for stored in (data, gzip.compress(data), gzip.compress(gzip.compress(data))):
            (tmp_path / "i.jsonl").write_bytes(stored)
            items = read_items(bare(tmp_path, items=Items(path="i.jsonl", id="id")))
            assert items is not None
            assert items["item_id"].to_list() == ["1", "2"]
