"""An expression that cannot be a feature is refused by name when the descriptor is read."""

import pickle
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.dataset.descriptor import load_dataset
from features.errors import DatasetError
from features.value.expression import Derived, Expression

COLUMNS: Any = {
    "item": {"price": "number", "unit price": "number", "colour": "text", "released": "time"},
    "event": {"at": "time", "device": "text"},
    "user": {"country": "text"},
}
DESCRIPTOR = """
name = "shop"
[items]
path = "items.csv"
id = "sku"
categorical = ["colour"]
[events]
path = "events.csv"
item = "sku"
label = { implicit = true }
[split]
by = "order"
[features]
"""


def derived(**fields: Any) -> Derived:
    return Derived.model_validate(fields)


def evaluated(declared: Derived, **values: Any) -> list[Any]:
    return Expression("x", declared, COLUMNS).evaluate(pl.DataFrame(values, strict=False)).to_list()


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SUM(item.price)", "reads other rows"),
        ("item.price - AVG(item.price)", "reads other rows"),
        ("COUNT(item.price)", "reads other rows"),
        ("FIRST(item.colour)", "reads other rows"),
        ("ROW_NUMBER() OVER (ORDER BY item.price)", "reads other rows"),
        ("LAG(item.price) OVER (ORDER BY item.price)", "reads other rows"),
        ("SUM(item.price) OVER (PARTITION BY item.colour)", "reads other rows"),
        ("item.price - user.country", "does not fit its columns"),
        ("price * 2", "'price' is no column that an expression reads; the nearest is 'item.price'"),
        ("item.prise", "the nearest is 'item.price'"),
        ("1 + 1", "reads no column"),
        ("COUNT(*)", "reads no column"),
        ("item.price +", "is not an expression"),
        ("item.price, item.price", "is not an expression"),
        ("SELECT 1", "is not an expression"),
        ("CAST(user.country AS INT)", "fails for some values"),
        ("MAX(item.price) OVER ()", "reads other rows"),
        ("SUM(item.price) OVER (ORDER BY event.at)", "reads other rows"),
        ("STRING_TO_ARRAY(item.colour, ',')", "gives List(String)"),
    ],
)
def test_an_expression_that_is_no_feature_of_one_row_is_refused(sql: str, said: str) -> None:
    with pytest.raises(ValueError, match="x: ") as refused:
        Expression("x", derived(sql=sql), COLUMNS)
    assert said in str(refused.value)


def test_text_is_not_taken_for_a_column_and_names_may_be_quoted_or_of_any_script() -> None:
    assert Expression("år", derived(sql="EXTRACT(YEAR FROM event.när)"), {"event": {"när": "time"}}).reads == (
        "event.när",
    )
    assert evaluated(derived(sql="item.colour || ' item.price'"), colour=["red"]) == ["red item.price"]
    assert evaluated(derived(sql='item."unit price" * 2'), **{"unit price": [1.5, None]}) == [3.0, None]


def test_results_that_are_no_finite_number_are_null_and_durations_are_seconds() -> None:
    assert evaluated(derived(sql="LN(item.price)"), price=[0.0, -1.0, None, 1.0]) == [None, None, None, 0.0]
    times = {"at": pl.Series([90_000_000, None]).cast(pl.Datetime("us"))}
    sql = "event.at - TIMESTAMP '1970-01-01 00:00:00'"
    assert evaluated(derived(sql=sql), **times) == [90.0, None]
    assert evaluated(derived(sql=sql, kind="categorical"), **times) == ["90", None]


def test_the_type_of_a_result_decides_the_kind_and_kind_overrides_it() -> None:
    kinds = {
        "item.price / 2": "numeric",
        "item.price > 2": "categorical",
        "UPPER(item.colour)": "categorical",
        "EXTRACT(HOUR FROM event.at)": "numeric",
    }
    assert {sql: Expression("x", derived(sql=sql), COLUMNS).kind for sql in kinds} == kinds
    assert evaluated(derived(sql="FLOOR(item.price)", kind="categorical"), price=[2.5, -0.5]) == ["2", "-1"]
    with pytest.raises(ValueError, match="no number"):
        Expression("x", derived(sql="UPPER(item.colour)", kind="numeric"), COLUMNS)


def test_a_lookup_gives_numbers_or_text_and_null_for_other_values() -> None:
    numbers = derived(column="user.country", values={"de": 1, "fr": 2.5})
    assert evaluated(numbers, country=["fr", "xx", None, "de"]) == [2.5, None, None, 1.0]
    mixed = derived(column="user.country", values={"de": "middle", "fr": 2.5})
    assert evaluated(mixed, country=["fr", "de"]) == ["2.5", "middle"]
    with pytest.raises(ValueError, match="either sql"):
        derived(column="user.country", sql="1", values={"a": 1})
    with pytest.raises(ValueError, match="needs values"):
        derived(column="user.country")


def test_an_expression_survives_a_pickle() -> None:
    expression = Expression("x", derived(sql="LN(1 + item.price)"), COLUMNS)
    again = pickle.loads(pickle.dumps(expression))
    frame = pl.DataFrame({"price": [0.1, 7.0]})
    assert again == expression
    assert again.evaluate(frame).equals(expression.evaluate(frame))


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ('colour = "UPPER(item.colour)"', "[features] colour: the name is taken"),
        ('item_id = "UPPER(item.colour)"', "[features] item_id: the name is taken"),
        ('x = "UPPER(item.color)"', "[features] x: 'item.color' is no column"),
        ('"a b" = "UPPER(item.colour)"', "a name has letters"),
        ('x = "UPPER(user.colour)"', "[features] x: 'user.colour' is no column"),
        ('x = { sqll = "1" }', "unknown key 'sqll'; the nearest valid name is 'sql'"),
        ('x = { column = "item.colour", file = "none.csv" }', "none.csv: [features.x] no such file"),
        ('x = { column = "item.colour", file = "twice.csv" }', "row 2: 'a' occurs twice"),
        ('x = { column = "item.colour", file = "empty.csv" }', "is empty"),
    ],
)
def test_a_descriptor_names_the_feature_at_fault(tmp_path: Path, features: str, said: str) -> None:
    (tmp_path / "twice.csv").write_text("key,value\na,1\na,2\n")
    (tmp_path / "empty.csv").write_text("key,value\na,\n")
    (tmp_path / "d.toml").write_text(DESCRIPTOR + features)
    with pytest.raises(DatasetError) as refused:
        load_dataset(tmp_path / "d.toml")
    assert said in str(refused.value)


def test_a_file_of_results_is_kept_in_the_descriptor(tmp_path: Path) -> None:
    (tmp_path / "areas.csv").write_text("key,value\nred,1\nblue,2.5\n")
    (tmp_path / "d.toml").write_text(DESCRIPTOR + 'x = { column = "item.colour", file = "areas.csv" }')
    dataset = load_dataset(tmp_path / "d.toml")
    assert dataset.features["x"].values == {"red": 1.0, "blue": 2.5}
    assert dataset.items is not None
    assert dataset.items.numeric_features == ("x",)
