"""Filters judge as their plain meaning does, whatever tree, types and missing values; before and after items change."""

import datetime
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from features.errors import EventError
from features.value.filter import MOST_DEPTH, Filter
from serving.retrieval.filter import Attributes
from serving.retrieval.retriever import Searcher

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
        ({"column": "year", "eq": "old"}, "column 'year' holds numbers; 'old' is not one"),
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


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, min_size=8, max_size=12), st.data(), st.lists(trees, min_size=1, max_size=3))
def test_a_remembered_filter_matches_what_a_new_one_does_after_items_change(
    first: list[dict[str, Any]], data: st.DataObject, asked: list[dict[str, Any]]
) -> None:
    attributes = Attributes(pl.DataFrame(first, schema=SCHEMA), list(SCHEMA))
    searcher = Searcher(np.eye(len(first), 16, dtype=np.float32), attributes)
    query = np.ones(16, dtype=np.float32)
    there = set(range(len(first)))
    for _ in range(4):
        for tree in asked:
            wanted = Filter.model_validate(tree)
            found, *_ = searcher.search(query, 16, wanted)
            assert set(found.tolist()) == there & set(np.flatnonzero(attributes.mask(wanted, 16)).tolist())
        changed = data.draw(st.lists(st.integers(0, 15), max_size=3, unique=True))
        vectors = np.zeros((len(changed), 16), dtype=np.float32)
        for place, number in enumerate(changed):
            gone = data.draw(st.booleans())
            vectors[place, number] = not gone
            there = there - {number} if gone else there | {number}
        searcher.put(np.array(changed, dtype=np.int64), vectors, [data.draw(rows) for _ in changed])


def test_an_item_that_changes_is_the_only_one_that_is_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 500
    attributes = Attributes(pl.DataFrame({"year": np.arange(count)}), ["year"])
    searcher = Searcher(np.ones((count, 2), dtype=np.float32), attributes)
    wanted, query = Filter.model_validate({"column": "year", "lt": 10}), np.ones(2, dtype=np.float32)
    assert len(searcher.search(query, 50, wanted)[0]) == 10
    judged: list[int] = []
    real = attributes._judge
    monkeypatch.setattr(attributes, "_judge", lambda leaf, at: judged.append(len(at)) or real(leaf, at))
    for number in (3, 400, 401):
        searcher.put(np.array([number]), np.ones((1, 2), dtype=np.float32), [{"year": 5 if number > 100 else 900}])
    assert set(searcher.search(query, 50, wanted)[0].tolist()) == {*range(10), 400, 401} - {3}
    searcher.search(query, 50, wanted)
    assert judged == [3]


def test_a_range_of_text_costs_no_more_with_more_values() -> None:
    def least_s(values: int) -> float:
        names = [f"s{number:07d}" for number in range(values)]
        # The same number of items, so that only the distinct values differ.
        attributes = Attributes(pl.DataFrame({"sku": [names[n % values] for n in range(50_000)]}), ["sku"])
        wanted = Filter.model_validate({"column": "sku", "gte": "s0000003", "lt": f"s{values // 2:07d}"})
        took = []
        for _ in range(7):
            began = time.process_time()
            found = attributes.mask(wanted, 50_000)
            took.append(time.process_time() - began)
        assert found.sum() == sum(3 <= n % values < values // 2 for n in range(50_000))
        return min(took)

    assert least_s(50_000) < 6 * least_s(50)


def test_values_that_no_item_holds_any_more_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.retrieval.category._SPARE", 5)
    monkeypatch.setattr("models.table.column_rows._SPARE", 5)
    attributes = Attributes(pl.DataFrame({"sku": ["a"] * 20, "tags": [["x", "y"]] * 20}), ["sku", "tags"])
    for update in range(200):
        rows = [{"sku": f"s{update}-{item % 10}", "tags": [f"t{update}"] * (item % 3)} for item in range(20)]
        attributes.put(range(20), rows)
        for name, most in (("sku", 2 * 10 + 5), ("tags", 2 * 1 + 5)):
            column: Any = attributes._columns[name]
            assert len(column._numbers) <= most + 10
            assert column._lists.room <= 2 * 20 + 5 + 20
    wanted = Filter.model_validate({"column": "sku", "gte": "s199-3", "lte": "s199-5"})
    assert np.flatnonzero(attributes.mask(wanted, 20)).tolist() == [3, 4, 5, 13, 14, 15]
    assert attributes.share(wanted) == pytest.approx(0.3)
    tagged = Filter.model_validate({"column": "tags", "eq": "t199"})
    assert np.flatnonzero(attributes.mask(tagged, 20)).tolist() == [n for n in range(20) if n % 3]
