"""The two twins of history: what the frame says at once is what the stream says one by one, and nothing leaks."""

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import history
from features.history import EventColumns, History, Jagged, history_frame, reach_of


class Event(NamedTuple):
    user: int
    item: int
    time: int
    positive: bool


LENGTHS = st.integers(1, 4)
# Any order of arrival, few users and times, so that ties and late events are common.
ANY_ORDER = st.lists(
    st.builds(Event, st.integers(0, 2), st.integers(0, 9), st.integers(-3, 6), st.booleans()), max_size=30
)
IN_TIME_ORDER = ANY_ORDER.map(
    lambda events: [
        event._replace(time=time)
        for event, time in zip(events, accumulate(max(0, event.time) // 3 for event in events), strict=True)
    ]
)


def columns(events: list[Event]) -> EventColumns:
    arrays = [np.array([event[field] for event in events], dtype=np.int64) for field in range(4)]
    return EventColumns(arrays[0], arrays[1], arrays[2], arrays[3].astype(bool))


def lists(jagged: Jagged) -> list[list[int]]:
    return [part.tolist() for part in np.split(jagged.values, jagged.offsets[1:-1])] if len(jagged.offsets) > 1 else []


def slow(events: list[Event], user: int, before: float, length: int) -> list[int]:
    """The rule as it is written: positives of the user, strictly earlier, by time and then by arrival; the last L."""
    earlier = [event for event in events if event.user == user and event.positive and event.time < before]
    return [event.item for event in sorted(earlier, key=lambda event: event.time)][-length:]


@given(IN_TIME_ORDER, LENGTHS)
def test_the_frame_is_the_online_step_before_each_event(events: list[Event], length: int) -> None:
    history, online = History(length), []
    for event in events:
        online.append(history.read(event.user, event.time))
        if event.positive:
            history.append(event.user, event.item, event.time)
    assert lists(history_frame(columns(events), length=length)) == online


@given(IN_TIME_ORDER, LENGTHS, st.integers(1, 7))
def test_batches_of_any_size_give_what_the_frame_gives_at_once(events: list[Event], length: int, size: int) -> None:
    history, online = History(length), []
    for start in range(0, len(events), size):
        before, changed = history.advance(columns(events[start : start + size]))
        online += lists(before)
        assert changed.tolist() == sorted({event.user for event in events[start : start + size] if event.positive})
    assert online == lists(history_frame(columns(events), length=length))


@given(ANY_ORDER, LENGTHS)
def test_the_frame_is_the_rule_in_any_order_of_rows(events: list[Event], length: int) -> None:
    expected = [slow(events, event.user, event.time, length) for event in events]
    assert lists(history_frame(columns(events), length=length)) == expected


@given(ANY_ORDER, LENGTHS, st.data())
def test_nothing_at_an_events_time_or_later_changes_its_history(
    events: list[Event], length: int, data: st.DataObject
) -> None:
    now = data.draw(st.integers(-3, 6))
    # Only the past is left, then a stranger future is put in its place.
    past = [event for event in events if event.time < now]
    future = data.draw(
        st.lists(st.builds(Event, st.integers(0, 2), st.integers(90, 99), st.integers(now, 20), st.just(True)))
    )
    asked = [Event(user, 0, now, True) for user in range(3)]
    found = lists(history_frame(columns([*past, *future, *asked]), length=length))[-3:]
    assert found == lists(history_frame(columns([*past, *asked]), length=length))[-3:]
    assert all(item < 90 for items in found for item in items)


@given(ANY_ORDER, LENGTHS)
def test_online_reads_from_the_newest_time_on_are_exact_even_when_events_arrive_late(
    events: list[Event], length: int
) -> None:
    history = History(length)
    arrived: list[Event] = []
    for event in (event for event in events if event.positive):
        history.append(event.user, event.item, event.time)
        arrived.append(event)
        newest = max(other.time for other in arrived if other.user == event.user)
        for time in (newest, newest + 1):
            assert history.read(event.user, time) == slow(arrived, event.user, time, length)
        assert history.latest(event.user) == slow(arrived, event.user, float("inf"), length)


@given(IN_TIME_ORDER, LENGTHS, st.integers(0, 30))
def test_a_history_restored_from_its_visits_answers_as_if_never_stopped(
    events: list[Event], length: int, stop: int
) -> None:
    history, restored = History(length), History(length)
    for event in events[:stop]:
        history.append(event.user, event.item, event.time)
    restored.advance(history.state())
    for event in events[stop:]:
        assert restored.read(event.user, event.time) == history.read(event.user, event.time)
        history.append(event.user, event.item, event.time)
        restored.append(event.user, event.item, event.time)
        assert restored.latest(event.user) == history.latest(event.user)
        assert restored.visits(event.user) == history.visits(event.user)


@given(ANY_ORDER, LENGTHS)
def test_no_history_is_longer_than_its_length_and_no_more_than_twice_it_is_kept(
    events: list[Event], length: int
) -> None:
    history = History(length)
    for event in events:
        history.append(event.user, event.item, event.time)
        assert len(history.latest(event.user)) <= length
        assert len(history.visits(event.user)) <= 2 * length
    assert all(len(items) <= length for items in lists(history_frame(columns(events), length=length)))


def test_events_at_the_same_time_never_see_each_other_and_keep_their_order_of_arrival() -> None:
    events = [Event(0, 1, 5, True), Event(0, 2, 5, True), Event(0, 3, 5, True), Event(0, 4, 6, True)]
    assert lists(history_frame(columns(events), length=3)) == [[], [], [], [1, 2, 3]]
    swapped = [events[1], events[0], *events[2:]]
    assert lists(history_frame(columns(swapped), length=3)) == [[], [], [], [2, 1, 3]]


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=6),
    st.lists(st.integers(0, 99), max_size=9),
)
def test_taking_from_a_jagged_array_is_indexing_a_list(rows: list[list[int]], picks: list[int]) -> None:
    index = [pick % len(rows) for pick in picks]
    flat = np.array([value for row in rows for value in row], dtype=np.int64)
    jagged = Jagged(flat, np.cumsum([0, *map(len, rows)]))
    taken = jagged.take(np.array(index, dtype=np.int64))
    assert lists(taken) == [rows[place] for place in index]
    assert len(taken.offsets) == len(index) + 1


def test_a_history_of_no_length_is_refused() -> None:
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        History(0)


@given(ANY_ORDER, LENGTHS, st.integers(1, 6))
def test_user_partitions_give_what_the_frame_gives_at_once(events: list[Event], length: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(history, "_PARTITION", size)
        found = history.history_by_user(columns(events), length=length)
    expected = history_frame(columns(events), length=length)
    assert found.offsets.tolist() == expected.offsets.tolist()
    assert found.values.tolist() == expected.values.tolist()


@given(IN_TIME_ORDER, LENGTHS, st.integers(1, 5), st.integers(1, 7))
def test_a_lagging_history_sees_no_event_whose_label_is_unknown(
    events: list[Event], length: int, lag: int, batch: int
) -> None:
    expected = []
    for event in events:
        newest = [
            one
            for one in sorted(events, key=lambda one: one.time)
            if one.user == event.user and one.positive and one.time < event.time
        ][-reach_of(length, lag) :]
        expected.append([one.item for one in newest if one.time < event.time - lag][-length:])
    assert lists(history_frame(columns(events), length=length, lag=lag)) == expected
    online, found = History(length, lag=lag), []
    for start in range(0, len(events), batch):
        found += lists(online.advance(columns(events[start : start + batch]))[0])
    assert found == expected
