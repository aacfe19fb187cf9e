"""The law of distinct counts: a removed key takes its pairs along, as if they had never been met."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from features.aggregate.aggregator import Aggregator, Occasions
from features.aggregate.pairs import CountedPairs
from features.aggregate.plan import AggregatePlan, Aggregation
from features.aggregate.stored import aggregate_arrays, restore_aggregates
from features.errors import BundleError
from features.hashing import splitmix64
from features.history import Jagged

KEY, VALUE = st.integers(1, 5), st.integers(11, 14)
MET = st.lists(st.tuples(KEY, VALUE), max_size=12)
BY_USER, BY_ITEM = ("user",), ("item",)
PLAN = AggregatePlan(
    (
        Aggregation("variety", BY_USER, "distinct", column="device", windows=("all",)),
        Aggregation("reach", BY_ITEM, "distinct", column="user", windows=("all",)),
    )
)


def keys_of(numbers: Sequence[int]) -> NDArray[np.uint64]:
    return splitmix64(np.array(numbers, dtype=np.uint64))


class Twin:
    """Pairs as a set of tuples."""

    def __init__(self) -> None:
        self.pairs: set[tuple[int, int]] = set()

    def meet(self, met: list[tuple[int, int]]) -> list[int]:
        first = []
        for place, pair in enumerate(met):
            if pair not in self.pairs:
                first.append(place)
            self.pairs.add(pair)
        return first

    def remove(self, keys: list[int]) -> None:
        self.pairs = {pair for pair in self.pairs if pair[0] not in keys}


def met_by(pairs: CountedPairs, met: list[tuple[int, int]]) -> list[int]:
    keys, values = keys_of([key for key, _ in met]), keys_of([value for _, value in met])
    return sorted(pairs.meet(keys, values).tolist())


@given(st.lists(st.one_of(MET, st.sets(KEY)), max_size=8))
def test_pairs_are_those_of_a_set_of_tuples(acts: list[list[tuple[int, int]] | set[int]]) -> None:
    pairs, twin = CountedPairs(), Twin()
    for act in acts:
        if isinstance(act, set):
            pairs.remove(keys_of(sorted(act)), keys_of([]))
            twin.remove(sorted(act))
        else:
            assert met_by(pairs, act) == twin.meet(act)
    assert len(pairs) == len(twin.pairs)
    expected = {
        int(splitmix64(keys_of([key]) ^ keys_of([value]))[0]): int(keys_of([key])[0]) for key, value in twin.pairs
    }
    assert dict(zip(pairs.hashes.tolist(), pairs.owners.tolist(), strict=True)) == expected


@given(MET, MET, st.sets(KEY), st.sets(VALUE))
def test_pairs_without_an_owner_leave_with_a_known_value_or_when_they_were_met_again(
    old: list[tuple[int, int]], again: list[tuple[int, int]], removed: set[int], known: set[int]
) -> None:
    written, pairs = CountedPairs(), CountedPairs()
    met_by(written, old)
    pairs.restore(written.hashes, None)
    assert met_by(pairs, again) == met_by(written, again)
    pairs.remove(keys_of(sorted(removed)), keys_of(sorted(known)))
    left = {(key, value) for key, value in {*old, *again} if key not in removed}
    stuck = {(key, value) for key, value in set(old) - set(again) if key in removed and value not in known}
    hashes = {int(splitmix64(keys_of([key]) ^ keys_of([value]))[0]) for key, value in left | stuck}
    assert set(pairs.hashes.tolist()) == hashes


class Click(NamedTuple):
    time: int
    user: int
    item: int
    device: int


def clicks(start: int) -> st.SearchStrategy[list[Click]]:
    found = st.lists(st.tuples(KEY, KEY, VALUE), min_size=1, max_size=30)
    return found.map(lambda rows: [Click(start + place, *row) for place, row in enumerate(rows)])


def user_keys(users: Iterable[int]) -> NDArray[np.uint64]:
    return keys_of([100 + user for user in sorted(users)])


def occasions(events: list[Click]) -> Occasions:
    parts = {
        "user": keys_of([100 + event.user for event in events]),
        "item": keys_of([200 + event.item for event in events]),
        "device": keys_of([event.device for event in events]),
    }
    lists = {name: Jagged(keys.view(np.int64), np.arange(len(events) + 1)) for name, keys in parts.items()}
    ones = np.ones(len(events), dtype=np.bool_)
    return Occasions(np.array([event.time for event in events]), lists, ones.astype(np.float32), ones, {}, parts)


def state(aggregator: Aggregator, by: tuple[str, ...]) -> tuple[dict[int, list[int]], dict[int, int]]:
    held = aggregator.states[by]
    rows = dict(zip(held.keys.tolist(), held.rows.tolist(), strict=True))
    (pairs,) = (one for of, one in aggregator.pairs.items() if of[0] == by)
    return rows, dict(zip(pairs.hashes.tolist(), pairs.owners.tolist(), strict=True))


@given(clicks(0), clicks(100), st.sets(KEY, min_size=1), st.booleans())
def test_a_new_life_counts_as_if_there_had_been_no_other(
    events: list[Click], later: list[Click], removed: set[int], stored: bool
) -> None:
    found, twin = Aggregator(PLAN), Aggregator(PLAN)
    found.advance(occasions(events))
    if stored:
        again = Aggregator(PLAN)
        restore_aggregates(again, aggregate_arrays(found))
        found = again
    found.forget("user", {}, [user_keys([user]) for user in sorted(removed)])
    twin.advance(occasions([event for event in events if event.user not in removed]))
    assert state(found, BY_USER) == state(twin, BY_USER)
    answers = [one.advance(occasions(later))[0][:, 0].tolist() for one in (found, twin)]
    assert answers[0] == answers[1]
    # An aggregate without the user is shared, so the user still counts there, once.
    every = Aggregator(PLAN)
    every.advance(occasions(events))
    every.advance(occasions(later))
    assert state(found, BY_ITEM) == state(every, BY_ITEM)


@given(clicks(0), clicks(100), st.integers(1, 4))
def test_a_key_that_the_bound_removed_counts_its_values_again(
    events: list[Click], later: list[Click], most: int
) -> None:
    found = Aggregator(replace(PLAN, most_keys=most))
    found.advance(occasions(events))
    gone = set(found.shrink().get(BY_USER, keys_of([])).tolist())
    twin = Aggregator(PLAN)
    twin.advance(occasions([event for event in events if int(user_keys([event.user])[0]) not in gone]))
    assert state(found, BY_USER) == state(twin, BY_USER)
    assert np.array_equal(found.advance(occasions(later))[0][:, 0], twin.advance(occasions(later))[0][:, 0])


def test_a_state_whose_owners_do_not_fit_is_refused() -> None:
    found = Aggregator(PLAN)
    found.advance(occasions([Click(0, 1, 1, 1), Click(1, 2, 1, 1)]))
    arrays = aggregate_arrays(found)
    for name, wrong in (("aggregates.owners.0", arrays["aggregates.owners.0"][:1]), ("aggregates.pairs.1", None)):
        changed = {key: array for key, array in (arrays | {name: wrong}).items() if array is not None}
        with pytest.raises(BundleError, match=r"distinct count [01]: the state does not fit the plan"):
            restore_aggregates(Aggregator(PLAN), changed)
