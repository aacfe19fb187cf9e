"""Laws of the split, for any events."""

from itertools import pairwise
from random import Random

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from features.dataset.split import PARTS, Split, assign_split

TIMES = st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 5), min_size=1, max_size=60)
FRACTIONS = st.tuples(*[st.integers(1, 20)] * 3)
FRACTIONAL = st.sampled_from(["time", "random", "order"])


def events(times: list[int]) -> pl.DataFrame:
    users = [f"u{time % 3}" for time in times]
    columns = {"event": range(len(times)), "user_id": users, "time": times}
    return pl.DataFrame(columns, schema_overrides={"event": pl.UInt32, "time": pl.Int64})


def make(by: str, shares: tuple[int, int, int] = (8, 1, 1), seed: int = 0) -> Split:
    fractions = {part: share / sum(shares) for part, share in zip(PARTS, shares, strict=True)}
    return Split.model_validate({"by": by, "seed": seed, **fractions})


@given(TIMES, st.sampled_from(["time", "random", "order", "leave-one-out"]), FRACTIONS, st.integers(0, 9))
def test_every_row_is_in_exactly_one_part_and_always_in_the_same(
    times: list[int], by: str, shares: tuple[int, int, int], seed: int
) -> None:
    frame, split = events(times), make(by, shares, seed)
    parts = assign_split(frame, split)
    assert len(parts) == len(times)
    assert set(parts) <= set(PARTS)
    assert parts.equals(assign_split(frame, split))


@given(TIMES, FRACTIONS)
def test_parts_by_time_follow_one_another_and_share_no_time(times: list[int], shares: tuple[int, int, int]) -> None:
    parts = assign_split(events(times), make("time", shares))
    held = [[time for time, at in zip(times, parts, strict=True) if at == part] for part in PARTS]
    present = [part for part in held if part]
    for earlier, later in pairwise(present):
        assert max(earlier) < min(later)


@given(st.sets(st.integers(), min_size=1, max_size=60), FRACTIONAL, FRACTIONS, st.integers(0, 9))
def test_without_ties_a_part_is_within_one_event_of_its_fraction(
    times: set[int], by: str, shares: tuple[int, int, int], seed: int
) -> None:
    clipped = list({max(-(2**62), min(2**62, time)) for time in times})
    split = make(by, shares, seed)
    parts = assign_split(events(clipped), split)
    for part in PARTS:
        assert abs(int((parts == part).sum()) - len(clipped) * getattr(split, part)) <= 1 + 1e-6


@given(TIMES, FRACTIONS, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing_by_time_and_leave_one_out(
    times: list[int], shares: tuple[int, int, int], random: Random
) -> None:
    frame = events(times)
    shuffled = list(range(len(times)))
    random.shuffle(shuffled)
    for by in ("time", "leave-one-out"):
        split = make(by, shares)
        assert assign_split(frame[shuffled], split).equals(assign_split(frame, split).gather(shuffled))


@given(TIMES)
def test_each_user_leaves_one_out_for_each_part_or_none(times: list[int]) -> None:
    frame = events(times).with_columns(split=assign_split(events(times), make("leave-one-out")))
    for (_,), own in frame.sort("time", "event").group_by(["user_id"], maintain_order=True):
        expected = ["train"] * own.height if own.height < 3 else [*["train"] * (own.height - 2), "validation", "test"]
        assert own["split"].to_list() == expected
