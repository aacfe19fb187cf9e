"""The index finds what an exact scan does, within its recall, under filters and while vectors come and go."""

import time

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from serving.retrieval.filter import Attributes
from serving.retrieval.index import VectorIndex
from serving.retrieval.retriever import Searcher
from serving.retrieval.rows import ROW_KINDS, RowKind

SIZE, DIM = 6_000, 16


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, DIM))
    return unit(centres[rng.integers(0, 60, SIZE)] + 0.4 * rng.standard_normal((SIZE, DIM)))


def nearest(vectors: np.ndarray, query: np.ndarray, k: int, held: np.ndarray) -> set[int]:
    scores = np.where(held, vectors @ query, -np.inf)
    return set(np.argsort(-scores)[: min(k, int(held.sum()))].tolist())


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.01, 0.001])
def test_recall_within_the_filter_is_kept_at_every_share(vectors: np.ndarray, share: float) -> None:
    index, rng = VectorIndex(vectors), np.random.default_rng(1)
    held = rng.random(SIZE) < share
    held[:3] = True
    matches = index.matches(held) if share < 1 else None
    hits = total = 0
    for query in unit(vectors[rng.integers(0, SIZE, 50)] + 0.1 * rng.standard_normal((50, DIM))):
        found, scores, plan = index.search(query, 50, matches)
        truth = nearest(vectors, query, 50, held if matches else np.ones(SIZE, dtype=bool))
        assert np.allclose(scores, vectors[found] @ query, atol=1e-6)
        assert (np.diff(scores) <= 0).all()
        assert matches is None or held[found].all()
        hits, total = hits + len(truth & set(found.tolist())), total + len(truth)
        assert plan.why
    assert hits / total >= 0.95
    assert plan.method == (
        "ivf" if share == 1 else "ivf+filter" if share >= 0.5 else "exact" if share <= 0.01 else plan.method
    )


def test_matches_far_from_the_query_are_found_all_the_same(vectors: np.ndarray) -> None:
    index = VectorIndex(vectors)
    query = vectors[0]
    far = np.argsort(vectors @ query)[: SIZE // 3]
    held = np.zeros(SIZE, dtype=bool)
    held[far] = True
    found, *_ = index.search(query, 20, index.matches(held))
    assert len(found) == 20
    assert held[found].all()


def test_what_is_changed_added_and_removed_is_found_as_in_a_new_index(vectors: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    index, now = VectorIndex(vectors[:5_000]), np.zeros((SIZE, DIM), dtype=np.float32)
    now[:5_000] = vectors[:5_000]
    for _ in range(5):
        chosen = rng.choice(SIZE, 400, replace=False)
        new = unit(rng.standard_normal((400, DIM)))
        new[:100] = 0
        index.put(chosen, new)
        now[chosen] = new
    present = now.any(axis=1)
    assert index.size == present.sum()
    fresh = VectorIndex(now)
    for query in unit(rng.standard_normal((30, DIM))):
        held = rng.random(SIZE) < 0.02
        for one in (index, fresh):
            found, *_ = one.search(query, 10, one.matches(held))
            assert set(found.tolist()) == nearest(now, query, 10, held & present)
        found, *_ = index.search(query, 10)
        assert present[found].all()
    gone = int(np.flatnonzero(present)[0])
    index.put(np.array([gone]), np.zeros((1, DIM), dtype=np.float32))
    assert gone not in index.search(now[gone], 5)[0]


def test_nearly_everything_matching_is_found_first_and_judged_after(vectors: np.ndarray) -> None:
    index = VectorIndex(vectors)
    held = np.ones(SIZE, dtype=bool)
    held[::20] = False
    found = index.search_after(vectors[7], 20, 0.95, lambda numbers: held[numbers])
    assert found is not None
    numbers, _, plan = found
    assert plan.method == "ivf>filter"
    assert held[numbers].all()
    assert len(set(numbers.tolist()) & nearest(vectors, vectors[7], 20, held)) >= 19
    assert index.search_after(vectors[7], 20, 0.95, lambda numbers: numbers < 0) is None
    assert index.search_after(vectors[7], 20, 0.2, lambda numbers: held[numbers]) is None


def test_small_catalogues_and_empty_ones_are_scanned() -> None:
    empty = VectorIndex(np.zeros((0, 0), dtype=np.float32))
    assert empty.size == 0
    small = VectorIndex(np.eye(8, dtype=np.float32))
    found, scores, plan = small.search(np.eye(8, dtype=np.float32)[3], 20)
    assert (found[0], scores[0], len(found), plan.method) == (3, 1.0, 8, "exact")
    small.put(np.array([9]), np.full((1, 8), 0.1, dtype=np.float32))
    assert 9 in small.search(np.ones(8, dtype=np.float32), 20)[0]
    assert 8 not in small.search(np.ones(8, dtype=np.float32), 20)[0]
    nothing, *_ = small.search(np.ones(8, dtype=np.float32), 5, small.matches(np.zeros(8, dtype=bool)))
    assert len(nothing) == 0


def test_an_index_that_doubled_says_so_and_is_built_anew(vectors: np.ndarray) -> None:
    index = VectorIndex(vectors[:1_000])
    assert not index.outgrown
    index.put(np.arange(1_000, SIZE), vectors[1_000:])
    assert index.outgrown
    assert not index.rebuilt().outgrown


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_an_index_is_built_beside_the_one_that_answers(kind: RowKind) -> None:
    """The put that doubles the catalogue waits for no build, and nothing of what is put meanwhile is lost."""
    count = 8_000
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((count, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    began = time.perf_counter()
    VectorIndex(vectors, kind=kind)
    build_s = time.perf_counter() - began
    searcher = Searcher(vectors[: count // 2], Attributes(pl.DataFrame({"p": np.arange(count // 2)}), ["p"]), kind=kind)
    before = searcher.index
    rows = [{"p": 1}] * (count // 2)
    searcher.put(np.arange(count // 2, count - 1), vectors[count // 2 : -1], rows[1:])
    assert not before.outgrown
    waits: list[float] = []

    def put(number: int, vector: NDArray[np.float32]) -> None:
        began = time.perf_counter()
        searcher.put(np.array([number]), vector[None], rows[:1])
        found, _, _ = searcher.search(vector, 1)
        waits.append(time.perf_counter() - began)
        assert found.tolist() == [number]

    put(count - 1, vectors[-1])
    turned = -vectors[:50]
    for number in range(50):
        put(number, turned[number])
    searcher.settle()
    assert searcher.index is not before
    assert waits[0] < build_s / 2
    assert np.quantile(waits, 0.9) < build_s / 4
    vectors[:50] = turned
    for number in (*range(50), 100, count // 2, count - 2, count - 1):
        assert searcher.search(vectors[number], 1)[0].tolist() == [number]
    assert searcher._meanwhile is None
