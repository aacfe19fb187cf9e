"""Lateness and repeats, beside the rule as it is written; and a state that survives being kept."""

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaming.lateness import EventWindow, id_key

BOUND = 64
EVENTS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 400), st.none() | st.integers(0, 12)), max_size=60)


def judge(recent: EventWindow, events: list[tuple[int, int, int | None]]) -> list[str]:
    found = []
    for partition, time, key in events:
        place, times = ("events", partition), np.array([time], dtype=np.int64)
        if recent.late(place, times)[0]:
            found.append("late")
        else:
            found.append("repeat" if recent.repeated(place, [key], times)[0] else "new")
    return found


@given(EVENTS)
def test_an_event_is_late_by_its_own_partitions_time_alone(events: list[tuple[int, int, int | None]]) -> None:
    newest: dict[int, int] = {}
    for (partition, time, _), found in zip(events, judge(EventWindow(BOUND, timed=True), events), strict=True):
        assert (found == "late") == (time < newest.get(partition, time) - BOUND)
        newest[partition] = max(time, newest.get(partition, time))


@given(EVENTS)
def test_a_repeat_within_the_bound_is_always_told_and_a_new_id_never_is(
    events: list[tuple[int, int, int | None]],
) -> None:
    taken: dict[int, tuple[int, int]] = {}
    newest: dict[int, int] = {}
    for (partition, time, key), found in zip(events, judge(EventWindow(BOUND, timed=True), events), strict=True):
        if found != "late":
            newest[partition] = max(time, newest.get(partition, time))
        if key is None or found == "late":
            assert found != "repeat"
            continue
        if found == "repeat":
            assert key in taken
        elif key in taken:
            origin, first = taken[key]
            assert first < newest[origin] - BOUND
        if found == "new":
            taken[key] = (partition, time)


@given(EVENTS, st.integers(0, 60))
def test_what_is_kept_and_restored_goes_on_the_same(events: list[tuple[int, int, int | None]], stop: int) -> None:
    whole = judge(EventWindow(BOUND, timed=True), events)
    first, second = EventWindow(BOUND, timed=True), EventWindow(BOUND, timed=True)
    before = judge(first, events[:stop])
    second.restore(msgspec.msgpack.decode(msgspec.msgpack.encode(first.state())))
    assert before + judge(second, events[stop:]) == whole
    assert len(second) >= 0


@given(st.lists(st.integers(0, 400), max_size=30))
def test_a_batch_is_judged_like_one_after_another(times: list[int]) -> None:
    batch = EventWindow(BOUND, timed=True).late(("events", 0), np.array(times, dtype=np.int64)).tolist()
    single = EventWindow(BOUND, timed=True)
    assert batch == [bool(single.late(("events", 0), np.array([time]))[0]) for time in times]


def test_memory_does_not_grow_with_time() -> None:
    recent = EventWindow(BOUND, timed=True)
    for time in range(0, 100_000, 4):
        recent.repeated(("events", 0), [time], np.array([time]))
        recent.late(("events", 0), np.array([time]))
    assert len(recent) <= BOUND // 4 + BOUND // 8 + 2


def test_a_number_and_its_text_are_one_id() -> None:
    assert id_key(7) == id_key("7") != id_key("07")
