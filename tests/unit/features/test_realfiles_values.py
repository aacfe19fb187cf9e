"""Files and messages that real people stumbled on: their values are read as written, or refused by row."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.tables import read_events, read_items
from features.errors import DatasetError
from features.message import Rows, event_rows, item_rows
from features.value.filter import Filter
from features.wire.decoder import event_decoder, item_decoder
from models.bundle import record
from serving.retrieval.filter import Attributes, attribute_json

FILES = Path(__file__).parents[2] / "realfiles"


def opened(name: str) -> Dataset:
    return load_dataset(FILES / f"{name}.toml")


def items_of(dataset: Dataset) -> pl.DataFrame:
    found = read_items(dataset)
    assert found is not None
    return found


def messages(name: str) -> list[bytes]:
    return (FILES / name).read_bytes().splitlines()


def streamed_items(name: str, file: str = "messages.jsonl") -> tuple[pl.DataFrame, Attributes, pl.DataFrame]:
    """The catalogue, its attributes with the messages' items behind it, and the messages as the stream shapes them."""
    dataset = opened(f"{name}/d")
    assert dataset.items is not None
    items, decode = items_of(dataset), item_decoder(dataset.items)
    rows = [decode(message).row for message in messages(f"{name}/{file}")]
    frame, bad = item_rows(Rows(decode.columns, rows), dataset.items, dict(items.schema))
    assert bad == {}
    attributes = Attributes(items, dataset.items.filterable, of_csv=dataset.items.kind == "csv")
    features = frame.drop("message_row", "text", "item_id").to_dicts()
    kept = [record.decode_item(record.encode(record.ItemRecord("", b"", [], own))).features for own in features]
    attributes.put(range(items.height, items.height + len(kept)), kept)
    return items, attributes, frame


def matches(attributes: Attributes, number: int, **tree: Any) -> bool:
    return bool(attributes.mask(Filter.model_validate(tree), number + 1)[number])


@pytest.mark.parametrize("rule", ["eq", "ne"])
def test_rules_read_booleans(rule: str) -> None:
    events, _ = read_events(opened(f"13-boolean-rule/{rule}"))
    assert events["label"].sum() == 74


def test_codes_with_decimals_are_text() -> None:
    assert items_of(opened("14-decimal-codes/d"))["code"].n_unique() == 10
    assert items_of(opened("14-decimal-codes/ids"))["item_id"].to_list()[:2] == ["5.1", "5.10"]


def test_nan_is_a_missing_id_and_makes_no_text_of_the_others(tmp_path: Path) -> None:
    dataset = opened("15-float-ids-nan-text/d")
    with pytest.raises(DatasetError, match="column 'item', row 8: the id is null"):
        read_events(dataset)
    lines = (FILES / "15-float-ids-nan-text" / "events.csv").read_text().splitlines()
    (tmp_path / "events.csv").write_text("\n".join(line for line in lines if ",nan," not in line))
    events, _ = read_events(dataset.model_copy(update={"source": tmp_path / "d.toml"}))
    assert set(events["item_id"]) <= set(items_of(dataset)["item_id"])


def test_parts_of_different_types_hold_the_same_users() -> None:
    assert read_events(opened("16-parts-float-and-text/d"))[0]["user_id"].n_unique() == 12


def test_decimal_ids_are_integers() -> None:
    dataset = opened("17-decimal-ids/d")
    assert set(read_events(dataset)[0]["item_id"]) == set(items_of(dataset)["item_id"])


def test_one_fraction_leaves_large_integers_alone() -> None:
    events, _ = read_events(opened("18-json-one-float-id/d"))
    assert events["user_id"].n_unique() == 13
    assert "9148955329465700005" in events["user_id"].to_list()


def test_lists_and_text_in_one_column_are_lists() -> None:
    assert items_of(opened("11-list-or-string/d"))["tags"].to_list()[:2] == [["tea"], ["green", "tea"]]


def test_a_list_written_as_text_is_a_list() -> None:
    assert items_of(opened("31-list-as-text/d"))["genres"].to_list()[:2] == [["Drama", "Action"], ["War", "Action"]]


@pytest.mark.parametrize("text", ["cut \\ud83d", "a NUL \\u0000"])
def test_what_is_no_text_is_refused_by_row(tmp_path: Path, text: str) -> None:
    dataset = opened("32-lone-surrogate/d")
    (tmp_path / "items.jsonl").write_text('{"item": 1, "title": "x"}\n{"item": 2, "title": "' + text + '"}\n')
    with pytest.raises(DatasetError, match=r"row 2: .*(surrogate|NUL character)"):
        read_items(dataset.model_copy(update={"source": tmp_path / "d.toml"}))


def test_streamed_ids_do_not_depend_on_their_neighbours() -> None:
    dataset = opened("19-stream-neighbour-ids/d")
    decode = event_decoder(dataset.events)
    rows = [decode(message).row for message in messages("19-stream-neighbour-ids/messages.jsonl")]
    frame, bad = event_rows(Rows(decode.columns, rows), dataset.events)
    assert bad == {}
    assert frame["user_id"].to_list() == ["1", "9148955329465700005", "9148955329465700006"]


def test_a_streamed_price_is_not_cut_to_the_catalogues_type() -> None:
    items, attributes, frame = streamed_items("20-stream-price-truncated")
    assert items.schema["price"] == pl.Int64
    assert frame["price"].to_list() == [12.99]
    new = items.height
    assert matches(attributes, new, column="price", gt=12.5, lt=13)
    assert matches(attributes, new, column="price", eq=12.99)
    assert not matches(attributes, new, column="price", lt=12.5)
    assert frame["active"].to_list() == ["true"]


def test_a_streamed_boolean_in_words_is_that_of_the_files() -> None:
    items, _, frame = streamed_items("21-stream-boolean-text", "items-messages.jsonl")
    assert frame["active"].to_list() == ["true"]
    assert set(items["active"]) == {"true", "false"}
    dataset = opened("21-stream-boolean-text/d")
    decode = event_decoder(dataset.events)
    rows = [decode(message).row for message in messages("21-stream-boolean-text/events-messages.jsonl")]
    events, bad = event_rows(Rows(decode.columns, rows), dataset.events)
    assert (bad, events["label"].to_list()) == ({}, [1])


def test_a_streamed_time_of_day_is_one() -> None:
    items, attributes, frame = streamed_items("25-time-of-day")
    assert attribute_json(frame["opens"][0]) == "09:00:00"
    assert matches(attributes, items.height, column="opens", eq="09:00:00")
    assert not matches(attributes, items.height, column="opens", lt="08:59:59")
