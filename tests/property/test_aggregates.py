"""One law for aggregates: a loop over single events, batches of any cut, and the frame give the same numbers."""

import itertools
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from features.aggregate.halving import HALF_LIVES, weights
from features.aggregate.key_map import NOT_THERE, KeyMap
from features.aggregate.reference import Loop as Reference
from features.aggregate.state import GroupState, KeySums, tile_us
from features.aggregate.together import GroupEvents, advance_groups, read_groups

WINDOWS, HALF_LIVES_US = (48, 2_400), (3, 50)


class Event(NamedTuple):
    key: int
    time: int
    label: int
    enters: bool


# Few keys and times, so that ties, late events and the edges of tiles and epochs are common.
EVENTS = st.lists(
    st.builds(
        Event,
        st.integers(0, 2),
        st.one_of(st.integers(0, 12), st.integers(40, 60), st.integers(-5_000, 5_000)),
        st.integers(0, 1),
        st.sampled_from([True, True, True, False]),
    ),
    max_size=40,
)

FAR = st.one_of(st.integers(-100, 100), st.sampled_from([-(2**59), 2**59]))


class Loop:
    """The law as it is written, one event after another."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[int, tuple[int, int]]]] = {}

    def step(self, event: Event) -> list[float]:
        past = self.seen.setdefault(event.key, [])
        moment = max(event.time, past[-1][0]) if past else event.time
        before = [(time, value) for time, value in past if time < moment]
        answer: list[float] = [sum(value[channel] for _, value in before) for channel in (0, 1)]
        for window in WINDOWS:
            tile = tile_us(window)
            start = (moment - window) // tile * tile
            inside = [value for time, value in before if time // tile * tile >= start]
            answer += [sum(value[channel] for value in inside) for channel in (0, 1)]
        for half_life in HALF_LIVES_US:
            answer += self._decayed(before, moment, half_life)
        answer.append(moment - before[-1][0] if before else -1)
        if event.enters:
            past.append((moment, (1, event.label)))
        return answer

    @staticmethod
    def _decayed(before: list[tuple[int, tuple[int, int]]], moment: int, half_life: int) -> list[float]:
        sums, epoch, length = [0, 0], None, HALF_LIVES * half_life
        for time, value in before:
            passed = 0 if epoch is None else time // length - epoch
            epoch = time // length
            weight = int(weights(np.array([time]), half_life)[0])
            sums = [(old >> min(HALF_LIVES * passed, 62)) + weight * new for old, new in zip(sums, value, strict=True)]
        passed = 0 if epoch is None else moment // length - epoch
        now = int(weights(np.array([moment]), half_life)[0])
        return [(one >> min(HALF_LIVES * passed, 62)) / now for one in sums]


def group_events(events: list[Event]) -> GroupEvents:
    columns = [np.array([event[field] for event in events], dtype=np.int64) for field in range(4)]
    keys, times, labels, enters = columns
    values = np.stack([np.ones(len(events), dtype=np.int64), labels], axis=1)
    nothing = np.zeros((len(events), 0), dtype=np.int64)
    return GroupEvents(keys.astype(np.uint64), times, values, enters.astype(np.bool_), nothing)


def rows_of(sums: KeySums) -> list[list[float]]:
    return np.hstack([sums.every, *sums.windows, *sums.decayed, sums.since[:, None]]).tolist()


def answers(state: GroupState, events: list[Event]) -> list[list[float]]:
    return rows_of(state.advance(*group_events(events)))


def fresh() -> GroupState:
    return GroupState(2, WINDOWS, HALF_LIVES_US)


@given(EVENTS)
def test_one_batch_gives_what_a_loop_gives(events: list[Event]) -> None:
    loop = Loop()
    assert answers(fresh(), events) == [loop.step(event) for event in events]


def expected_of(events: list[Event]) -> list[list[float]]:
    reference = Reference(2, WINDOWS, HALF_LIVES_US)
    found: list[list[float]] = []
    for event in events:
        answer = reference.step(event.key, event.time, [1, event.label], event.enters)
        numbers = itertools.chain(answer.every, *answer.windows, *answer.decayed, [answer.since])
        found.append([float(number) for number in numbers])
    return found


@given(EVENTS)
def test_one_batch_gives_what_the_reference_gives(events: list[Event]) -> None:
    assert answers(fresh(), events) == expected_of(events)


@given(st.lists(st.builds(Event, st.integers(0, 7), FAR, st.integers(0, 1), st.booleans()), max_size=30))
def test_times_that_are_far_apart_change_nothing(events: list[Event]) -> None:
    far = [Event(key, time, 1, True) for key, time in enumerate((-(2**59), 2**59) * 2)]
    assert answers(fresh(), far + events) == expected_of(far + events)


@given(EVENTS, st.lists(st.integers(0, 40), max_size=5))
def test_any_cut_into_batches_gives_the_same_bits_and_the_same_state(events: list[Event], cuts: list[int]) -> None:
    whole, parts = fresh(), fresh()
    expected = answers(whole, events)
    edges = [0, *sorted(cuts), len(events)]
    found = [row for start, stop in itertools.pairwise(edges) for row in answers(parts, events[start:stop])]
    assert found == expected
    assert np.array_equal(parts.take(whole.keys), whole.rows)


@given(st.lists(st.integers(1, 12_000), max_size=3), st.sampled_from([-1, 1]))
@settings(max_examples=10, deadline=None)
def test_sums_beyond_their_bound_stay_at_it_and_never_wrap(cuts: list[int], sign: int) -> None:
    count, most = 12_000, 10**15
    state = GroupState(1, windows_us=(2_400,))
    keys, times = np.zeros(count, dtype=np.uint64), np.arange(count) // 2_000
    values, enters = np.full((count, 1), sign * most), np.ones(count, dtype=np.bool_)
    found = []
    for start, stop in itertools.pairwise([0, *sorted(cuts), count]):
        part = slice(start, stop)
        found.append(state.advance(keys[part], times[part], values[part], enters[part]))
    every = np.concatenate([sums.every[:, 0] for sums in found])
    window = np.concatenate([sums.windows[0][:, 0] for sums in found])
    # A key's sum holds the events of its newest time too, which do not see each other and are taken off.
    below = times < 2**62 // (2_000 * most)
    assert np.array_equal(sign * every[below], 2_000 * most * times[below])
    assert ((sign * every[~below] >= 2**62 - 2_000 * most) & (sign * every[~below] <= 2**62 + 2**56)).all()
    assert ((sign * window >= 0) & (sign * window <= 25 * 2**58)).all()


@given(st.lists(st.tuples(st.booleans(), EVENTS, EVENTS), min_size=1, max_size=4))
def test_groups_that_share_a_pass_are_as_if_alone(groups: list[tuple[bool, list[Event], list[Event]]]) -> None:
    def states() -> list[GroupState]:
        return [fresh() if plain else GroupState(2, WINDOWS[:1], HALF_LIVES_US) for plain, _, _ in groups]

    joint, alone = states(), states()
    for turn in (1, 2):
        batches = [group[turn] for group in groups]
        found = advance_groups(joint, [group_events(batch) for batch in batches])  # type: ignore[arg-type]
        assert [rows_of(sums) for sums in found] == list(map(answers, alone, batches))  # type: ignore[arg-type]
    for one, other in zip(joint, alone, strict=True):
        assert np.array_equal(one.keys, other.keys)
        assert np.array_equal(one.rows, other.rows)


@given(EVENTS, EVENTS)
def test_rows_alone_continue_a_state(events: list[Event], later: list[Event]) -> None:
    state, copy = fresh(), fresh()
    answers(state, events)
    copy.put(state.keys, state.rows.copy())
    assert answers(copy, later) == answers(state, later)


@given(EVENTS)
def test_a_question_changes_nothing(events: list[Event]) -> None:
    state = fresh()
    answers(state, events)
    rows = state.rows.copy()
    answers(state, [event._replace(enters=False) for event in events])
    assert len(state) == len(rows)
    assert np.array_equal(state.rows, rows)


@given(st.lists(st.tuples(EVENTS, EVENTS), min_size=1, max_size=3))
def test_a_question_is_answered_as_an_event_that_never_enters(groups: list[tuple[list[Event], list[Event]]]) -> None:
    def numbers(events: list[Event]) -> GroupEvents:
        given = np.array([[event.time % 7, -event.time % 5] for event in events], dtype=np.int64).reshape(-1, 2)
        return group_events(events)._replace(numbers=given)

    states = [GroupState(2, WINDOWS, HALF_LIVES_US, ("max", "last")) for _ in groups]
    for state, (past, _) in zip(states, groups, strict=True):
        state.advance(*numbers(past))
    questions = [numbers([one._replace(enters=False) for one in asked]) for _, asked in groups]
    found = read_groups(states, questions)
    for sums, state, question in zip(found, states, questions, strict=True):
        expected = state.advance(*question)
        assert rows_of(sums) == rows_of(expected)
        assert np.array_equal(sums.extremes, expected.extremes)


@given(st.lists(st.integers(0, 2_000_000_000_000), min_size=1), st.sampled_from([3_600_000_000, 604_800_000_000]))
def test_decay_is_within_its_stated_error(gaps: list[int], half_life: int) -> None:
    times = np.sort(np.array(gaps, dtype=np.int64))
    state = GroupState(1, (), (half_life,))
    keys, ones = np.zeros(len(times), dtype=np.uint64), np.ones((len(times), 1), dtype=np.int64)
    state.advance(keys, times, ones, np.ones(len(times), dtype=np.bool_))
    moment = int(times[-1]) + 1
    found = float(state.read(keys[:1], np.array([moment])).decayed[0][0, 0])
    exact = float(np.sum(0.5 ** ((moment - times) / half_life)))
    # A weight is at most 0.017 % too small, and what is older than 16 half-lives is cut at 20 binary places.
    assert abs(found - exact) <= 4e-4 * exact + len(times) * 2.0**-16


@given(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=30), max_size=8))
def test_a_key_map_numbers_keys_by_arrival(batches: list[list[int]]) -> None:
    numbers, expected = KeyMap(), dict[int, int]()
    for batch in batches:
        found = numbers.put(np.array(batch, dtype=np.uint64))
        assert found.tolist() == [expected.setdefault(key, len(expected)) for key in batch]
    assert len(numbers) == len(expected)
    assert numbers.find(np.array([1, 2], dtype=np.uint64)).tolist() == [expected.get(k, NOT_THERE) for k in (1, 2)]
