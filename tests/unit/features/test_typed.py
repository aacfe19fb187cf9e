"""Values of every column type come through a message, a record and a filter as they went in."""

import datetime
import decimal
from typing import Any

import msgspec
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.dataset.descriptor import Items
from features.message import Rows, item_rows
from features.value.attribute import fit, typed
from features.value.filter import Filter
from features.wire.decoder import item_decoder
from models.bundle import record
from serving.retrieval.filter import Attributes, attribute_json

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


@pytest.mark.parametrize(
    ("dtype", "wire", "expected", "asked"),
    [
        (pl.Decimal(10, 2), 12.5, decimal.Decimal("12.5"), 12.5),
        (pl.Decimal(10, 2), 12.345, decimal.Decimal("12.345"), 12.345),
        (pl.Date(), "2026-01-31", datetime.date(2026, 1, 31), "2026-01-31"),
        (pl.Date(), 1_769_817_600, datetime.date(2026, 1, 31), "2026-01-31"),
        (pl.Date(), 1_769_817_600_000, datetime.date(2026, 1, 31), "2026-01-31"),
        (pl.Date(), 20260131, datetime.date(2026, 1, 31), "2026-01-31"),
        (pl.Datetime("us"), 1_769_846_400, datetime.datetime(2026, 1, 31, 8), "2026-01-31T08:00:00"),
        (pl.Datetime("ms"), "2026-01-31T08:00:00", datetime.datetime(2026, 1, 31, 8), "2026-01-31T08:00:00Z"),
        (
            pl.Datetime("ns", "Europe/Berlin"),
            "2026-01-31T08:00:00Z",
            datetime.datetime(2026, 1, 31, 8, tzinfo=UTC),
            "2026-01-31T09:00:00+01:00",
        ),
        (pl.Time(), "08:00:00", datetime.time(8), "08:00"),
        (pl.Duration("us"), 5, datetime.timedelta(seconds=5), "PT5S"),
        (pl.Duration("ms"), "PT1H", datetime.timedelta(hours=1), 3600),
        (pl.Int32(), 5, 5, 5),
        (pl.UInt8(), 300, 300, 300),
        (pl.Int64(), 12.99, 12.99, 12.99),
        (pl.Int64(), 9_007_199_254_740_993, 9_007_199_254_740_993, 9_007_199_254_740_993),
        (pl.UInt64(), 2**64 - 1, 2**64 - 1, 2**64 - 1),
        (pl.Float32(), 0.1, 0.1, 0.1),
        (pl.Float64(), "7.5", 7.5, 7.5),
        (pl.Boolean(), True, True, True),
        (pl.Boolean(), "False", False, False),
        (pl.Enum(["a"]), "b", "b", "b"),
        (pl.Categorical(), "a", "a", "a"),
        (pl.List(pl.Int64()), [1, 2.5], [1, 2.5], 2.5),
        (pl.List(pl.String()), "lone", ["lone"], "lone"),
        (pl.Null(), 5, "5", 5),
    ],
    ids=str,
)
def test_every_column_type_goes_from_a_message_through_a_record_into_a_server(
    dtype: pl.DataType, wire: Any, expected: Any, asked: Any
) -> None:
    items = Items(path="items.parquet", id="sku", filterable=("x",))
    decode = item_decoder(items)
    rows = [decode(msgspec.json.encode({"sku": "a", "x": value})).row for value in (wire, None)]
    frame, bad = item_rows(Rows(decode.columns, rows), items, {"item_id": pl.String(), "x": dtype})
    assert (bad, frame["x"].to_list()) == ({}, [expected, None])
    kept = [
        record.decode_item(record.encode(record.ItemRecord("", b"", [], own))).features
        for own in frame.drop("message_row", "text", "item_id").to_dicts()
    ]
    attributes = Attributes(pl.DataFrame(schema={"x": dtype}), ["x"])
    attributes.put([0, 1], kept)
    assert attributes.mask(Filter.model_validate({"column": "x", "eq": asked}), 2).tolist() == [True, False]
    assert attributes.mask(Filter.model_validate({"column": "x", "eq": None}), 2).tolist() == [False, True]
    msgspec.json.encode([attribute_json(value) for value in frame["x"].to_list()])
    read = record.entity_frame(kept, pl.DataFrame(schema={"x": dtype}))["x"].to_list()
    assert read == [pytest.approx(expected, rel=1e-6) if dtype == pl.Float32 else expected, None]


@pytest.mark.parametrize(
    ("dtype", "wire", "expected"),
    [
        (pl.Int64(), "many", "a number"),
        (pl.Int64(), True, "a number"),
        (pl.Int64(), 2**64 + 1, "a number"),
        (pl.Boolean(), 5, "true or false"),
        (pl.Date(), "soon", "a date"),
        (pl.Time(), "noon", "a time of day"),
        (pl.Duration("us"), "long", "a duration"),
        (pl.String(), ["a"], "one value"),
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_refused_with_its_column_and_the_expected_type(
    dtype: pl.DataType, wire: Any, expected: str
) -> None:
    items = Items(path="items.parquet", id="sku", filterable=("x",))
    decode = item_decoder(items)
    row = decode(msgspec.json.encode({"sku": "a", "x": wire})).row
    _, bad = item_rows(Rows(decode.columns, [row]), items, {"x": dtype})
    assert f"column 'x' holds {dtype}: expected {expected}" in bad[0]


def test_integers_and_fractions_are_compared_exactly_beside_each_other() -> None:
    big = 9_007_199_254_740_993
    attributes = Attributes(pl.DataFrame({"x": [big, big + 1, 5]}), ["x"])
    attributes.put([3], [{"x": 0.5}])

    def mask(**tree: Any) -> list[bool]:
        return attributes.mask(Filter.model_validate({"column": "x", **tree}), 4).tolist()

    assert mask(eq=big) == [True, False, False, False]
    assert mask(gt=big) == [False, True, False, False]
    assert mask(lt=big + 1, gte=0.5) == [True, False, True, True]
    assert mask(**{"in": [big + 1, 0.5]}) == [False, True, False, True]


_parts = st.sampled_from([["a", "é"], ["a", ""], ["a", "x\x1fy"], ["a", None, 3]])
_lists = st.tuples(_parts, st.integers(0, 1)).flatmap(
    lambda of: st.lists(st.none() | st.lists(st.sampled_from(of[0]), min_size=of[1], max_size=3), max_size=6)
)
_texts = st.lists(st.none() | st.sampled_from(["a", "", "x\x1fy"]), max_size=6)


@given(values=_lists | _texts, dtype=st.sampled_from([pl.String(), pl.List(pl.String())]))
@settings(max_examples=400)
def test_texts_at_once_are_the_texts_one_by_one(values: list[Any], dtype: pl.DataType) -> None:
    try:
        expected = pl.Series("c", [fit(value, dtype) for value in values], dtype=dtype)
    except ValueError:
        with pytest.raises(ValueError, match="expected"):
            typed("c", values, dtype)
        return
    found = typed("c", values, dtype)
    assert found.dtype == expected.dtype
    assert found.to_list() == expected.to_list()
