"""The vector index: nearest vectors among those that match a filter, and the planner that chooses the method.

The number of matches decides which of four methods is best:

- exact: score every match. The cost grows with the matches, and no item is missed.
- ivf: an inverted file whose lists are scanned under a bitmap of the matches.
- bits: a shortlist by the matches' bit codes, put in order by their stored rows. A code costs a fortieth of a vector.
- found first, filtered after: if nearly everything matches, find some more than asked for by ivf or bits, and evaluate
  the filter on those only.

Lists and shortlists have the length that gave the recall when the index was built. Shape letters: N items, D dim, M
matches, k neighbours.
"""

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from features.content.bits import BitCode
from models.table.column_rows import Growable
from serving.retrieval.bit_scan import BitScan
from serving.retrieval.inverted import InvertedLists, one_thread, sweep
from serving.retrieval.matches import Matches, trials
from serving.retrieval.rows import FloatRows, Floats, Ints, RowKind, StoredVectors, open_rows
from serving.retrieval.search_plan import SearchPlan

# Below these sizes an exact scan is as fast: as a list, and as bits beside lists.
_LEAST_INDEXED, _LEAST_BITS = 1_000, 50_000
# Costs of a vector, in vectors scored in a list: scored in one sweep over all; gathered from all over; passed in a
# sweep. Costs of a code: scanned; packed for a filter that is new. Costs of a shortlist: begun; of each item.
_SWEPT, _GATHERED, _PASSED = 0.5, 2.0, 0.25
_CODED, _PACKED, _BEGUN, _LISTED = 0.025, 0.3, 800.0, 6.0
_POST_FILTER = 0.8
_SPARE = 1.15
Found = tuple[Ints, Floats, SearchPlan]


