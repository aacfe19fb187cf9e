"""The live lexical index gives the bits of an index built again, and the scores of BM25."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.content.lexical import MOST_TERMS, LexicalIndex, pack_terms, term_ids, unpack_terms
from serving.retrieval import words
from serving.retrieval.words import WordIndex

TEXTS = ["a robot learns to dance", "robot robot war", "war and peace", "機械が踊る話", "dance of the bees", "peace"]
QUERY = term_ids("robot dance peace")


def _found(index: WordIndex, query: np.ndarray = QUERY, k: int = 10) -> tuple[list[int], bytes]:
    numbers, scores = index.search(query, k)
    return numbers.tolist(), scores.tobytes()


def test_the_scores_are_those_of_the_slow_twin() -> None:
    index = WordIndex(term_ids(text) for text in TEXTS)
    for query in ("robot", "robot dance dance", "踊る", "peace war", "nothing"):
        twin = LexicalIndex(TEXTS)
        numbers, scores = index.search(term_ids(query), 10)
        assert numbers.tolist() == twin.search(query, 10).tolist()
        np.testing.assert_allclose(scores, twin.scores(query)[numbers], rtol=1e-5)


_TEXT = st.lists(st.sampled_from(["robot", "dance", "peace", "war", "bees"]), max_size=4).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    start=st.lists(_TEXT, max_size=5),
    changes=st.lists(st.lists(st.tuples(st.integers(0, 9), _TEXT), min_size=1, max_size=4), max_size=6),
    merge=st.booleans(),
)
def test_an_index_that_followed_changes_equals_an_index_built_again(
    start: list[str], changes: list[list[tuple[int, str]]], merge: bool
) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(words, "_LEAST_FRESH", 0 if merge else 1_000)
    with patch.context():
        index = WordIndex(term_ids(text) for text in start)
        now = dict(enumerate(start))
        for batch in changes:
            now |= dict(batch)
            index.put(np.array([number for number, _ in batch]), [term_ids(text) for _, text in batch])
            index.settle()
    patch.undo()
    again = WordIndex(term_ids(now.get(number, "")) for number in range(max(now, default=-1) + 1))
    assert _found(index) == _found(again)
    assert index.size == again.size


def test_items_that_change_while_arrays_are_built_keep_the_newer_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_LEAST_FRESH", 0)
    index = WordIndex(term_ids(text) for text in TEXTS)
    merged = words._merged

    def while_building(*parts: object) -> object:
        monkeypatch.setattr(words, "_merged", merged)
        index.put(np.array([0, 9]), [term_ids("bees"), term_ids("robot")])
        return merged(*parts)  # type: ignore[arg-type]

    monkeypatch.setattr(words, "_merged", while_building)
    index.put(np.array([1]), [term_ids("peace")])
    index.settle()
    again = WordIndex(term_ids(text) for text in ["bees", "peace", *TEXTS[2:], "", "", "", "robot"])
    assert _found(index) == _found(again)
    assert set(index._fresh) == {0, 9}


def test_a_filter_judges_the_best_first_and_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_JUDGED", 2)
    index = WordIndex(term_ids("robot " + "filler " * number) for number in range(10))
    judged: list[int] = []

    def odd(numbers: np.ndarray) -> np.ndarray:
        judged.extend(numbers.tolist())
        return np.asarray(numbers % 2 == 1)

    assert index.search(term_ids("robot"), 2, odd)[0].tolist() == [1, 3]
    assert judged == [0, 1, 2, 3]


def test_terms_survive_their_bytes_up_to_the_bound() -> None:
    long = " ".join(f"word{number}" for number in range(2 * MOST_TERMS))
    assert len(term_ids(long)) == MOST_TERMS
    assert (unpack_terms(pack_terms(long)) == term_ids(long)).all()
    assert pack_terms("the") == b""
    other = pack_terms("robot")
    assert not len(unpack_terms(np.array([99, 7], dtype="<u4").tobytes()))
    assert not len(unpack_terms(b"\x01"))
    assert len(unpack_terms(other)) == 1
