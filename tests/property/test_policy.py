"""Laws of policies: the fast arrangement is that of the slow twin, and each rule holds in every answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.shown.policy import Boost, Diversity, NewItems, PinnedPlace, Policy
from features.value.filter import Filter
from serving.policy.arrange import (
    Arrangement,
    PolicyInputs,
    ValueGroups,
    arrange,
    drawn_of,
    places_of,
    spread,
)
from serving.policy.reference import arranged_slowly

ANY = Filter(column="year", gte=0)


@st.composite
def requests(draw: st.DrawFn) -> tuple[PolicyInputs, Policy, int]:
    """Draws candidates, a policy, and the length of an answer. Values are few, so that ties occur."""
    n = draw(st.integers(0, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pins = draw(st.lists(st.integers(1, 12), unique=True, max_size=3))
    by = draw(st.sampled_from([None, "content", "semantic-id"]))
    most = draw(st.one_of(st.none(), st.integers(1, 4)))
    lengths = rng.integers(0, 4, n)
    codes = [rng.choice(5, length, replace=False) for length in lengths]
    # Dot products of these vectors are exact, so that the twins break ties alike.
    vectors = rng.integers(-2, 3, (n, 4)).astype(np.float32) / 4
    inputs = PolicyInputs(
        relevance=rng.integers(0, 8, n) / 4,
        consumed=rng.random(n) < 0.2,
        boosts=np.where(rng.random(n) < 0.3, 0.5, 0.0),
        pinned=[rng.random(n) < 0.3 for _ in pins],
        new=rng.random(n) < 0.4,
        vectors=vectors if by == "content" else None,
        semantic_ids=rng.integers(-1, 3, (n, 3)) if by == "semantic-id" else None,
        groups=ValueGroups(np.concatenate([[], *codes]).astype(np.int64), np.concatenate([[0], np.cumsum(lengths)]))
        if most
        else None,
    )
    diversity = None
    if by or most:
        diversity = Diversity(
            by=by,
            weight=draw(st.sampled_from([0.25, 0.5, 1.0])) if by else None,
            column="genre" if most else None,
            most=most,
        )
    policy = Policy(
        diversity=diversity,
        pin=tuple(PinnedPlace(filter=ANY, position=position) for position in pins),
        new=NewItems(share=draw(st.sampled_from([0.1, 0.25, 1.0]))) if draw(st.booleans()) else None,
    )
    return inputs, policy, draw(st.integers(1, 16))


@settings(max_examples=400)
@given(requests(), st.text(max_size=4))
def test_the_arrangement_is_that_of_the_slow_twin(request: tuple[PolicyInputs, Policy, int], text: str) -> None:
    inputs, policy, k = request
    assert arrange(inputs, policy, k, draw=text).order.tolist() == arranged_slowly(inputs, policy, k, draw=text)


@settings(max_examples=200)
@given(requests())
def test_every_rule_holds(request: tuple[PolicyInputs, Policy, int]) -> None:
    inputs, policy, k = request
    found = arrange(inputs, policy, k, draw="x")
    order = found.order.tolist()
    assert len(set(order)) == len(order) <= k
    assert not inputs.consumed[found.order].any()
    assert sorted(found.consumed.tolist()) == np.flatnonzero(inputs.consumed).tolist()
    size = min(k, int((~inputs.consumed).sum()))
    if inputs.groups is None or policy.diversity is None or policy.diversity.most is None:
        assert len(order) == size
    else:
        _hold_cap(inputs.groups, policy.diversity.most, found)
    for rule, matches in zip(policy.pin, inputs.pinned, strict=True):
        if rule.position <= len(order) and found.pinned[rule.position - 1] and len(order) == size:
            assert matches[order[rule.position - 1]]
    if policy.new is None:
        assert not found.drawn.any()
        return
    new = int((inputs.new & ~inputs.consumed).sum())
    pinned_new = int(inputs.new[found.order[found.pinned]].sum())
    wanted = min(places_of(policy.new.share, size), new - pinned_new, size - int(found.pinned.sum()))
    assert int(found.drawn.sum()) == wanted
    assert inputs.new[found.order[found.drawn]].all()
    np.testing.assert_allclose(found.propensities[found.drawn], wanted / max(new - pinned_new, 1))
    assert (found.propensities[~found.drawn] == 1).all()


def _hold_cap(groups: ValueGroups, most: int, found: Arrangement) -> None:
    """Asserts that no value has more items than the cap, or than pins and chance placed."""
    fixed = found.pinned | found.drawn
    for code in np.unique(groups.codes):
        having = np.array([code in groups.of(each) for each in found.order], dtype=np.bool_)
        assert having.sum() <= max(most, int((having & fixed).sum()))


@given(st.integers(1, 40), st.data())
def test_an_empty_policy_keeps_the_order_of_the_scores(n: int, data: st.DataObject) -> None:
    scores = np.array(data.draw(st.lists(st.sampled_from([0.1, 0.2, 0.5]), min_size=n, max_size=n)))
    none = np.zeros(n, dtype=np.bool_)
    inputs = PolicyInputs(np.log(scores), none, np.zeros(n), [], none)
    assert arrange(inputs, Policy(), n, draw="").order.tolist() == np.argsort(-scores, kind="stable").tolist()


def test_chance_gives_each_new_item_the_probability_that_it_names() -> None:
    counts = np.zeros(7)
    for request in range(7_000):
        counts[drawn_of(str(request), 7, 2)] += 1
    # A share of 2/7 of 7,000 draws has a standard deviation of 38.
    assert np.abs(counts - 2_000).max() < 4 * 38


@pytest.mark.parametrize(
    ("share", "size", "places"), [(0.1, 30, 3), (0.1, 31, 4), (0.3, 10, 3), (1.0, 5, 5), (0.01, 3, 1)]
)
def test_a_share_is_rounded_up_to_whole_places(share: float, size: int, places: int) -> None:
    assert places_of(share, size) == places


@given(st.integers(1, 50), st.data())
def test_places_of_chance_are_distinct_and_reach_the_last_place(free: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, free))
    found = spread(free, count)
    assert len(set(found.tolist())) == count
    assert found.min() >= 0
    assert found[-1] == free - 1


def test_boosts_and_places_are_told() -> None:
    none = np.zeros(3, dtype=np.bool_)
    inputs = PolicyInputs(np.log([4.0, 3.0, 1.0]), none, np.log([1.0, 2.0, 1.0]), [], none)
    found = arrange(inputs, Policy(boost=(Boost(filter=ANY, times=2),)), 2, draw="")
    assert found.order.tolist() == [1, 0]
    assert found.places.tolist() == [2, 1]
    np.testing.assert_allclose(found.boosts, [2.0, 1.0])
