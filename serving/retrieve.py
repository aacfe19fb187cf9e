"""Candidates by content: the items whose vectors lie nearest to what a user liked; the only module that uses faiss.

Exact inner-product search. It grows with the stream's new items. Without a history, or without content, the most
popular items of training stand in.
"""

import threading

import faiss
import numpy as np
from numpy.typing import NDArray

from models.catalogue import Catalogue


class Retriever:
    """An index over a catalogue's vectors; an item is found under its number.

    Args:
        catalogue: `refresh` follows it.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._lock = threading.Lock()
        self._popular = np.argsort(-catalogue.popularity, kind="stable")
        self._index = self._build()

    def refresh(self) -> None:
        """Takes in items that are new in the catalogue, and vectors that changed."""
        index = self._build()
        with self._lock:
            self._index = index

    def nearest(self, history: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Numbers of at most `count` items, best first, without those in `history`.

        Args:
            history: item numbers the user liked; their mean vector is the query.
        """
        vectors = self._catalogue.vectors
        query = vectors[history].mean(axis=0) if len(history) else np.zeros(vectors.shape[1], dtype=np.float32)
        with self._lock:
            index = self._index
        if index is None or not query.any():
            gone = np.array([self._catalogue.item_numbers[name] for name in self._catalogue.deleted], dtype=np.int64)
            return self._without(self._popular, np.concatenate([history, gone]), count)
        _, found = index.search(query[None, :].astype(np.float32), min(count + len(history), index.ntotal))
        return self._without(found[0][found[0] >= 0], history, count)

    def similar(self, item: int, count: int) -> list[tuple[int, float]]:
        """The `count` nearest other items of an item with content, with their cosine similarity."""
        with self._lock:
            index = self._index
        if index is None:
            return []
        query = self._catalogue.vectors[item][None, :]
        scores, found = index.search(query, min(count + 1, index.ntotal))
        pairs = zip(found[0].tolist(), scores[0].tolist(), strict=True)
        return [(number, score) for number, score in pairs if number not in (item, -1)][:count]

    def _build(self) -> faiss.Index | None:
        vectors = self._catalogue.vectors
        if not vectors.shape[1]:
            return None
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
        filled = np.flatnonzero(vectors.any(axis=1))
        index.add_with_ids(np.ascontiguousarray(vectors[filled]), filled.astype(np.int64))
        return index

    @staticmethod
    def _without(found: NDArray[np.int64], history: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        kept: NDArray[np.int64] = found[~np.isin(found, history)][:count]
        return kept
