"""Candidates by content: the items nearest to an item, to what a user liked, or to a text, among those that match.

Follows the catalogue: new items, changed ones and deletions are found, or not found any more, at once. Without
anything to search by, the most popular items of training stand in.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.catalogue import Catalogue
from serving.filter import Attributes, Filter
from serving.index import Floats, Ints, Matches, Plan, VectorIndex

_REMEMBERED = 128


class Retriever:
    """Finds items by vector, under their numbers.

    Args:
        catalogue: whose items are found; told to `update` when it changes.
        attributes: what filters judge.
    """

    def __init__(self, catalogue: Catalogue, attributes: Attributes) -> None:
        self._catalogue = catalogue
        self.attributes = attributes
        self._popular = np.argsort(-catalogue.popularity, kind="stable")
        self._index = VectorIndex(catalogue.vectors)
        self._lock = threading.Lock()
        self._remembered: OrderedDict[str, Matches] = OrderedDict()
        self._changes = 0
        self._deleted = np.zeros(0, dtype=np.int64)

    def update(self, numbers: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes in what changed in the catalogue: items by number, and their attributes, empty where one is gone."""
        changed = np.array(numbers, dtype=np.int64)
        self.attributes.put(numbers, rows)
        self._index.put(changed, self._catalogue.vectors[changed])
        self._deleted = np.array(
            sorted(self._catalogue.item_numbers[name] for name in self._catalogue.deleted), dtype=np.int64
        )
        if self._index.outgrown:
            self._index = self._index.rebuilt()
        with self._lock:
            self._changes += 1
            self._remembered.clear()

    def search(
        self, query: Floats | None, k: int, wanted: Filter | None = None, *, without: Ints | None = None
    ) -> tuple[Ints, Floats, Plan]:
        """The k nearest items to a query (D,), best first.

        Args:
            query: a unit vector; None or zero: the most popular items instead, with the score 0.
            wanted: what they must match.
            without: numbers that are not wanted.

        Returns:
            Numbers (≤ k,), inner products (≤ k,), and how they were found.

        Raises:
            EventError: the filter does not fit the columns.
        """
        gone = np.zeros(0, dtype=np.int64) if without is None else without
        if query is None or not query.any() or not self._index.size:
            return self._most_popular(k, wanted, gone)
        more, index = k + len(gone), self._index
        if wanted is None:
            found, scores, plan = index.search(query, more)
        else:
            found, scores, plan = self._among(index, query, more, wanted)
        if len(gone):
            kept = ~np.isin(found, gone)
            found, scores = found[kept], scores[kept]
        return found[:k], scores[:k], plan

    def nearest(self, history: Ints, count: int) -> Ints:
        """Numbers of at most `count` items near to the mean of those in `history`, best first, without them."""
        return self.search(self.taste(history), count, without=history)[0]

    def similar(self, item: int, count: int) -> list[tuple[int, float]]:
        """The `count` nearest other items of an item with content, with their cosine similarity."""
        query = self._catalogue.vectors[item]
        if not query.any():
            return []
        found, scores, _ = self.search(query, count, without=np.array([item]))
        return list(zip(found.tolist(), scores.tolist(), strict=True))

    def taste(self, history: Ints) -> Floats | None:
        """The direction of the mean vector of some items, (D,); None where there is none."""
        vectors = self._catalogue.vectors
        if not len(history) or not vectors.shape[1]:
            return None
        mean: Floats = vectors[history].mean(axis=0)
        length = float(np.linalg.norm(mean))
        return mean / np.float32(length) if length > 0 else None

    def _among(self, index: VectorIndex, query: Floats, k: int, wanted: Filter) -> tuple[Ints, Floats, Plan]:
        key = wanted.key()
        with self._lock:
            matches, changes = self._remembered.get(key), self._changes
        if matches is None:
            share = self.attributes.share(wanted)
            found = index.search_after(query, k, share, lambda numbers: self.attributes.matches(wanted, numbers))
            if found is not None:
                return found
            matches = index.matches(self.attributes.mask(wanted, len(self._catalogue.vectors)))
            with self._lock:
                if changes == self._changes:
                    self._remembered[key] = matches
                    while len(self._remembered) > _REMEMBERED:
                        self._remembered.popitem(last=False)
        return index.search(query, k, matches)

    def _most_popular(self, k: int, wanted: Filter | None, gone: Ints) -> tuple[Ints, Floats, Plan]:
        found = self._popular[~np.isin(self._popular, np.concatenate([gone, self._deleted]))]
        if wanted is not None:
            found = found[self.attributes.matches(wanted, found)]
        plan = Plan("popular", len(found) / max(len(self._popular), 1), len(found))
        return found[:k], np.zeros(len(found[:k]), dtype=np.float32), plan
