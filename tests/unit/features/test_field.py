"""Fields of requests and candidates: the declaration, the check of each value, and defaults."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.dataset.descriptor import Dataset, load_dataset
from features.errors import DatasetError
from features.value.field import (
    RequestField,
    distinct_candidates,
    filled,
    served,
    served_columns,
    served_fields,
    split_candidates,
)

DESCRIPTOR = """
name = "d"
[items]
path = "items.csv"
id = "item"
numeric = ["price"]
[events]
path = "events.csv"
user = "user"
item = "item"
time = "at"
label = { column = "label" }
categorical = ["page"]
[split]
by = "time"
"""
FIELDS = """
[events.request]
device = { type = "category", default = "web" }
note = { type = "text" }
[events.candidate]
price_now = { type = "number", default = 0.0 }
"""


def dataset(directory: Path, more: str = FIELDS) -> Dataset:
    (directory / "d.toml").write_text(DESCRIPTOR + more)
    return load_dataset(directory / "d.toml")


def field(kind: str, default: Any = None) -> RequestField:
    return RequestField.model_validate({"type": kind, "default": default})


def test_a_field_is_a_column_of_the_events_by_its_type(tmp_path: Path) -> None:
    events = dataset(tmp_path).events
    assert events.categorical_features == ("page", "device")
    assert events.numeric_features == ("price_now",)
    assert events.read == {"note": "text"}
    assert events.varying == {"price_now"}


def test_a_bundle_reads_its_own_descriptor_again(tmp_path: Path) -> None:
    first = dataset(tmp_path)
    again = Dataset.model_validate(first.model_dump(mode="json"))
    assert again == first
    assert again.events.fields == first.events.fields


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('[events.request]\npage = { type = "number" }', "request.page: type = 'number', but categorical names"),
        (
            '[events.request]\nx = { type = "number" }\n[events.candidate]\nx = { type = "number" }',
            "candidate.x: the field",
        ),
        ('[events.request]\nx = { type = "decimal" }', "[events] request.x.type: input should be"),
        ('[events.request]\nx = { typ = "number" }', "nearest valid name is 'type'"),
        ('[events.request]\nx = { type = "number", default = "red" }', "default: a number is a finite number"),
        ('[events.request]\nx = { type = "number", default = nan }', "default: a number is a finite number; got 'nan'"),
        ('[events.candidate]\nitem_id = { type = "category" }', "column 'item_id' cannot be a feature"),
        ('[features]\nx = "event.label + 1"', "'event.label' is no column"),
    ],
)
def test_a_wrong_declaration_is_refused_by_name(tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(DatasetError) as refused:
        dataset(tmp_path, more)
    assert said in str(refused.value)


def test_what_a_server_cannot_know_is_refused_by_name(tmp_path: Path) -> None:
    text = DESCRIPTOR.replace('["page"]', '["page"]\nread = { label = "number" }')
    (tmp_path / "d.toml").write_text(text + '[features]\nx = "event.label / item.price"\n')
    with pytest.raises(DatasetError, match=r"x: event.label is the label, which a server cannot know"):
        load_dataset(tmp_path / "d.toml")
    text = DESCRIPTOR.replace('{ column = "label" }', "{ implicit = true }") + FIELDS
    (tmp_path / "d.toml").write_text(text)
    with pytest.raises(DatasetError, match=r"candidate.price_now: a drawn negative was never a candidate"):
        load_dataset(tmp_path / "d.toml")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("number", 3, 3.0),
        ("category", 5.0, "5"),
        ("category", True, "true"),
        ("category", ["a", None, 5], ["a", None, "5"]),
        ("text", "x", "x"),
        ("text", "", None),
        ("time", "2024-01-31T12:00:00+01:00", "2024-01-31T11:00:00+00:00"),
        ("time", 1_700_000_000, "2023-11-14T22:13:20+00:00"),
        ("number", None, None),
    ],
)
def test_a_value_is_served_in_one_form(kind: str, value: Any, expected: Any) -> None:
    assert served("x", field(kind), value) == expected


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("number", "3"), ("number", True), ("number", float("nan")), ("number", float("inf")), ("number", 10**400),
        ("number", [1]), ("number", {}), ("category", float("nan")), ("category", {"a": 1}), ("category", [["a"]]),
        ("text", 5), ("time", "noon"), ("time", True), ("time", float("inf")),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_by_name(kind: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^context.x: a {kind} is"):
        served("context.x", field(kind), value)


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    fields = {"price_now": field("number", 1.5)}
    with pytest.raises(ValueError, match=r"context.price_nwo: unknown field 'price_nwo'; the nearest is 'price_now'"):
        served_fields(fields, {"price_nwo": 1})
    with pytest.raises(ValueError, match=r"candidates: unknown field 'price_nwo'; the nearest is 'price_now'"):
        served_columns(fields, {"price_nwo": [1]}, 1)
    with pytest.raises(ValueError, match=r"candidates.1.price_now: a number is a finite number"):
        served_columns(fields, {"price_now": [1, "x"]}, 2)
    with pytest.raises(ValueError, match=r"candidates: 1 values of 'price_now' for 2 candidates"):
        served_columns(fields, {"price_now": [1]}, 2)
    assert served_columns(fields, {"price_now": [None, 2]}, 2) == {"price_now": [1.5, 2.0]}
    assert served_columns(fields, {}, 2) == {"price_now": [1.5, 1.5]}


def test_candidates_are_ids_or_carry_fields() -> None:
    assert split_candidates(["a", "b"]) == (["a", "b"], {})
    ids, columns = split_candidates(["a", {"item_id": "b", "p": 2}, {"item_id": "a", "q": "x"}])
    assert (ids, columns) == (["a", "b", "a"], {"p": [None, 2, None], "q": [None, None, "x"]})
    assert distinct_candidates(ids, {"p": [1, 2, 3]}) == (["a", "b"], {"p": [1, 2]})
    with pytest.raises(ValueError, match=r"candidates.0: no item_id"):
        split_candidates([{"p": 1}])


def test_a_default_takes_the_place_of_null() -> None:
    assert filled(pl.Series([None, 2.0]), 1.0).to_list() == [1.0, 2.0]
    assert filled(pl.Series([None, ["a"], []], dtype=pl.List(pl.String)), "b").to_list() == [["b"], ["a"], []]
