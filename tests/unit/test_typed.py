"""Values of every column type come through a message, a record and a filter as they went in."""

import datetime
from typing import Any

import polars as pl
import pytest

from features.attribute import typed
from features.dataset import Items
from features.event import Rows, item_decoder, item_rows
from models import record
from serving.filter import Attributes, Filter

UTC = datetime.UTC
ITEMS = Items(path="items.parquet", id="sku", filterable=("since", "seen", "stock", "shops", "price", "size"))
TYPES: dict[str, Any] = {
    "since": pl.Date(),
    "seen": pl.Datetime("us"),
    "stock": pl.Boolean(),
    "shops": pl.List(pl.Int64()),
    "price": pl.Float64(),
    "size": pl.String(),
}
MESSAGE = (
    b'{"sku": 7, "since": "2026-05-05", "seen": "2026-05-05T10:00:00+02:00",'
    b' "stock": true, "shops": [1, 4], "price": 5}'
)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        ("2026-05-05", pl.Date(), datetime.date(2026, 5, 5)),
        ("2026-05-05T23:30:00-02:00", pl.Date(), datetime.date(2026, 5, 6)),
        (datetime.date(2026, 5, 5), pl.Date(), datetime.date(2026, 5, 5)),
        ("2026-05-05", pl.Datetime("us"), datetime.datetime(2026, 5, 5)),
        ("2026-05-05T10:00:00Z", pl.Datetime("us"), datetime.datetime(2026, 5, 5, 10)),
        ("2026-05-05T10:00:00", pl.Datetime("us", "UTC"), datetime.datetime(2026, 5, 5, 10, tzinfo=UTC)),
        (None, pl.Date(), None),
        (3, pl.Int64(), 3),
        ([1, 2], pl.List(pl.Int64()), [1, 2]),
    ],
)
def test_a_value_gets_the_columns_type(value: Any, dtype: pl.DataType, expected: Any) -> None:
    found = typed("c", [value], dtype)
    assert found.dtype == dtype
    assert found.to_list() == [expected]


def test_what_is_no_value_of_the_type_is_an_error() -> None:
    for value, dtype in (("soon", pl.Date()), ("x", pl.Int64()), (3, pl.List(pl.Int64()))):
        with pytest.raises((TypeError, ValueError, pl.exceptions.PolarsError)):
            typed("c", [value], dtype)


def test_an_item_keeps_its_attributes_from_message_to_record_to_filter() -> None:
    decode = item_decoder(ITEMS)
    frame, bad = item_rows(Rows(decode.columns, [decode(MESSAGE).row]), ITEMS, TYPES)
    assert bad == {}
    features = frame.drop("message_row", "text", "item_id").to_dicts()[0]
    kept = record.decode_item(record.encode(record.ItemRecord("", b"", [], features))).features
    like = pl.DataFrame(schema=TYPES)
    again = record.entity_frame([kept], like)
    assert again.schema == like.schema
    assert again["since"].to_list() == [datetime.date(2026, 5, 5)]
    assert again["seen"].to_list() == [datetime.datetime(2026, 5, 5, 8)]
    attributes = Attributes(like, list(TYPES))
    attributes.put([0], [kept])
    for tree in (
        {"column": "since", "gte": "2026-05-05", "lt": "2026-05-06"},
        {"column": "seen", "eq": "2026-05-05T08:00:00Z"},
        {"column": "stock", "eq": True},
        {"column": "shops", "eq": 4},
        {"column": "price", "lte": 5},
        {"column": "size", "eq": None},
    ):
        assert attributes.mask(Filter.model_validate(tree), 1).tolist() == [True], tree


def test_a_message_whose_time_is_none_is_bad_alone() -> None:
    decode = item_decoder(ITEMS)
    rows = [decode(MESSAGE).row, decode(b'{"sku": 8, "since": "yesterday"}').row]
    frame, bad = item_rows(Rows(decode.columns, rows), ITEMS, TYPES)
    assert frame["item_id"].to_list() == ["7"]
    assert list(bad) == [1]
    assert "column 'since' holds Date" in bad[1]


def test_a_number_that_a_feature_keeps_in_float32_is_found_by_the_number_that_was_sent() -> None:
    attributes = Attributes(pl.DataFrame({"price": pl.Series([12.21, 3.5], dtype=pl.Float32)}), ["price"])
    assert attributes.mask(Filter.model_validate({"column": "price", "eq": 12.21}), 2).tolist() == [True, False]
    assert attributes.mask(Filter.model_validate({"column": "price", "in": [12.21, 3.5]}), 2).all()
