"""Each way of splitting, on events whose right answer is plain to see."""

from typing import Any

import polars as pl
import pytest

from features.dataset.split import Split, assign_split

MARK = {"train": ".", "validation": "v", "test": "T"}


def marks(times: list[int], by: Any, users: str | None = None) -> str:
    """The split of events at these times as one mark each, half of them train."""
    columns = {"event": range(len(times)), "user_id": list(users or "u" * len(times)), "time": times}
    frame = pl.DataFrame(columns, schema_overrides={"event": pl.UInt32, "user_id": pl.String, "time": pl.Int64})
    parts = assign_split(frame, Split(by=by, train=0.5, validation=0.25, test=0.25))
    return "".join(MARK[part] for part in parts)


def test_time_divides_at_its_quantiles_wherever_the_rows_stand() -> None:
    assert marks([8, 1, 7, 2, 6, 3, 5, 4], "time") == "T.T.v.v."


def test_events_at_a_threshold_all_go_to_the_later_part() -> None:
    assert marks([1, 1, 2, 2, 2, 3, 3, 4], "time") == "..vvvTTT"


def test_order_takes_the_rows_as_they_stand() -> None:
    assert marks([8, 7, 6, 5, 4, 3, 2, 1], "order") == "....vvTT"


def test_the_last_event_of_a_user_is_test_and_the_last_but_one_validation() -> None:
    assert marks([3, 9, 1, 8, 2, 7, 0], "leave-one-out", "aBaBaBa") == "TT.vv.."


def test_equal_times_of_a_user_are_ordered_by_event() -> None:
    assert marks([5, 5, 5, 5], "leave-one-out") == "..vT"


def test_a_user_with_fewer_than_three_events_is_all_train() -> None:
    assert marks([1, 2, 1, 2, 3, 1], "leave-one-out", "aabbbc") == "...vT."


@pytest.mark.parametrize("by", ["time", "order", "random", "leave-one-out"])
def test_no_events_have_no_parts(by: str) -> None:
    assert marks([], by) == ""


def test_another_seed_is_another_random_split() -> None:
    frame = pl.DataFrame({"event": range(50)})
    first, again, other = (assign_split(frame, Split(by="random", seed=seed)) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first.equals(other)
