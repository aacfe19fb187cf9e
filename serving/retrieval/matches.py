"""Items that match a filter, and trials: random filters and queries whose true neighbours are known.

Shape letters: N items, D dim, M matches or items, Q queries, k neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.retrieval.rows import Floats, Ints, StoredVectors

# Shares of matching items for which an index is measured. Other shares are interpolated.
SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)
NEIGHBOURS = 50
RECALL = 0.98
_QUERIES = 128
_MOST_SCORES = 40_000_000  # scores held during the measurement
_AT_ONCE = 10_000


@dataclass(frozen=True, eq=False)
class Matches:
    """Counted items that match a filter: their numbers (M,) ascending, of the numbers below `size`."""

    numbers: Ints
    size: int

    @property
    def share(self) -> float:
        return len(self.numbers) / max(self.size, 1)

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


@dataclass(frozen=True, eq=False)
class FilterTrial:
    """Random filter, and the true neighbours of queries among its matches.

    Attributes:
        share: Share of the items that match.
        matches: The matching items.
        queries: (Q, D) vectors of items.
        excluded: (Q,) numbers of these items; an item is no neighbour of itself.
        truth: (Q, k) numbers of the neighbours, in no order; k is 0 if too few items match.
    """

    share: float
    matches: Matches
    queries: Floats
    excluded: Ints
    truth: Ints


def trials(rows: StoredVectors, numbers: Ints, *, size: int, seed: int) -> Iterator[FilterTrial]:
    """Yields a trial for each of `SHARES`, with items as queries.

    Args:
        rows: Vectors of the items.
        numbers: (N,) items with a vector, ascending.
        size: Number of items with or without a vector.
        seed: Decides the queries and the filters.
    """
    rng = np.random.default_rng(seed)
    count = min(_QUERIES, len(numbers), max(8, _MOST_SCORES // len(numbers)))
    chosen = rng.choice(len(numbers), count, replace=False)
    queries = rows.take(numbers[chosen])
    scores = np.empty((count, len(numbers)), dtype=np.float32)
    for start in range(0, len(numbers), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        scores[:, part] = queries @ rows.take(numbers[part]).T
    scores[np.arange(count), chosen] = -np.inf
    for share in SHARES:
        candidates = np.flatnonzero(rng.random(len(numbers)) < share)
        k = max(0, min(NEIGHBOURS, len(candidates) - 1))
        part_scores = scores[:, candidates]
        best = (
            np.argpartition(part_scores, part_scores.shape[1] - k, axis=1)[:, part_scores.shape[1] - k :]
            if k
            else (np.zeros((count, 0), dtype=np.int64))
        )
        truth = numbers[candidates[best]]
        yield FilterTrial(share, Matches(numbers[candidates], size), queries, numbers[chosen], truth)
