"""Files that people really have, one folder a kind in tests/realfiles: read as they are meant, or refused by name."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from features.content import lsa
from features.dataset.descriptor import Events, Items, load_dataset
from features.dataset.label import Label
from features.dataset.profile import Profile, profile
from features.dataset.source import Categorical
from features.dataset.tables import read_events, read_items
from features.errors import DatasetError, TesseraError
from tessera.cli.stream import send
from tessera.pipeline.run import RunOptions, run
from tessera.settings import Settings
from tests.unit.features.test_tables import bare

FILES = Path(__file__).parents[2] / "realfiles"


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
        ({"uid": 1, "iid": 2}, "there are: uid, iid; fix the names"),
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
        (gzip.compress(CSV.decode().encode("utf-16"), mtime=0), "is UTF-16; save it"),
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
    assert "row 3: column 'y' holds half of a surrogate pair" in shop_refusal(tmp_path, lines, categorical={"y": {}})
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


def test_31_lists_as_text_are_read() -> None:
    assert catalogue("31-list-as-text/d.toml")["genres"].to_list() == [["Drama", "Action"], ["War", "Action"]] * 5


@pytest.mark.parametrize("split", [None, ",", "|"])
@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("['Drama', 'Action']", ["Drama", "Action"]),
        ('["Drama", "It\'s, well"]', ["Drama", "It's, well"]),
        ("['Drama']", ["Drama"]),
        ("[]", []),
        (" [1, 2.0, 0.5, true, null] ", ["1", "2", "0.5", "true"]),
        ("[1, None, 'x']", ["1", "x"]),
        ("('a', 'b')", ["a", "b"]),
        ("{'b', 'a'}", ["b", "a"]),
    ],
)
def test_each_written_list_is_its_values(tmp_path: Path, split: str | None, text: str, values: list[str]) -> None:
    lines = [{"id": 1, "x": text}, {"id": 2, "x": "tea"}, {"id": 3}]
    found = shop(tmp_path, lines, categorical={"x": Categorical(split=split)})
    assert found["x"].to_list() == [values, ["tea"], None]


@pytest.mark.parametrize("text", ["[Drama", "(tea), leaf", "a [b]", "[tea],[cup]", "{'a': 1}", "{x}", "[x]", "(a, b)"])
def test_a_text_that_is_no_list_stays_text(tmp_path: Path, text: str) -> None:
    lines = [{"id": 1, "x": "tea"}, {"id": 2, "x": text}]
    assert shop(tmp_path, lines, categorical={"x": {}})["x"].to_list() == ["tea", text]


@pytest.mark.parametrize("text", ["[{'id': 16, 'name': 'Animation'}]", "['Drama' 'Action']", "['a', ['b']]", "['a']]"])
def test_a_written_list_that_cannot_be_read_is_refused_by_row(tmp_path: Path, text: str) -> None:
    lines = [{"id": 1, "x": "tea"}, {"id": 2, "x": text}]
    for split in (None, ","):
        said = shop_refusal(tmp_path, lines, categorical={"x": Categorical(split=split)})
        assert "column 'x', row 2: holds a list written as text that cannot be read" in said


@pytest.mark.parametrize("text", ["[Drama, Action]", "{Drama,Action}"])
def test_a_bracket_that_splitting_would_cut_is_refused_by_row(tmp_path: Path, text: str) -> None:
    lines = [{"id": 1, "x": "tea"}, {"id": 2, "x": text}]
    said = shop_refusal(tmp_path, lines, categorical={"x": Categorical(split=",")})
    assert "column 'x', row 2: holds a list written as text" in said
    assert shop(tmp_path, lines, categorical={"x": {}})["x"].to_list() == ["tea", text]


def test_27_ids_that_miss_the_catalogue_are_warned_of_by_check() -> None:
    said = checked("27-leading-zeros-lost/d.toml").warnings
    assert len(said) == 1
    assert "only 0.0% of the events name an item that is in the catalogue" in said[0]
    assert "'108775015' is not; '0108775015' is in it" in said[0]
    assert checked("09-json-nan/d.toml").warnings == ()


def test_27_and_by_the_run_and_again_by_the_next(tmp_path: Path) -> None:
    dataset = load_dataset(FILES / "27-leading-zeros-lost" / "d.toml")
    for _ in range(2):
        out = io.StringIO()
        console = Console(file=out, width=1_000)
        run(
            dataset,
            tmp_path / "out",
            RunOptions(quantizer="residual-kmeans"),
            console=console,
            registry=None,
            until="frame",
        )
        assert "frame: only 0.0% of the events name an item that is in the catalogue" in out.getvalue()


TEA = {
    "Chinese": ["绿茶叶", "深色咖啡", "石头茶杯", "绿茶杯", "咖啡豆"],
    "Japanese": ["緑茶の葉", "濃いコーヒー", "石のカップ", "緑のカップ", "コーヒー豆"],
    "Thai": ["ใบชาเขียว", "กาแฟเข้ม", "ถ้วยหิน", "ถ้วยชา", "เมล็ดกาแฟ"],
    "Hindi": ["हरी चाय", "गहरी कॉफी", "पत्थर के कप", "चाय का कप", "कॉफी बीन्स"],
    "Korean": ["차 잎", "진한 커피", "돌 컵", "차 컵", "커피 콩"],
    "Burmese": ["လက်ဖက်ခြောက်", "ကော်ဖီ", "ခွက်", "လက်ဖက်ရည်ခွက်", "ကော်ဖီစေ့"],
}


@pytest.mark.parametrize("language", TEA)
@pytest.mark.parametrize("copies", [1, 60])
def test_texts_of_every_language_have_features(language: str, copies: int) -> None:
    texts = [f"{text} {number}" for number in range(copies) for text in TEA[language]]
    vectors = lsa.fit(texts, dim=16, seed=0).encode(TEA[language])
    assert vectors.any(axis=1).all()
    assert vectors[1] @ vectors[4] > 0.2 > vectors[1] @ vectors[2]


def test_a_catalogue_of_which_no_text_can_be_used_is_refused_and_a_part_of_it_counted(tmp_path: Path) -> None:
    descriptor = (FILES / "10-unused-mixed-column" / "d.toml").read_text()
    (tmp_path / "d.toml").write_text(descriptor)
    (tmp_path / "events.csv").write_bytes((FILES / "10-unused-mixed-column" / "events.csv").read_bytes())

    def titled(titles: list[str]) -> Path:
        rows = [json.dumps({"item": f"i{number:03}", "title": title}) for number, title in enumerate(titles)]
        (tmp_path / "items.jsonl").write_text("\n".join(rows))
        return tmp_path / "d.toml"

    with pytest.raises(DatasetError, match="the 3 texts hold no usable word"):
        profile(load_dataset(titled(["🎬", "the of", "--"])))
    dataset = load_dataset(titled(["🎬", "the of", "", *["绿茶叶", "green tea", "7"] * 2, "stone cup"]))
    found = profile(dataset).text
    assert found is not None
    assert (found.empty, found.unusable) == (1, 2)
    out = io.StringIO()
    options = RunOptions(quantizer="residual-kmeans")
    run(dataset, tmp_path / "out", options, console=Console(file=out, width=1_000), registry=None, until="assign")
    assert "encode: 3 of 10 items have a zero content vector" in out.getvalue()
    assert json.loads((tmp_path / "out" / "assign" / "report.json").read_text())["zero_vectors"] == 3


SEND = FILES / "33-send-wrong-files"


def sent(home: Path, file: Path) -> list[bytes]:
    """Returns the messages that `tessera send events` appends, or its refusal."""
    environment = {"TESSERA_HOME": str(home)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_HOME", str(home))
        send("events", file, None)
    with contextlib.closing(Settings.from_environment(environment).open_log()) as log:
        return [record.value for record in log.read("events", 0, 0, 100)]


def test_33_send_reads_gzip_and_a_byte_order_mark(tmp_path: Path) -> None:
    assert [json.loads(value)["user"] for value in sent(tmp_path / "a", SEND / "bom.jsonl")] == ["u004", "u005"]
    assert len(sent(tmp_path / "b", SEND / "gz.jsonl.gz")) == 2
    odd = tmp_path / "odd.jsonl"
    odd.write_bytes(b'{"user": "u", "x": NaN}\r\r{"user": "v", "x": 1}')
    assert sent(tmp_path / "c", odd) == [b'{"user":"u","x":null}', b'{"user": "v", "x": 1}']


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((SEND / "rows.csv").read_bytes(), "row 1: is not JSON"),
        ((SEND / "array.json").read_bytes(), "is a JSON array"),
        (b'{"user": 1}\noops\n', "row 2: is not JSON"),
        (b'{"user": 1}\n[2]\n', "row 2: is not a JSON object"),
        (b'{"user": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"user": "\xe9"}', "byte 0xe9 is not UTF-8"),
        (b'{\n"user": 1\n}', "is JSON over several lines"),
        (bz2.compress(b"{}"), "is compressed with bzip2"),
        ('{"user": 1}\n'.encode("utf-16"), "is UTF-16"),
        (b"", "is empty"),
    ],
)
def test_33_and_appends_nothing_of_a_file_that_it_refuses(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "f.jsonl").write_bytes(data)
    with pytest.raises(TesseraError) as refused:
        sent(tmp_path / "home", tmp_path / "f.jsonl")
    assert "f.jsonl: " in str(refused.value)
    assert said in str(refused.value)
    assert not (tmp_path / "home").exists()
