"""Filters judge as their plain meaning does, whatever tree, types and missing values; before and after items change."""

import datetime
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from features.error import EventError
from serving.filter import MOST_DEPTH, Attributes, Filter

COLOURS, TAGS = ("red", "green", "blue"), ("new", "sale", "rare", "1")
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
}

rows = st.fixed_dictionaries(
    {
        "year": st.none() | st.integers(1990, 1999),
        "price": st.none() | st.sampled_from([0.5, 1.0, 2.5]),
        "colour": st.none() | st.sampled_from(COLOURS),
        "tags": st.none() | st.lists(st.sampled_from(TAGS), max_size=3),
    }
)
SCHEMA = {"year": pl.Int64, "price": pl.Float64, "colour": pl.String, "tags": pl.List(pl.String)}


def _leaf(column: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    equal = st.builds(lambda value: {"column": column, "eq": value}, st.none() | values)
    one_of = st.builds(lambda found: {"column": column, "in": found}, st.lists(values, min_size=1, max_size=3))
    bounds = st.dictionaries(st.sampled_from(list(OPERATORS)), values, min_size=1, max_size=2)
    return (
        equal | one_of | bounds.map(lambda found: {"column": column, **found}) if column != "tags" else equal | one_of
    )


leaves = (
    _leaf("year", st.integers(1989, 2000))
    | _leaf("price", st.sampled_from([0.5, 1, 2.5, 3.0]))
    | _leaf("colour", st.sampled_from([*COLOURS, "pink"]))
    | _leaf("tags", st.sampled_from([*TAGS, "none"]))
)
trees = st.recursive(
    leaves,
    lambda below: (
        st.builds(lambda parts: {"and": parts}, st.lists(below, min_size=1, max_size=3))
        | st.builds(lambda parts: {"or": parts}, st.lists(below, min_size=1, max_size=3))
        | st.builds(lambda part: {"not": part}, below)
    ),
    max_leaves=6,
)


def holds(tree: dict[str, Any], row: dict[str, Any] | None) -> bool:
    """The meaning, one row at a time."""
    if row is None:
        return False
    if "and" in tree:
        return all(holds(part, row) for part in tree["and"])
    if "or" in tree:
        return any(holds(part, row) for part in tree["or"])
    if "not" in tree:
        return not holds(tree["not"], row)
    value = row.get(tree["column"])
    held = value if isinstance(value, list) else [] if value is None else [value]
    if "eq" in tree:
        return tree["eq"] in held if tree["eq"] is not None else not held
    if "in" in tree:
        return any(value in held for value in tree["in"])
    asked = [(OPERATORS[name], bound) for name, bound in tree.items() if name in OPERATORS]
    return any(all(compare(value, bound) for compare, bound in asked) for value in held)


@settings(max_examples=200, deadline=None)
@given(st.lists(rows, min_size=1, max_size=12), st.lists(st.tuples(st.integers(0, 14), rows), max_size=4), trees)
def test_a_filter_matches_what_its_meaning_does(
    first: list[dict[str, Any]], later: list[tuple[int, dict[str, Any]]], tree: dict[str, Any]
) -> None:
    attributes = Attributes(pl.DataFrame(first, schema=SCHEMA), list(SCHEMA))
    known: dict[int, dict[str, Any]] = dict(enumerate(first))
    for number, row in later:
        attributes.put([number], [row])
        known[number] = row
    wanted = Filter.model_validate(tree)
    expected = [holds(tree, known.get(number)) for number in range(16)]
    assert attributes.mask(wanted, 16).tolist() == expected
    assert attributes.matches(wanted, np.array([3, 0, 15, 0])).tolist() == [expected[n] for n in (3, 0, 15, 0)]
    assert 0.0 <= attributes.share(wanted) <= 1.0


def test_a_share_is_counted_where_columns_are_what_they_seem() -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"year": rng.integers(0, 100, 20_000), "colour": rng.choice(COLOURS, 20_000)})
    attributes = Attributes(frame, ["year", "colour"])
    wanted = Filter.model_validate({"and": [{"column": "year", "lt": 10}, {"not": {"column": "colour", "eq": "red"}}]})
    assert attributes.share(wanted) == pytest.approx(attributes.mask(wanted, 20_000).mean(), abs=0.02)


def test_times_booleans_and_columns_of_nulls() -> None:
    days = [datetime.date(2025, 1, 1), datetime.date(2025, 6, 1), None]
    frame = pl.DataFrame({"day": days, "free": [True, None, False], "empty": [None, None, None]})
    attributes = Attributes(frame, ["day", "free", "empty"])

    def mask(**tree: Any) -> list[bool]:
        return attributes.mask(Filter.model_validate(tree), 3).tolist()

    assert mask(column="day", gte="2025-02-01") == [False, True, False]
    assert mask(column="day", eq="2025-01-01T00:00:00Z") == [True, False, False]
    assert mask(column="free", eq=True) == [True, False, False]
    assert mask(column="empty", eq=None) == [True, True, True]
    with pytest.raises(EventError, match="'day' holds times; 'soon' is not ISO 8601"):
        mask(column="day", gt="soon")


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({}, "exactly one of column, and, or, not"),
        ({"column": "year"}, "column needs eq, or in, or a range"),
        ({"column": "year", "eq": 1, "gt": 0}, "column needs eq, or in, or a range"),
        ({"column": "year", "gt": None}, "null can be compared by eq alone"),
        ({"eq": 1}, "exactly one of"),
        ({"and": [{"column": "year", "eq": 1}], "eq": 1}, "eq needs a column"),
        ({"column": "year", "eq": float("nan")}, "finite"),
        ({"column": "year", "like": "x"}, "Extra inputs"),
        ({"and": []}, "at least 1 item"),
    ],
)
def test_a_filter_without_one_meaning_is_refused(tree: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Filter.model_validate(tree)


def test_columns_and_values_that_do_not_fit_are_named() -> None:
    attributes = Attributes(pl.DataFrame({"year": [1], "colour": ["red"]}), ["year", "colour"])
    for tree, why in (
        ({"column": "size", "eq": 1}, "column 'size' is not filterable; the filterable columns are: year, colour"),
        ({"column": "year", "eq": "old"}, "column 'year' holds numbers; 'old' is none"),
        ({"column": "colour", "gt": 3}, "column 'colour' holds text"),
    ):
        with pytest.raises(EventError, match=why):
            attributes.mask(Filter.model_validate(tree), 1)


def test_a_filter_too_deep_or_too_wide_is_refused() -> None:
    tree: dict[str, Any] = {"column": "year", "eq": 1}
    for _ in range(MOST_DEPTH - 1):
        tree = {"not": tree}
    Filter.model_validate(tree).check_size()
    wide = {"or": [{"and": [{"column": "year", "eq": n} for n in range(20)]} for _ in range(20)]}
    for wrong in ({"not": tree}, wide):
        with pytest.raises(EventError, match="at most 16 levels and 256 parts"):
            Filter.model_validate(wrong).check_size()
