"""BM25 against its formula, and fused lists against theirs."""

import numpy as np
import pytest

from features.content.lexical import LexicalIndex, fuse
from features.content.terms import tokens

TEXTS = ["a robot in love", "the robot robot war", "", "ocean of love and an old ocean liner", "日本映画の話"]


@pytest.mark.parametrize("query", ["robot", "love robot", "the old ocean", "日本映画", "nothing known", ""])
def test_a_score_is_that_of_the_formula(query: str) -> None:
    """Lucene's BM25: idf log(1 + (N - n + .5) / (n + .5)), k1 = 1.2, b = .75."""
    terms = [tokens(text) for text in TEXTS]
    mean = np.mean([len(one) for one in terms])
    wanted = np.zeros(len(TEXTS))
    for term in tokens(query):
        holds = sum(term in one for one in terms)
        idf = np.log(1 + (len(TEXTS) - holds + 0.5) / (holds + 0.5))
        for row, one in enumerate(terms):
            count = one.count(term)
            wanted[row] += idf * count / (count + 1.2 * (1 - 0.75 + 0.75 * len(one) / mean))
    np.testing.assert_allclose(LexicalIndex(TEXTS).scores(query), wanted, rtol=1e-5)


def test_a_search_returns_only_texts_that_share_a_term() -> None:
    index = LexicalIndex(TEXTS)
    assert index.search("robot", 10).tolist() == [1, 0]
    assert index.search("robot", 1).tolist() == [1]
    assert index.search("unknown", 10).tolist() == []
    assert LexicalIndex(["", "the"]).search("robot", 3).tolist() == []


def test_an_item_that_two_lists_name_comes_before_the_best_of_one() -> None:
    lists = [np.array([7, 1, 2]), np.array([3, 1, 9])]
    assert fuse(lists, 3).tolist() == [1, 3, 7]
    assert fuse([*lists, np.array([], dtype=np.int64)], 1).tolist() == [1]
    assert fuse([], 3).tolist() == []
    sums = {1: 2 / 62, 3: 1 / 61, 7: 1 / 61, 2: 1 / 63, 9: 1 / 63}
    assert fuse(lists, 9).tolist() == sorted(sums, key=lambda number: (-sums[number], number))
