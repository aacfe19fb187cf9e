"""Exploration swaps two neighbours by a hash of the request, and says which, whether they were swapped or not."""

from collections import Counter

from serving.ranking.answer import RankingAnswer
from serving.traffic.explore import arranged

ITEMS = [(f"i{place}", 1 - place / 10) for place in range(6)]


def answer(count: int = 6, *, reasons: bool = False) -> RankingAnswer:
    given = [{"price": 0.1}] if reasons else []
    sent = {"device": "phone"}, {"price": [score for _, score in ITEMS[:count]]}
    return RankingAnswer("b", ITEMS[:count], True, [], False, False, given, sent=sent)


def test_a_share_is_explored_and_half_of_it_swapped_at_each_pair() -> None:
    pairs, swapped = Counter[int](), Counter[int]()
    for number in range(20_000):
        shown, positions = arranged(f"request-{number}", answer(), rate=0.2)
        if not positions:
            assert shown.items == ITEMS
            continue
        assert shown.sent[1]["price"] == [score for _, score in shown.items]
        first, second = positions
        assert second == first + 1
        pairs[first] += 1
        moved = [place for place in range(6) if shown.items[place] != ITEMS[place]]
        assert moved in ([], positions)
        swapped[first] += bool(moved)
        assert sorted(shown.items, key=lambda pair: -pair[1]) == ITEMS
    assert abs(sum(pairs.values()) / 20_000 - 0.2) < 0.015
    for first in range(5):
        assert abs(pairs[first] / sum(pairs.values()) - 0.2) < 0.03
        assert abs(swapped[first] / pairs[first] - 0.5) < 0.07


def test_all_servers_take_the_same_decision() -> None:
    ids = [f"r{number}" for number in range(200)]
    assert [arranged(name, answer(), rate=0.5) for name in ids] == [arranged(name, answer(), rate=0.5) for name in ids]


def test_what_a_person_reads_and_a_single_item_stay_as_they_are() -> None:
    for number in range(50):
        for given in (answer(reasons=True), answer(1), answer(0)):
            assert arranged(f"r{number}", given, rate=1.0) == (given, [])


def test_without_a_rate_nothing_is_explored() -> None:
    assert all(arranged(f"r{number}", answer(), rate=0.0) == (answer(), []) for number in range(50))