class VectorIndex:
    """Index of vectors by number, searched by inner product. Numbers may be added, changed and removed during searches.

    Args:
        vectors: (N, D) float32 of the numbers 0..N-1; a zero row means no vector.
        kind: `float32` keeps the vectors, and a copy in inverted lists. `int8` keeps a quarter of the bytes, and bits.
        seed: Seed of the clustering, of the bits and of the measurement.
        code: Bit code of the vectors; None: fits one where bits are used.
    """

    def __init__(
        self, vectors: Floats, *, kind: RowKind = "float32", seed: int = 0, code: BitCode | None = None
    ) -> None:
        self._open(open_rows(kind, vectors), np.asarray(vectors.any(axis=1), dtype=bool), seed, code)

    def _open(self, rows: StoredVectors, present: NDArray[np.bool_], seed: int, code: BitCode | None) -> None:
        self._seed, self._code = seed, code
        self._lock = threading.Lock()
        self._rows = rows
        self._present: Growable[np.bool_] = Growable(present)
        self._every: Matches | None = None
        self._ivf: InvertedLists | None = None
        self._bits: BitScan | None = None
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
        return len(self._rows)

    @property
    def bits(self) -> BitScan | None:
        """Bit codes, if the index has any."""
        return self._bits

    @property
    def size_bytes(self) -> int:
        """Bytes of the rows, of their copies with numbers in inverted lists, and of bits."""
        parts = [self._rows, *(part for part in (self._ivf, self._bits) if part is not None)]
        return sum(part.nbytes for part in parts)

    @property
    def outgrown(self) -> bool:
        """True if so many vectors were added that a new index would search faster."""
        return self.size >= max(_LEAST_INDEXED, 2 * self._trained_on)

    def rebuilt(self) -> "VectorIndex":
        """Returns a new index of the present vectors, built without a lock and on one thread, for a thread of its own.

        A vector that is put meanwhile may be old, new, or a mixture in it: put the vector again.
        """
        # The number of threads is a setting of the calling thread.
        one_thread()
        rows = self._rows.copy(self._present.array)
        fresh = VectorIndex.__new__(VectorIndex)
        fresh._open(rows, rows.filled(), self._seed, self._code)
        return fresh

    def vectors(self, numbers: Ints) -> Floats:
        """Returns vectors (M, D) of numbers (M,), zero for a number without one."""
        with self._lock:
            return np.where(self._present.array[numbers, None], self._rows.take(numbers), np.float32(0))

    def put(self, numbers: Ints, vectors: Floats) -> None:
        """Adds or changes vectors (M, D); a zero row removes one."""
        if not len(numbers) or not self._rows.width:
            return
        with self._lock:
            grown = int(numbers.max()) + 1 - len(self._rows)
            if grown > 0:
                self._rows.extend(grown)
                self._present.extend(np.zeros(grown, dtype=bool))
            old = numbers[self._present.array[numbers]]
            self._rows.put(numbers, vectors)
            self._present.array[numbers] = vectors.any(axis=1)
            distinct = np.unique(numbers)
            present = self._present.array[distinct]
            if self._ivf is not None:
                self._ivf.put(old, distinct[present], self._rows.take(distinct[present]))
            if self._bits is not None:
                self._bits.put(distinct, present)
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

    def search(self, query: Floats, k: int, matches: Matches | None = None) -> Found:
        """Returns the k nearest to a query (D,), best first, of `matches` or of all.

        The results are numbers and inner products (≤ k,), and the plan. Products are those of the stored rows.
        """
        with self._lock:
            if matches is None:
                if self._ivf is not None or self._bits is not None:
                    return self._unfiltered(query, k)
                matches = self._all()
            return self._filtered(query, k, matches)

    def search_after(
        self, query: Floats, k: int, share: float, judge: Callable[[Ints], NDArray[np.bool_]]
    ) -> Found | None:
        """Finds items first and filters after, if about `share` of all items match; None if too few remained."""
        if (self._ivf is None and self._bits is None) or share < _POST_FILTER:
            return None
        with self._lock:
            numbers, scores, plan = self._unfiltered(query, int(_SPARE * k / share) + 8)
        held = judge(numbers)
        if held.sum() < k:
            return None
        method = "bits>filter" if plan.method == "bits" else "ivf>filter"
        after = SearchPlan(method, share, None, plan.lists, plan.shortlist, plan.cost)
        return numbers[held][:k], scores[held][:k], after

    def _unfiltered(self, query: Floats, k: int) -> Found:
        every = len(self._rows)
        plan = self._plans.get((k, every))
        if plan is None:
            if len(self._plans) > 1_000:
                self._plans.clear()
            plan = self._plans[k, every] = self._planned(1.0, every, k, None)
        if plan.method == "bits":
            return *self._by_bits(query, k, plan.shortlist or 0, None), plan
        if self._ivf is not None and plan.lists is not None:
            return *self._ivf.search(query, k, plan.lists, None), plan
        return *self._sweep(query, k), plan

    def _filtered(self, query: Floats, k: int, matches: Matches) -> Found:
        count = len(matches.numbers)
        plan = self._planned(matches.share, count, k, matches)
        if plan.method == "exact" or count <= k:
            return *self._exact(query, k, matches), replace(plan, method="exact", lists=None, shortlist=None)
        if plan.method == "bits":
            return *self._by_bits(query, k, plan.shortlist or 0, matches), plan
        assert self._ivf is not None
        lists = plan.lists or 1
        while True:
            numbers, scores = self._ivf.search(query, k, lists, matches)
            # Matches may be far from the query; then more lists are scanned.
            if len(numbers) >= min(k, count) or lists >= self._ivf.count:
                return numbers, scores, replace(plan, method="ivf+filter", lists=lists)
            lists = min(4 * lists, self._ivf.count)

    def _planned(self, share: float, count: int, k: int, matches: Matches | None) -> SearchPlan:
        """Returns the cheapest plan to find k of `count` matches, or of all where `matches` is None."""
        costs = {"exact": self._exact_cost(count) if matches is not None else self._sweep_cost(count)}
        lists = shortlist = None
        if self._ivf is not None:
            lists = self._ivf.needed(share, k)
            costs["ivf"] = self._ivf.cost(lists, share, len(self._rows))
        if self._bits is not None and np.isfinite(needed := self._bits.needed(share, k)):
            shortlist = max(min(int(needed), count), k)
            packing = 0.0 if matches is None else _PACKED * self._bits.unpacked(matches)
            costs["bits"] = _BEGUN + count * (_CODED + packing) + _LISTED * shortlist
        method = min(costs, key=lambda name: costs[name])
        cost = costs.pop(method)
        other = min(costs.values(), default=0.0)
        if method != "ivf":
            lists = None
        if method != "bits":
            shortlist = None
        if not costs:
            cost = 0.0
        return SearchPlan(method, share, count, lists, shortlist, cost, other)

    def _by_bits(self, query: Floats, k: int, shortlist: int, matches: Matches | None) -> tuple[Ints, Floats]:
        assert self._bits is not None
        numbers, _ = self._bits.shortlist(query, shortlist, matches)
        return _best(numbers, self._rows.products(numbers, query), k)

    def _exact(self, query: Floats, k: int, matches: Matches) -> tuple[Ints, Floats]:
        numbers = matches.numbers
        rows = self._rows
        if isinstance(rows, FloatRows) and _GATHERED * len(numbers) > self._exact_cost(len(numbers)):
            return _best(numbers, (rows.array @ query)[numbers], k)
        return _best(numbers, rows.products(numbers, query), k)

    def _sweep(self, query: Floats, k: int) -> tuple[Ints, Floats]:
        """Returns the nearest of all vectors, without an index."""
        if isinstance(self._rows, FloatRows):
            numbers, scores = sweep(self._rows.array, query, k)
            if numbers[-1] >= 0 and self._present.array.take(numbers).all():
                return numbers, scores
        # Rows without a vector score 0, which may be better than a real score.
        return self._exact(query, k, self._all())

    def _exact_cost(self, count: int) -> float:
        if not isinstance(self._rows, FloatRows):
            return _GATHERED * count
        return min(_GATHERED * count, _SWEPT * len(self._rows) + _PASSED * count)

    def _sweep_cost(self, count: int) -> float:
        return (_SWEPT if isinstance(self._rows, FloatRows) else _GATHERED) * count

    def _all(self) -> Matches:
        if self._every is None:
            self._every = Matches(np.flatnonzero(self._present.array), len(self._present.array))
        return self._every

    def _build(self) -> None:
        numbers = np.flatnonzero(self._present.array)
        if len(numbers) < _LEAST_INDEXED:
            return
        compact = not isinstance(self._rows, FloatRows)
        if not compact:
            self._ivf = InvertedLists(self._rows.take(numbers), numbers, seed=self._seed)
        if self._rows.width >= 8 and (compact or len(numbers) >= _LEAST_BITS):
            self._bits = BitScan(self._rows, numbers, seed=self._seed, code=self._code)
        for trial in trials(self._rows, numbers, size=len(self._rows), seed=self._seed):
            for part in (self._ivf, self._bits):
                if part is not None:
                    part.measure(trial)
        self._trained_on = len(numbers)


def _best(numbers: Ints, scores: Floats, k: int) -> tuple[Ints, Floats]:
    """Returns the k numbers with the largest scores, best first; among equal scores, the first of `numbers`."""
    if len(numbers) > k:
        best = np.argpartition(scores, len(numbers) - k)[len(numbers) - k :]
        numbers, scores = numbers[best], scores[best]
    order = np.argsort(-scores, kind="stable")
    return numbers[order], scores[order]
