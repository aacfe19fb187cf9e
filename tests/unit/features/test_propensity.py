"""Propensities by position: what chance arranged shows the examination, and nothing else does."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.shown.join import ShownRow
from features.shown.propensity import Explored, explored_sets, propensities

CURVE = np.array([1.0, 0.6, 0.4, 0.25])


def rows_of(count: int, seed: int, *, shuffled: bool = False) -> list[ShownRow]:
    """Impressions of four items, best first, of which chance swaps a pair of neighbours or shuffles all."""
    rng = np.random.default_rng(seed)
    found: list[ShownRow] = []
    for number in range(count):
        relevance = np.sort(rng.beta(1, 2, 4))[::-1]
        explored: tuple[int, ...] = ()
        if shuffled:
            relevance, explored = rng.permutation(relevance), (0, 1, 2, 3)
        elif rng.random() < 0.9:
            first = int(rng.integers(0, 3))
            explored = (first, first + 1)
            if rng.random() < 0.5:
                relevance[[first, first + 1]] = relevance[[first + 1, first]]
        clicks = rng.random(4) < CURVE * relevance
        found += [
            ShownRow(0, f"r{number}", "u", f"i{place}", 0, place, "", (int(clicks[place]),), 0, explored=explored)
            for place in range(4)
        ]
    return found


@pytest.mark.parametrize("shuffled", [False, True])
def test_intervals_cover_the_true_curve(shuffled: bool) -> None:
    inside, trials = 0, 40
    for seed in range(trials):
        curve = propensities(explored_sets(rows_of(1_500, seed, shuffled=shuffled)))
        assert [one.position for one in curve] == [0, 1, 2, 3]
        assert (curve[0].value, curve[0].low, curve[0].high) == (1.0, 1.0, 1.0)
        for one, true in zip(curve[1:], CURVE[1:], strict=True):
            assert one.low is not None
            assert one.high is not None
            inside += one.low <= true <= one.high
    assert 0.90 <= inside / (3 * trials) <= 0.995


def test_clicks_by_position_alone_would_be_wrong() -> None:
    rows = [row for seed in range(10) for row in rows_of(1_500, seed)]
    clicks, shown = np.zeros(4), np.zeros(4)
    for row in rows:
        clicks[row.position] += row.labels[0]
        shown[row.position] += 1
    naive = clicks / shown / (clicks[0] / shown[0])
    (last,) = [one for one in propensities(explored_sets(rows)) if one.position == 3]
    assert last.value is not None
    assert abs(last.value - CURVE[3]) < 0.05 < abs(naive[3] - CURVE[3])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500))
def test_one_pair_equals_the_ratio_of_clicks(first: int, second: int) -> None:
    sets = {(0, 1): Explored(1_000, clicks_of({0: first, 1: second}))}
    _, one = propensities(sets)
    ratio = (second + 0.5) / (first + 0.5)
    deviation = math.sqrt(1 / (first + 0.5) + 1 / (second + 0.5))
    assert one.value == pytest.approx(ratio, rel=1e-6)
    assert one.low == pytest.approx(ratio * math.exp(-1.959964 * deviation), rel=1e-5)


def test_a_position_that_no_chain_joins_with_the_first_is_not_estimated() -> None:
    sets = {
        (0, 1): Explored(50, clicks_of({0: 9, 1: 4})),
        (3, 4): Explored(50, clicks_of({3: 5, 4: 5})),
        (5, 6): Explored(9, clicks_of({})),
    }
    found = {one.position: one for one in propensities(sets)}
    assert [position for position, one in found.items() if one.value is not None] == [0, 1]
    assert (found[4].shown, found[4].clicks, found[6].shown) == (50, 5, 9)
    apart = propensities({(3, 4): Explored(50, clicks_of({3: 5, 4: 5}))})
    assert [one.value for one in apart] == [None, None]


def test_without_exploration_nothing_is_estimated() -> None:
    rows = [row._replace(explored=()) for row in rows_of(200, 1)]
    assert explored_sets(rows) == {}
    assert propensities({}) == []


def clicks_of(counts: dict[int, int]) -> Counter[int]:
    return Counter(counts)
