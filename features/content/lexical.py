"""Lexical channel of a text search: BM25 over the terms of the catalogue's texts.

A vector blurs a rare word, BM25 finds it. Both lists are fused by reciprocal ranks, which need no common scale.
Robertson & Zaragoza, "The Probabilistic Relevance Framework" (2009); Cormack et al., "Reciprocal Rank Fusion" (SIGIR
2009), equation 1.

Shape letters: N texts, M lists.
"""

from collections.abc import Sequence

import bm25s
import numpy as np
from numpy.typing import NDArray

from features.content.terms import tokens

_FUSION = 60
"""Constant k of reciprocal rank fusion, as in the paper."""


class LexicalIndex:
    """BM25 index of texts, with the terms that LSA weighs.

    Args:
        texts: N texts, at least one; a text may be empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._index = bm25s.BM25(method="lucene", k1=1.2, b=0.75, backend="numpy")
        self._size = len(texts)
        terms = [tokens(text) for text in texts]
        self._terms = {term for of_text in terms for term in of_text}
        if self._terms:
            self._index.index(terms, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """Returns the score (N,) of each text for a query; 0 for a text that shares no term with it."""
        asked = [term for term in tokens(query) if term in self._terms]
        if not asked:
            return np.zeros(self._size, dtype=np.float32)
        return np.asarray(self._index.get_scores(asked), dtype=np.float32)

    def search(self, query: str, count: int) -> NDArray[np.int64]:
        """Returns the texts with the best scores above 0, best first, at most `count`; ties by number."""
        scores = self.scores(query)
        best = np.argsort(-scores, kind="stable")[:count]
        return best[scores[best] > 0].astype(np.int64)


def fuse(lists: Sequence[NDArray[np.integer]], count: int) -> NDArray[np.int64]:
    """Fuses ranked lists by the sum of 1 / (60 + rank), rank from 1.

    Args:
        lists: M lists of numbers, best first; a number occurs once in a list.
        count: Most numbers to return.

    Returns:
        The numbers with the largest sums, best first; equal sums in the order of the numbers.
    """
    if not lists or not sum(len(one) for one in lists):
        return np.zeros(0, dtype=np.int64)
    numbers, place = np.unique(np.concatenate(lists), return_inverse=True)
    shares = np.concatenate([1 / (_FUSION + 1 + np.arange(len(one))) for one in lists])
    best = np.argsort(-np.bincount(place, shares), kind="stable")[:count]
    return numbers[best].astype(np.int64)
