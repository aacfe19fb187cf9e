"""Inverted lists: vectors by cluster, and the number of lists that must be scanned for the recall.

The lists are scanned under a bitmap of the items that match. The fewer items match, the more lists must be scanned for
the same recall; their number is measured, not guessed. Shape letters: N items, D dim, M items, k neighbours.
"""

from typing import Any
from weakref import WeakKeyDictionary

import faiss as untyped_faiss
import numpy as np

from serving.retrieval.matches import NEIGHBOURS, RECALL, SHARES, FilterTrial, Matches
from serving.retrieval.rows import Floats, Ints

# The library's types lack the methods that its Python layer adds.
faiss: Any = untyped_faiss
# Cost of a vector that is skipped in its list; that of a scored one is 1.
_PASSED = 0.25


class InvertedLists:
    """Inverted file over vectors by number.

    Args:
        vectors: (N, D) float32.
        numbers: (N,) distinct numbers.
        seed: Seed of the clustering.
    """

    def __init__(self, vectors: Floats, numbers: Ints, *, seed: int = 0) -> None:
        size, width = vectors.shape
        lists = int(2 * np.sqrt(size))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.seed = 10, seed
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 64
        index.train(vectors)
        # A number is then removed without a search through all lists.
        index.set_direct_map_type(faiss.DirectMap.Hashtable)
        index.add_with_ids(vectors, numbers)
        self._index = index
        self._measured: dict[float, int] = {}
        self._asked: dict[tuple[float, int], int] = {}
        # The bitmaps that faiss reads, and the arrays that they read.
        self._selectors: WeakKeyDictionary[Matches, tuple[Any, Any]] = WeakKeyDictionary()

    @property
    def count(self) -> int:
        """Number of lists."""
        return int(self._index.nlist)

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors and numbers in the lists."""
        return int(self._index.ntotal) * (4 * int(self._index.d) + 8)

    def put(self, old: Ints, numbers: Ints, vectors: Floats) -> None:
        """Removes the vectors of old numbers, and adds vectors (M, D) of distinct numbers (M,)."""
        if len(old):
            self._index.remove_ids(faiss.IDSelectorArray(np.unique(old)))
        if len(numbers):
            self._index.add_with_ids(np.ascontiguousarray(vectors), numbers)

    def cost(self, lists: int, share: float, size: int) -> float:
        """Returns the cost of a scan of lists if a share of `size` items matches, in vectors scored."""
        return float(self.count + size * lists / self.count * (share + _PASSED))

    def search(self, query: Floats, k: int, lists: int, matches: Matches | None) -> tuple[Ints, Floats]:
        """Returns the numbers (≤ k,) and products of the nearest in the lists, best first, of `matches` or of all."""
        scores, numbers = self._index.search(query.reshape(1, -1), k, params=self._parameters(lists, matches))
        if numbers[0, -1] < 0:
            valid = numbers[0] >= 0
            return numbers[0][valid], scores[0][valid]
        return numbers[0], scores[0]

    def measure(self, trial: FilterTrial) -> None:
        """Measures the lists that give the recall if a share of the items matches."""
        self._measured[trial.share] = self._fewest(trial)

    def needed(self, share: float, k: int) -> int:
        """Returns the lists that gave the recall for such a share.

        k neighbours are as far as 50 neighbours of a share 50 / k of it.
        """
        if (lists := self._asked.get((share, k))) is None:
            if len(self._asked) > 1_000:
                self._asked.clear()
            lists = self._asked[share, k] = self._interpolated(share * min(1.0, NEIGHBOURS / k))
        return lists

    def _interpolated(self, share: float) -> int:
        # Between two measured shares, the number of lists is a power of the share.
        shares = np.log(np.array(SHARES[::-1]))
        lists = np.log(np.array([self._measured[measured] for measured in SHARES[::-1]], dtype=np.float64))
        if share < SHARES[-1]:
            return self.count
        return int(min(np.ceil(np.exp(np.interp(np.log(share), shares, lists))), self.count))

    def _fewest(self, trial: FilterTrial) -> int:
        k = trial.truth.shape[1]
        lists = 1
        while k and lists < self.count:
            _, results = self._index.search(trial.queries, k + 1, params=self._parameters(lists, trial.matches))
            # Arrays are used because a Python loop would keep the interpreter from concurrent searches.
            expected = np.where(trial.truth == trial.excluded[:, None], -1, trial.truth)
            hits = sum(int(np.isin(right[right >= 0], row).sum()) for row, right in zip(results, expected, strict=True))
            if hits >= RECALL * trial.truth.size:
                return lists
            lists = max(lists + 1, int(lists * 1.5))
        return self.count

    def _parameters(self, lists: int, matches: Matches | None) -> Any:
        if matches is None:
            return faiss.SearchParametersIVF(nprobe=lists)
        return faiss.SearchParametersIVF(nprobe=lists, sel=self._selector(matches))

    def _selector(self, matches: Matches) -> Any:
        """Returns the bitmap that faiss reads; made once."""
        if (made := self._selectors.get(matches)) is None:
            mask = np.zeros(-(-matches.size // 8) * 8, dtype=bool)
            mask[matches.numbers] = True
            bits = np.packbits(mask, bitorder="little")
            made = self._selectors[matches] = (faiss.IDSelectorBitmap(bits), bits)
        return made[0]


def sweep(vectors: Floats, query: Floats, k: int) -> tuple[Ints, Floats]:
    """Returns the k nearest of all vectors (N, D) and their products, best first; -1 where there are fewer."""
    scores, numbers = faiss.knn(query.reshape(1, -1), vectors, k, faiss.METRIC_INNER_PRODUCT)
    return numbers[0], scores[0]


def one_thread() -> None:
    """Makes faiss use one thread in the calling thread."""
    faiss.omp_set_num_threads(1)
