"""The vector index: nearest vectors among those that match a filter, and the planner that chooses the method.

The number of matches decides which of three methods is best:

- exact: score every match. The cost grows with the matches, and no item is missed.
- ivf: an inverted file whose lists are scanned under a bitmap of the matches. The fewer items match, the more lists
must
  be scanned for the same recall; their number is measured when the index is built, not guessed.
- ivf, then filter: if nearly everything matches, find some more than asked for and evaluate the filter on those only.

This is the only serving module that uses faiss. Shape letters: N items, D dim, M matches, k neighbours.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import faiss as untyped_faiss
import numpy as np
from numpy.typing import NDArray

from models.table.column_rows import Growable
from serving.retrieval.search_plan import SearchPlan

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

# The library's types lack the methods that its Python layer adds.
faiss: Any = untyped_faiss
# Below this size, an exact scan of everything is as fast as an index.
_LEAST_INDEXED = 1_000
_RECALL = 0.98
_SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)
_QUERIES, _NEIGHBOURS = 128, 50
_MOST_SCORES = 100_000_000  # scores held during the measurement
# Costs of a vector: scored in its list; skipped there; scored in one sweep over all; gathered from all over.
_SCANNED, _PASSED, _SWEPT, _GATHERED = 1.0, 0.25, 0.5, 2.0
_POST_FILTER = 0.8
_SPARE = 1.15
_COPIED = 10_000  # vectors at a time


@dataclass
class Matches:
    """Counted items that match a filter: their numbers (M,) ascending, and a bitmap of them if needed."""

    numbers: Ints
    size: int
    _selector: Any = field(default=None, repr=False)
    _bits: Any = field(default=None, repr=False)

    @property
    def share(self) -> float:
        return len(self.numbers) / max(self.size, 1)

    def selector(self) -> Any:
        """Returns the bitmap that faiss reads; made once."""
        if self._selector is None:
            mask = np.zeros(-(-self.size // 8) * 8, dtype=bool)
            mask[self.numbers] = True
            self._bits = np.packbits(mask, bitorder="little")
            self._selector = faiss.IDSelectorBitmap(self._bits)
        return self._selector

    def changed(self, numbers: Ints, matching: NDArray[np.bool_], size: int) -> "Matches":
        """Returns the matches after M items were evaluated again, at the cost of these items and a copy of the numbers.

        Args:
            numbers: (M,) distinct items, ascending.
            matching: (M,) True for each item that matches now.
            size: Number of items.
        """
        position = np.searchsorted(self.numbers, numbers)
        known = np.zeros(len(numbers), dtype=bool)
        inside = position < len(self.numbers)
        known[inside] = self.numbers[position[inside]] == numbers[inside]
        left = np.delete(self.numbers, position[known & ~matching])
        added = numbers[matching & ~known]
        return Matches(np.insert(left, np.searchsorted(left, added), added), size)


class VectorIndex:
    """Index of vectors by number, searched by inner product. Numbers may be added, changed and removed during searches.

    Args:
        vectors: (N, D) float32 of the numbers 0..N-1; a zero row means no vector.
        seed: Seed of the clustering and of the measurement.
    """

    def __init__(self, vectors: Floats, *, seed: int = 0) -> None:
        self._seed = seed
        self._lock = threading.Lock()
        self._vectors = Growable(np.ascontiguousarray(vectors, dtype=np.float32).copy())
        self._present: Growable[np.bool_] = Growable(np.asarray(vectors.any(axis=1), dtype=bool))
        self._every: Matches | None = None
        self._ivf: Any = None
        self._lists: dict[float, int] = {}
        self._lists_asked: dict[tuple[float, int], int] = {}
        # Plan without a filter, by k and size.
        self._plans: dict[tuple[int, int], SearchPlan] = {}
        self._trained_on = 0
        self._build()

    @property
    def size(self) -> int:
        """Number of vectors that can be found."""
        return int(self._present.array.sum())

    @property
    def rows(self) -> int:
        """N, the numbers that have space."""
        return len(self._vectors.array)

    @property
    def size_bytes(self) -> int:
        """Bytes of the vectors, and of their copies with numbers in the inverted lists."""
        row = int(self._vectors.array.shape[1]) * 4
        copied = int(self._ivf.ntotal) if self._ivf is not None else 0
        return len(self._vectors.array) * row + copied * (row + 8)

    @property
    def outgrown(self) -> bool:
        """True if so many vectors were added that a new index would search faster."""
        return self.size >= max(_LEAST_INDEXED, 2 * self._trained_on)

    def rebuilt(self) -> "VectorIndex":
        """Returns a new index of the present vectors, built without a lock and on one thread, for a thread of its own.

        A vector that is put meanwhile may be old, new, or a mixture in it: put the vector again.
        """
        # The number of threads is a setting of the calling thread.
        faiss.omp_set_num_threads(1)
        vectors, present = self._vectors.array, self._present.array
        copy = np.zeros((min(len(vectors), len(present)), vectors.shape[1]), dtype=np.float32)
        for start in range(0, len(copy), _COPIED):
            part = slice(start, min(start + _COPIED, len(copy)))
            copy[part] = np.where(present[part, None], vectors[part], np.float32(0))
        return VectorIndex(copy, seed=self._seed)

    def vectors(self, numbers: Ints) -> Floats:
        """Returns vectors (M, D) of numbers (M,), zero for a number without one."""
        with self._lock:
            return np.where(self._present.array[numbers, None], self._vectors.array[numbers], np.float32(0))

    def put(self, numbers: Ints, vectors: Floats) -> None:
        """Adds or changes vectors (M, D); a zero row removes one."""
        if not len(numbers) or not self._vectors.array.shape[1]:
            return
        with self._lock:
            grown = int(numbers.max()) + 1 - len(self._vectors.array)
            if grown > 0:
                self._vectors.extend(np.zeros((grown, vectors.shape[1]), dtype=np.float32))
                self._present.extend(np.zeros(grown, dtype=bool))
            there = numbers[self._present.array[numbers]]
            if self._ivf is not None and len(there):
                self._ivf.remove_ids(faiss.IDSelectorArray(np.unique(there)))
            self._vectors.array[numbers] = vectors
            self._present.array[numbers] = vectors.any(axis=1)
            last = np.unique(numbers)
            last = last[self._present.array[last]]
            if self._ivf is not None and len(last):
                self._ivf.add_with_ids(np.ascontiguousarray(self._vectors.array[last]), last)
            self._every = None

    def matches(self, mask: NDArray[np.bool_]) -> Matches:
        """Returns the items of `mask` (n,), n ≤ N, that can be found."""
        size = len(self._present.array)
        whole = np.zeros(size, dtype=bool)
        whole[: len(mask)] = mask[:size]
        return Matches(np.flatnonzero(whole & self._present.array), size)

    def rejudged(self, matches: Matches, numbers: Ints, held: NDArray[np.bool_]) -> Matches:
        """Returns the matches after distinct items (M,), ascending, changed; `held` (M,) marks those that match now."""
        with self._lock:
            present = self._present.array
            return matches.changed(numbers, held & present[numbers], len(present))

    def search(self, query: Floats, k: int, matches: Matches | None = None) -> tuple[Ints, Floats, SearchPlan]:
        """Returns the k nearest to a query (D,), best first, of `matches` or of all.

        The results are numbers and inner products (≤ k,), and the plan.
        """
        with self._lock:
            if matches is None:
                if self._ivf is not None:
                    return self._unfiltered(query, k)
                matches = self._all()
            return self._filtered(query, k, matches)

    def search_after(
        self, query: Floats, k: int, share: float, judge: Callable[[Ints], NDArray[np.bool_]]
    ) -> tuple[Ints, Floats, SearchPlan] | None:
        """Finds items first and filters after, if about `share` of all items match; None if too few remained."""
        if self._ivf is None or share < _POST_FILTER:
            return None
        with self._lock:
            more = int(_SPARE * k / share) + 8
            numbers, scores, plan = self._unfiltered(query, more)
        held = judge(numbers)
        if held.sum() < k:
            return None
        return numbers[held][:k], scores[held][:k], SearchPlan("ivf>filter", share, None, plan.lists, plan.cost)

    def _unfiltered(self, query: Floats, k: int) -> tuple[Ints, Floats, SearchPlan]:
        every = len(self._vectors.array)
        plan = self._plans.get((k, every))
        if plan is None:
            if len(self._plans) > 1_000:
                self._plans.clear()
            lists = self._lists_for(1.0, k)
            ivf_cost, sweep_cost = self._ivf_cost(lists, 1.0), _SWEPT * every
            sweeps = sweep_cost <= ivf_cost
            plan = (
                SearchPlan("exact", 1.0, every, None, sweep_cost, ivf_cost)
                if sweeps
                else SearchPlan("ivf", 1.0, None, lists, ivf_cost, sweep_cost)
            )
            self._plans[k, every] = plan
        if plan.lists is None:
            return *self._sweep(query, k), plan
        return *self._ivf_search(query, k, plan.lists, None), plan

    def _filtered(self, query: Floats, k: int, matches: Matches) -> tuple[Ints, Floats, SearchPlan]:
        count = len(matches.numbers)
        if self._ivf is None:
            found = self._exact(query, k, matches)
            return *found, SearchPlan("exact", matches.share, count)
        lists = self._lists_for(matches.share, k)
        exact_cost = self._exact_cost(count)
        ivf_cost = self._ivf_cost(lists, matches.share)
        if exact_cost <= ivf_cost or count <= k:
            found = self._exact(query, k, matches)
            return *found, SearchPlan("exact", matches.share, count, None, exact_cost, ivf_cost)
        while True:
            numbers, scores = self._ivf_search(query, k, lists, matches)
            # Matches may be far from the query; then more lists are scanned.
            if len(numbers) >= min(k, count) or lists >= self._ivf.nlist:
                return numbers, scores, SearchPlan("ivf+filter", matches.share, count, lists, ivf_cost, exact_cost)
            lists = min(4 * lists, self._ivf.nlist)

    def _exact(self, query: Floats, k: int, matches: Matches) -> tuple[Ints, Floats]:
        numbers = matches.numbers
        if not len(numbers):
            return numbers, np.zeros(0, dtype=np.float32)
        if _GATHERED * len(numbers) > self._exact_cost(len(numbers)):
            scores = (self._vectors.array @ query)[numbers]
        else:
            scores = self._vectors.array.take(numbers, axis=0) @ query
        if len(numbers) > k:
            best = np.argpartition(scores, len(numbers) - k)[len(numbers) - k :]
            numbers, scores = numbers[best], scores[best]
        order = np.argsort(-scores, kind="stable")
        return numbers[order], scores[order]

    def _sweep(self, query: Floats, k: int) -> tuple[Ints, Floats]:
        """Returns the nearest of all vectors, without an index."""
        scores, numbers = faiss.knn(query.reshape(1, -1), self._vectors.array, k, faiss.METRIC_INNER_PRODUCT)
        if numbers[0, -1] >= 0 and self._present.array.take(numbers[0]).all():
            return numbers[0], scores[0]
        # Rows without a vector score 0, which may be better than a real score.
        return self._exact(query, k, self._all())

    def _exact_cost(self, count: int) -> float:
        return min(_GATHERED * count, _SWEPT * len(self._vectors.array) + _PASSED * count)

    def _ivf_cost(self, lists: int, share: float) -> float:
        scanned = len(self._vectors.array) * lists / self._ivf.nlist
        return float(self._ivf.nlist + scanned * (share * _SCANNED + _PASSED))

    def _ivf_search(self, query: Floats, k: int, lists: int, matches: Matches | None) -> tuple[Ints, Floats]:
        parameters = (
            faiss.SearchParametersIVF(nprobe=lists)
            if matches is None
            else faiss.SearchParametersIVF(nprobe=lists, sel=matches.selector())
        )
        scores, numbers = self._ivf.search(query.reshape(1, -1), k, params=parameters)
        if numbers[0, -1] < 0:
            valid = numbers[0] >= 0
            return numbers[0][valid], scores[0][valid]
        return numbers[0], scores[0]

    def _all(self) -> Matches:
        if self._every is None:
            self._every = Matches(np.flatnonzero(self._present.array), len(self._present.array))
        return self._every

    def _lists_for(self, share: float, k: int) -> int:
        """Returns the lists that gave the recall for such a share.

        k neighbours are as far as 50 neighbours of a share 50 / k of it.
        """
        if (lists := self._lists_asked.get((share, k))) is None:
            if len(self._lists_asked) > 1_000:
                self._lists_asked.clear()
            lists = self._lists_asked[share, k] = self._interpolated(share * min(1.0, _NEIGHBOURS / k))
        return lists

    def _interpolated(self, share: float) -> int:
        # Between two measured shares, the number of lists is a power of the share.
        shares = np.log(np.array(_SHARES[::-1]))
        lists = np.log(np.array([self._lists[measured] for measured in _SHARES[::-1]], dtype=np.float64))
        if share < _SHARES[-1]:
            return int(self._ivf.nlist)
        return int(min(np.ceil(np.exp(np.interp(np.log(share), shares, lists))), self._ivf.nlist))

    def _build(self) -> None:
        numbers = np.flatnonzero(self._present.array)
        if len(numbers) < _LEAST_INDEXED:
            return
        vectors = np.ascontiguousarray(self._vectors.array[numbers])
        size, width = vectors.shape
        lists = int(2 * np.sqrt(size))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.seed = 10, self._seed
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 64
        index.train(vectors)
        # A number is then removed without a search through all lists.
        index.set_direct_map_type(faiss.DirectMap.Hashtable)
        index.add_with_ids(vectors, numbers)
        self._ivf, self._trained_on = index, size
        self._measure(vectors, numbers)

    def _measure(self, vectors: Floats, numbers: Ints) -> None:
        """Measures the lists that give the recall if a share of the items matches, with items as queries."""
        rng = np.random.default_rng(self._seed)
        count = min(_QUERIES, len(vectors), max(8, _MOST_SCORES // len(vectors)))
        chosen = rng.choice(len(vectors), count, replace=False)
        scores = vectors[chosen] @ vectors.T
        scores[np.arange(len(chosen)), chosen] = -np.inf
        for share in _SHARES:
            matching = rng.random(len(vectors)) < share
            k = min(_NEIGHBOURS, int(matching.sum()) - 1)
            if k < 1:
                self._lists[share] = self._ivf.nlist
                continue
            candidates = np.flatnonzero(matching)
            part = scores[:, matching]
            best = candidates[np.argpartition(part, part.shape[1] - k, axis=1)[:, -k:]]
            truth = numbers[best]
            mask = np.zeros(len(self._vectors.array), dtype=bool)
            mask[numbers[matching]] = True
            matches = Matches(np.flatnonzero(mask), len(mask))
            self._lists[share] = self._fewest(vectors[chosen], numbers[chosen], k, matches, truth)

    def _fewest(self, queries: Floats, excluded: Ints, k: int, matches: Matches, truth: Ints) -> int:
        lists = 1
        while lists < self._ivf.nlist:
            parameters = faiss.SearchParametersIVF(nprobe=lists, sel=matches.selector())
            _, results = self._ivf.search(queries, k + 1, params=parameters)
            # Arrays are used because a Python loop would keep the interpreter from concurrent searches.
            expected = np.where(truth == excluded[:, None], -1, truth)
            hits = sum(int(np.isin(right[right >= 0], row).sum()) for row, right in zip(results, expected, strict=True))
            if hits >= _RECALL * truth.size:
                return lists
            lists = max(lists + 1, int(lists * 1.5))
        return int(self._ivf.nlist)
