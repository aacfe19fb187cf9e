"""The training frame: nothing is dropped by the join, histories point at the right items, negatives are fair."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from features.dataset.descriptor import Dataset, Events
from features.dataset.label import Label
from features.dataset.split import Split
from features.frame import Frame, build_frame
from tests.build import coloured_dataset, coloured_tables

EVENTS = pl.DataFrame(
    {
        "event": pl.Series([0, 1, 2, 3, 4, 5], dtype=pl.UInt32),
        "user_id": ["u2", "u1", "u9", "u1", "u1", "u1"],
        "item_id": ["b", "a", "z", "b", "z", "a"],
        "time": [1, 1, 2, 2, 3, 3],
        "label": pl.Series([1, 1, 1, 0, 1, 1], dtype=pl.Int8),
        "place": ["home", None, "work", "home", "work", "home"],
    }
)
ITEMS = pl.DataFrame({"item_id": ["a", "b", "c"], "colour": ["red", "blue", None]})
USERS = pl.DataFrame({"user_id": ["u1", "u2", "u3"], "age": [1.0, 2.0, 3.0]})


def descriptor(split: Split | None = None, **events: Any) -> Dataset:
    label = Label(column="label")
    fields = {"path": "e.parquet", "user": "user_id", "item": "item_id", "time": "time", "label": label, **events}
    return Dataset(
        name="d", source="d.toml", events=Events.model_validate(fields), split=split or Split(by="order", seed=1)
    )


def joined(dataset: Dataset | None = None, *, length: int = 5, **tables: pl.DataFrame) -> Frame:
    dataset = dataset or descriptor()
    known = {"events": EVENTS, "items": ITEMS, "users": USERS} | tables
    return build_frame(dataset, known, split=dataset.split, history_length=length)


def named(frame: Frame, column: str = "history") -> list[list[str]]:
    """Lists of item rows as lists of ids."""
    ids = frame.items["item_id"].to_list()
    return [[ids[row] for row in rows] for rows in frame.examples[column].to_list()]


def test_users_and_items_that_only_occur_in_events_are_kept_and_marked() -> None:
    frame = joined()
    assert frame.items.rows() == [
        ("a", "red", True),
        ("b", "blue", True),
        ("c", None, True),
        ("z", None, False),
    ]
    assert frame.users.rows() == [("u1", 1.0, True), ("u2", 2.0, True), ("u3", 3.0, True), ("u9", None, False)]
    assert frame.examples.height == EVENTS.height


def test_examples_point_at_their_user_and_item_and_keep_their_order_and_columns() -> None:
    frame = joined()
    assert frame.users["user_id"][frame.examples["user"]].to_list() == EVENTS["user_id"].to_list()
    assert frame.items["item_id"][frame.examples["item"]].to_list() == EVENTS["item_id"].to_list()
    for column in ("event", "time", "label", "place"):
        assert frame.examples[column].to_list() == EVENTS[column].to_list()
    assert "user_id" not in frame.examples.columns


def test_a_history_is_the_earlier_positives_of_the_user() -> None:
    # u1: a at 1, then b at 2 (negative), z and a at 3, which do not see each other.
    assert named(joined()) == [[], [], [], ["a"], ["a"], ["a"]]


def test_a_history_has_at_most_its_length_the_newest_last() -> None:
    events = pl.DataFrame(
        {
            "event": pl.Series(range(4), dtype=pl.UInt32),
            "user_id": ["u"] * 4,
            "item_id": ["a", "b", "c", "a"],
            "time": [1, 2, 3, 4],
            "label": pl.Series([1] * 4, dtype=pl.Int8),
        }
    )
    assert named(joined(events=events, length=2)) == [[], ["a"], ["a", "b"], ["b", "c"]]


def test_without_tables_of_users_and_items_their_ids_are_rows_all_the_same() -> None:
    dataset = descriptor()
    frame = build_frame(dataset, {"events": EVENTS}, split=dataset.split, history_length=5)
    assert frame.items.rows() == [("b", False), ("a", False), ("z", False)]
    assert frame.users.rows() == [("u2", False), ("u1", False), ("u9", False)]
    assert named(frame) == named(joined())


def test_events_without_user_and_item_have_empty_histories() -> None:
    dataset = descriptor(user=None, item=None)
    events = EVENTS.drop("user_id", "item_id")
    frame = build_frame(dataset, {"events": events}, split=dataset.split, history_length=5)
    assert frame.examples["history"].to_list() == [[]] * EVENTS.height
    assert (frame.users.height, frame.items.height) == (0, 0)


def test_the_order_of_the_item_table_changes_no_meaning() -> None:
    frame, turned = joined(), joined(items=ITEMS[::-1], users=USERS[::-1])
    assert named(turned) == named(frame)
    for name, key in (("users", "user"), ("items", "item")):
        left = getattr(frame, name)[frame.examples[key]]
        assert getattr(turned, name)[turned.examples[key]].select(left.columns).equals(left)


def test_each_part_is_the_examples_of_its_split_in_order() -> None:
    dataset = coloured_dataset()
    tables = coloured_tables(events=100)
    frame = build_frame(dataset, tables, split=dataset.split, history_length=3)
    parts = [frame.part(name) for name in ("train", "validation", "test")]
    assert [part.height for part in parts] == [80, 10, 10]
    assert pl.concat(parts).equals(frame.examples)


def test_leave_one_out_keeps_the_last_of_each_user_for_test_and_the_one_before_for_validation() -> None:
    frame = joined(descriptor(Split(by="leave-one-out")))
    # u1 has events 1, 3, 4, 5, the last two at one time; u2 and u9 have too few to leave any out.
    assert frame.part("test")["event"].to_list() == [5]
    assert frame.part("validation")["event"].to_list() == [4]
    assert frame.part("train")["event"].to_list() == [0, 1, 2, 3]


NEGATIVES = 3


def implicit(*, seed: int = 1, items: int = 12, events: int = 60, negatives: int = NEGATIVES) -> Frame:
    """Users who meet about half of the items, several at one time."""
    rng = np.random.default_rng(5)
    table = pl.DataFrame(
        {
            "event": np.arange(events, dtype=np.uint32),
            "user_id": [f"u{user}" for user in rng.integers(0, 8, events)],
            "item_id": [f"i{item}" for item in rng.integers(0, items, events)],
            "time": np.sort(rng.integers(0, 20, events)),
            "label": pl.Series([1] * events, dtype=pl.Int8),
        }
    )
    catalogue = pl.DataFrame({"item_id": [f"i{item}" for item in range(items)]})
    dataset = descriptor(Split(by="order", seed=seed), label=Label(implicit=True, negatives=negatives))
    return build_frame(dataset, {"events": table, "items": catalogue}, split=dataset.split, history_length=5)


def test_every_positive_is_followed_by_its_negatives() -> None:
    rows = implicit().examples
    groups = [rows[start : start + NEGATIVES + 1] for start in range(0, rows.height, NEGATIVES + 1)]
    assert len(groups) == 60
    for number, group in enumerate(groups):
        assert group["label"].to_list() == [1] + [0] * NEGATIVES
        assert group["event"].to_list() == [number] * (NEGATIVES + 1)
        for column in ("user", "time", "split", "history"):
            assert group[column].n_unique() == 1
    assert rows["label"].dtype == pl.Int8


def test_a_negative_is_never_an_item_its_user_had_met_by_then() -> None:
    rows = implicit().examples
    positives = rows.filter(pl.col("label") == 1)
    met = set(positives.select("user", "item", "time").iter_rows())
    for user, item, time in rows.filter(pl.col("label") == 0).select("user", "item", "time").iter_rows():
        assert not any((user, item, earlier) in met for earlier in range(time + 1))


def test_negatives_do_not_enter_histories() -> None:
    with_negatives, without = implicit(), implicit(negatives=1)
    positives = [frame.examples.filter(pl.col("label") == 1)["history"] for frame in (with_negatives, without)]
    assert positives[0].equals(positives[1])
    bought = set(with_negatives.examples.filter(pl.col("label") == 1).select("user", "item").iter_rows())
    for user, history in with_negatives.examples.select("user", "history").iter_rows():
        assert all((user, item) in bought for item in history)


def test_negatives_are_decided_by_the_seed() -> None:
    first, second, other = implicit(), implicit(), implicit(seed=2)
    assert first.examples.equals(second.examples)
    assert not first.examples.equals(other.examples)


def test_negatives_are_drawn_evenly_over_the_catalogue() -> None:
    rows = implicit(items=10, events=10, negatives=500).examples.filter(pl.col("label") == 0)
    counts = np.bincount(rows["item"].to_numpy(), minlength=10)
    # Few items are met at all, so each is drawn about a tenth of the time.
    assert counts.min() > 0.5 * counts.mean()
    assert counts.max() < 1.5 * counts.mean()


def test_an_item_met_by_then_is_no_negative_even_when_nothing_else_is_left() -> None:
    rows = implicit(items=1, events=4).examples
    positives = rows.filter(pl.col("label") == 1)
    assert positives.height == 4
    assert rows.filter(pl.col("label") == 0).height == 0


@pytest.mark.parametrize("name", ["user", "item", "split", "history", "label"])
def test_a_feature_cannot_take_the_name_of_a_column_of_the_frame(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'"):
        descriptor(categorical=[name])
