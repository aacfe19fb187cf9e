"""Lists are fused by their ranks: the fast way gives what a slow one gives, and popular items answer alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.retrieval.fusion import RankedList, fuse_lists, source_of
from serving.retrieval.search_plan import POPULAR, SearchPlan

EXACT, FALLBACK = SearchPlan("exact", 1.0), SearchPlan(POPULAR, 1.0)
orders = st.lists(st.integers(0, 12), unique=True, max_size=13)
weights = st.sampled_from([1.0, 0.5, 10.0])


def ranked(name: str, numbers: list[int], weight: float = 1.0, plan: SearchPlan = EXACT) -> RankedList:
    scores = np.linspace(0.9, 0.1, len(numbers), dtype=np.float32)
    return RankedList(name, np.array(numbers, dtype=np.int64), scores, plan, weight)


def slowly(lists: list[RankedList], k: int) -> list[tuple[int, float, dict[str, int]]]:
    """Fuses lists as the paper writes it, one item after another."""
    sums: dict[int, float] = {}
    ranks: dict[int, dict[str, int]] = {}
    for one in lists:
        for rank, item in enumerate(one.numbers.tolist(), 1):
            sums[item] = sums.get(item, 0.0) + one.weight / (60 + rank)
            ranks.setdefault(item, {})[one.name] = rank
    return [(item, sums[item], ranks[item]) for item in sorted(sums, key=lambda item: (-sums[item], item))][:k]


@given(orders, orders, weights, weights, st.integers(1, 15))
def test_fused_lists_are_those_of_the_slow_twin(
    first: list[int], second: list[int], weight: float, other: float, k: int
) -> None:
    lists = [ranked("towers", first, weight), ranked("content", second, other)]
    found = fuse_lists(lists, k)
    expected = slowly(lists, k)
    assert found.numbers.tolist() == [item for item, _, _ in expected]
    if expected:
        assert found.scores == pytest.approx([score for _, score, _ in expected], rel=1e-6)
        assert found.lists == ("towers", "content")
    assert list(found.ranks) == [ranks for _, _, ranks in expected]


@given(orders, st.integers(1, 15))
def test_one_list_keeps_its_own_scores(numbers: list[int], k: int) -> None:
    found = fuse_lists([ranked("content", numbers)], k)
    assert found.numbers.tolist() == numbers[:k]
    assert found.scores.tolist() == ranked("content", numbers).scores[:k].tolist()
    assert list(found.ranks) == [{"content": place} for place in range(1, len(numbers[:k]) + 1)]
    assert found.lists == ("content",)


def test_the_most_popular_items_are_fused_with_nothing() -> None:
    popular = ranked("content", [1, 2, 3], plan=FALLBACK)
    beside = fuse_lists([ranked("towers", [7, 8]), popular], 5)
    assert (beside.numbers.tolist(), beside.lists) == ([7, 8], ("towers",))
    alone = fuse_lists([ranked("towers", []), popular], 2)
    assert (alone.numbers.tolist(), alone.lists, alone.plan) == ([1, 2], (), FALLBACK)
    assert [source_of(ranks) for ranks in alone.ranks] == [POPULAR, POPULAR]


def test_a_source_is_named_by_the_lists_that_found_the_item() -> None:
    found = fuse_lists([ranked("towers", [1, 2]), ranked("content", [2, 3])], 3)
    assert {item: source_of(ranks) for item, ranks in zip(found.numbers.tolist(), found.ranks, strict=True)} == {
        2: "both",
        1: "towers",
        3: "content",
    }
