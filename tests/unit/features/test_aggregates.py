"""Declared aggregates: what the descriptor refuses, the plan that follows, and the columns of a small frame."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.aggregate.plan import plan_of
from features.aggregate.state import GroupState
from features.aggregate_frame import aggregated_by, with_aggregates, within_bounds
from features.dataset.aggregate import Aggregate
from features.dataset.descriptor import Dataset, Users, load_dataset
from features.dataset.source import Categorical
from features.dataset.split import Split
from features.errors import DatasetError
from features.frame import Frame, build_frame
from tests.build import coloured_dataset, coloured_tables

DAY_US = 86_400_000_000
DESCRIPTOR = """
name = "shop"
[items]
path = "items.csv"
id = "sku"
categorical = ["brand"]
[events]
path = "events.csv"
user = "who"
item = "sku"
time = "at"
numeric = ["price"]
categorical = ["device"]
label = {{ column = "liked" }}
[split]
by = "time"
[aggregates]
{aggregates}
"""


def loaded(directory: Path, aggregates: str, **replaced: str) -> Dataset:
    path, text = directory / "shop.toml", DESCRIPTOR.format(aggregates=aggregates)
    for old, new in replaced.items():
        text = text.replace(old, new)
    path.write_text(text)
    return load_dataset(path)


REFUSED = {
    'x = { by = "item", value = "rate", windows = ["fortnight"] }': "'fortnight' is no duration",
    'x = { by = "item", value = "rate", windows = ["5s"] }': "'5s' is shorter than a minute",
    'x = { by = "item", value = "rate", half_life = ["2000d"] }': "longer than 1,000 days",
    'x = { by = "item", value = "rat" }': "unknown value rat; the nearest is rate",
    'x = { by = "item", value = { summ = "price" } }': "unknown value { summ = … }; the nearest is sum",
    'x = { by = "shop", value = "rate" }': "[aggregates] x: by = 'shop' is no entity",
    'x = { by = "item.colour", value = "rate" }': "the nearest is 'item.brand'",
    'x = { by = "user", value = { sum = "cost" } }': "sum = 'cost' must be a numeric column of [events]",
    'x = { by = "user", value = { sum = "device" } }': "the valid names are price",
    'x = { by = "user", value = { distinct = "price" } }': "distinct = 'price' must be user, item or a categorical",
    'x = { by = "user", value = { sum = "price" }, half_life = ["1d"] }': "half_life goes with count, positive, rate",
    'x = { by = "user", value = { min = "price" }, windows = ["1d"] }': 'min knows windows = ["all"] alone',
    'x = { by = ["user", "user"], value = "rate" }': "by names column 'user' more than once",
    'x = { by = "user", value = "rate", prior = 0 }': "prior",
    'x = { by = "user", value = "rate", window = ["1d"] }': "unknown key 'window'; the nearest valid name is 'windows'",
    '"a b" = { by = "user", value = "rate" }': "a name has letters, digits",
}


@pytest.mark.parametrize("aggregates", REFUSED)
def test_a_declaration_that_cannot_be_is_refused_by_name(aggregates: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as refused:
        loaded(tmp_path, aggregates)
    assert REFUSED[aggregates] in str(refused.value)
    assert "aggregates" in str(refused.value)


def test_without_a_clock_windows_of_time_are_refused(tmp_path: Path) -> None:
    ordered = {'time = "at"': 'order = "at"', 'by = "time"': 'by = "order"'}
    for wrong in ('windows = ["1d"]', 'half_life = ["1d"]'):
        with pytest.raises(DatasetError, match="a window of time needs time"):
            loaded(tmp_path, f'x = {{ by = "item", value = "rate", {wrong} }}', **ordered)
    kept = loaded(tmp_path, 'x = { by = "item", value = "rate" }', **ordered)
    assert [one.name for one in plan_of(kept).aggregations] == ["x"]


def test_with_an_implicit_label_a_rate_is_refused_and_counts_are_the_default(tmp_path: Path) -> None:
    implicit = {'label = { column = "liked" }': "label = { implicit = true }"}
    with pytest.raises(DatasetError, match="with an implicit label every event is a positive"):
        loaded(tmp_path, 'x = { by = "item", value = "rate" }', **implicit)
    plan = plan_of(loaded(tmp_path, "", **implicit))
    assert {one.kind for one in plan.aggregations} == {"count", "recency"}


def test_default_aggregates_by_two_are_bounded(tmp_path: Path) -> None:
    many = ", ".join(f'"c{number}"' for number in range(30))
    plan = plan_of(loaded(tmp_path, "", **{'categorical = ["brand"]': f"categorical = [{many}]"}))
    assert [one.by[1] for one in plan.aggregations if len(one.by) == 2] == [f"item.c{number}" for number in range(16)]


def test_default_aggregates_cross_users_items_and_their_columns() -> None:
    dataset = coloured_dataset().model_copy(
        update={"users": Users(path="u.csv", id="user_id", categorical={"age": Categorical(), "city": Categorical()})}
    )
    crossed = [one.by for one in plan_of(dataset).aggregations if len(one.by) == 2]
    assert crossed == [
        ("user", "item.colour"), ("item", "user.age"), ("item", "user.city"),
        ("user.age", "item.colour"), ("user.city", "item.colour"),
    ]  # fmt: skip


def test_default_aggregates_are_user_item_and_user_by_each_column_of_the_item(tmp_path: Path) -> None:
    dataset = loaded(tmp_path, 'item_rate = { by = "item", value = "rate", windows = ["1d"] }')
    plan = plan_of(dataset)
    assert [one.name for one in plan.aggregations] == [
        "user_rate", "user_mood", "item_rate", "item_mood", "user_item_brand",
    ]  # fmt: skip
    assert plan.aggregations[2].windows == ("1d",)
    assert [one.name for one in plan_of(dataset, "declared").aggregations] == ["item_rate"]
    assert plan_of(dataset, "off").columns == ()


EVERY = {
    "count": Aggregate(by=("user",), value="count", windows=("all", "1d")),
    "spend": Aggregate(by=("user",), value={"sum": "price"}),
    "mean": Aggregate(by=("user",), value={"mean": "price"}),
    "least": Aggregate(by=("user",), value={"min": "price"}),
    "most": Aggregate(by=("user",), value={"max": "price"}),
    "last": Aggregate(by=("user",), value={"last": "price"}),
    "kinds": Aggregate(by=("user",), value={"distinct": "item"}),
    "since": Aggregate(by=("user",), value="recency"),
}
# user, item, day, price; the events of day 1 are one session and must not see each other.
ROWS = [
    ("a", "x", 0, 5.0), ("a", "y", 1, None), ("a", "x", 1, 7.0), ("b", "x", 1, 1.0), ("a", "z", 3, 2.0),
    ("a", "x", 4, 9.0), ("b", "y", 9, 4.0),
]  # fmt: skip


def small_frame(order: list[int]) -> Frame:
    rows = [ROWS[number] for number in order]
    events = pl.DataFrame(
        {
            "event": np.array(order, dtype=np.uint32),
            "user_id": [row[0] for row in rows],
            "item_id": [row[1] for row in rows],
            "time": [row[2] * DAY_US for row in rows],
            "label": pl.Series([1] * len(rows), dtype=pl.Int8),
            "price": pl.Series([row[3] for row in rows], dtype=pl.Float32),
        }
    )
    dataset = coloured_dataset(numeric=("price",))
    return build_frame(dataset, {"events": events}, split=Split(by="order"), history_length=2)


def columns(frame: Frame) -> dict[str, list[float]]:
    dataset = coloured_dataset(numeric=("price",)).model_copy(update={"aggregates": EVERY})
    found, _ = with_aggregates(frame, plan_of(dataset, "declared"))
    rows = found.examples.sort("event")
    return {name: np.expm1(np.abs(rows[name].to_numpy())).round(3).tolist() for name in found.aggregates.columns}


def test_every_kind_of_value_is_as_of_the_events_time() -> None:
    found = columns(small_frame(list(range(len(ROWS)))))
    nan = float("nan")
    expected = {
        "count.all": [0, 1, 1, 0, 3, 4, 1],
        # A day's tile is an hour, so a window of a day that ends at midnight begins at midnight.
        "count.1d": [0, 1, 1, 0, 0, 1, 0],
        "spend.all": [0, 5, 5, 0, 12, 14, 1],
        "mean.all": [nan, 5, 5, nan, 6, 14 / 3, 1],
        "least.all": [nan, 5, 5, nan, 5, 2, 1],
        "most.all": [nan, 5, 5, nan, 7, 7, 1],
        "last.all": [nan, 5, 5, nan, 7, 2, 1],
        "kinds.all": [0, 1, 1, 0, 2, 3, 1],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[f"aggregate.{name}"], values, atol=2e-3, err_msg=name)
    days = np.array(found["aggregate.since"]) / 86_400
    np.testing.assert_allclose(days, [nan, 1, 1, nan, 2, 1, 8], atol=1e-3)


def test_the_order_of_the_rows_in_the_files_decides_nothing() -> None:
    assert repr(columns(small_frame([5, 6, 3, 0, 4, 1, 2]))) == repr(columns(small_frame(list(range(len(ROWS))))))


def test_a_drawn_negative_is_answered_and_never_counts() -> None:
    frame = small_frame(list(range(len(ROWS))))
    negative = frame.examples.with_columns(label=pl.lit(0, dtype=pl.Int8))
    both = pl.concat([frame.examples, negative])[np.argsort(np.tile(np.arange(len(ROWS)), 2), kind="stable")]
    found, _ = with_aggregates(Frame(frame.users, frame.items, both), plan_of_every())
    expected, _ = with_aggregates(frame, plan_of_every())
    answered = found.examples.select(found.aggregates.columns)
    assert repr(answered[::2].rows()) == repr(expected.examples.select(found.aggregates.columns).rows())
    assert repr(answered[1::2].rows()) == repr(answered[::2].rows())


def plan_of_every():  # type: ignore[no-untyped-def]
    dataset = coloured_dataset(numeric=("price",)).model_copy(update={"aggregates": EVERY})
    return plan_of(dataset, "declared")


def test_a_frame_takes_the_columns_of_another_plan() -> None:
    frame, _ = with_aggregates(small_frame(list(range(len(ROWS)))), plan_of_every())
    assert aggregated_by(frame, frame.aggregates) is frame
    other = plan_of(coloured_dataset().model_copy(update={"items": None}))
    again = aggregated_by(frame, other)
    assert [name for name in again.examples.columns if name.startswith("aggregate.")] == list(other.columns)


def test_a_frame_with_more_keys_than_allowed_is_refused_by_name() -> None:
    with pytest.raises(DatasetError, match=r"aggregates by user: more than 1 distinct keys; .* aggregate_keys"):
        with_aggregates(small_frame([0, 3]), replace(plan_of_every(), most_keys=1))


def test_a_default_aggregate_with_too_many_pairs_is_left_out_and_named() -> None:
    frame = build_frame(coloured_dataset(), coloured_tables(), split=Split(by="order"), history_length=2)
    plan = plan_of(coloured_dataset(), most_keys=60)
    names = {one.name for one in plan.aggregations}
    kept, large = within_bounds(frame, plan, names)
    # 20 users by 4 colours are 80 pairs; 20 users and 40 items fit.
    assert large == ["user_item_colour"]
    assert {one.name for one in kept.aggregations} == names - {"user_item_colour"}
    assert within_bounds(frame, plan, ())[0] == plan
    assert within_bounds(frame, replace(plan, most_keys=80), names) == (replace(plan, most_keys=80), [])


def test_a_default_aggregate_of_too_many_users_is_left_out_and_named() -> None:
    frame = build_frame(coloured_dataset(), coloured_tables(), split=Split(by="order"), history_length=2)
    plan = plan_of(coloured_dataset(), most_keys=30)
    kept, large = within_bounds(frame, plan, {one.name for one in plan.aggregations})
    # 20 users fit, 40 items and 80 pairs do not.
    assert large == ["item_rate", "item_mood", "user_item_colour"]
    assert with_aggregates(frame, kept)[0].aggregates.columns == kept.columns


def test_a_column_of_the_events_that_is_named_like_an_aggregate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"column 'aggregate\.price' begins like an aggregate's column"):
        loaded(tmp_path, "", **{'numeric = ["price"]': 'numeric = ["aggregate.price"]'})


def test_a_state_forgets_the_keys_whose_last_event_is_the_oldest() -> None:
    state = GroupState(1)
    keys = np.arange(10, dtype=np.uint64)
    state.advance(keys, np.array([5, 1, 9, 2, 8, 3, 7, 4, 6, 0]), np.ones((10, 1), dtype=np.int64), keys >= 0)
    before = state.take(keys[[2, 4, 6]])
    assert sorted(state.forget(3).tolist()) == [0, 1, 3, 5, 7, 8, 9]
    assert state.keys.tolist() == [2, 4, 6]
    assert np.array_equal(state.rows, before)


def test_memory_of_a_key_is_its_row() -> None:
    state = GroupState(2, (), (DAY_US,))
    keys = np.arange(1_000, dtype=np.uint64)
    ones = np.ones((1_000, 2), dtype=np.int64)
    for day in range(3):
        state.advance(keys, np.full(1_000, day * DAY_US), ones, np.ones(1_000, dtype=np.bool_))
    assert state.rows.shape == (1_000, state.width)
    assert state.width == 8
