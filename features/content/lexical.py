"""Lexical channel of a text search: BM25 over the terms of the catalogue's texts.

A vector blurs a rare word, BM25 finds it. Both lists are fused by reciprocal ranks, which need no common scale.
Robertson & Zaragoza, "The Probabilistic Relevance Framework" (2009); Cormack et al., "Reciprocal Rank Fusion" (SIGIR
2009), equation 1.

An index that follows a stream reads hashes of terms instead of terms, since a record holds them in four bytes each.

Shape letters: N texts, M lists, T terms of a text, repeats included.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from features.content.terms import VERSION, tokens
from features.hashing import fingerprint

FUSION = 60
"""Constant k of reciprocal rank fusion, as in the paper."""
LEXICAL_WEIGHT = 10.0
"""Weight of the lexical list that a server fuses with a list of vectors, whose weight is 1."""
SATURATION, LENGTH_WEIGHT = 1.2, 0.75
"""Constants k1 and b of BM25."""
MOST_TERMS = 1_024
"""Terms of a text that an index reads, repeats included; the terms behind them are not found."""


class LexicalIndex:
    """BM25 index of texts, with the terms that LSA weighs.

    Args:
        texts: N texts, at least one; a text may be empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        # Imported on use: a server searches by its own index.
        import bm25s

        self._index = bm25s.BM25(method="lucene", k1=SATURATION, b=LENGTH_WEIGHT, backend="numpy")
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


def term_ids(text: str) -> NDArray[np.uint32]:
    """Returns the hashes (T,) of a text's first `MOST_TERMS` terms, sorted, with repeats.

    Two terms of a catalogue of 100,000 terms share a hash about once.
    """
    return np.sort((fingerprint(tokens(text)[:MOST_TERMS]) >> np.uint64(32)).astype(np.uint32))


def pack_terms(text: str) -> bytes:
    """Returns a text's terms as a record keeps them: the version of the terms and the hashes, little-endian uint32.

    A text without terms gives no bytes.
    """
    ids = term_ids(text)
    return np.concatenate([[VERSION], ids]).astype("<u4").tobytes() if len(ids) else b""


def unpack_terms(data: bytes) -> NDArray[np.uint32]:
    """Returns the hashes (T,) of `pack_terms`; none of bytes of another version, whose terms mean something else."""
    found = np.frombuffer(data[: len(data) // 4 * 4], dtype="<u4")
    return found[1:].astype(np.uint32) if len(found) and found[0] == VERSION else np.zeros(0, dtype=np.uint32)


def fuse(lists: Sequence[NDArray[np.integer]], count: int, weights: Sequence[float] = ()) -> NDArray[np.int64]:
    """Returns the numbers of `fuse_scores`."""
    return fuse_scores(lists, count, weights)[0]


def fuse_scores(
    lists: Sequence[NDArray[np.integer]], count: int, weights: Sequence[float] = ()
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Fuses ranked lists by the sum of weight / (60 + rank), rank from 1.

    Args:
        lists: M lists of numbers, best first; a number occurs once in a list.
        count: Most numbers to return.
        weights: M weights; by default 1 for each list, as in the paper.

    Returns:
        The numbers with the largest sums, best first, and the sums. Equal sums are in the order of the numbers.
    """
    if not lists or not sum(len(one) for one in lists):
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    numbers, place = np.unique(np.concatenate(lists), return_inverse=True)
    weighed = zip(lists, weights or [1.0] * len(lists), strict=True)
    shares = np.concatenate([weight / (FUSION + 1 + np.arange(len(one))) for one, weight in weighed])
    sums: NDArray[np.float64] = np.bincount(place, shares).astype(np.float64)
    best = np.argsort(-sums, kind="stable")[:count]
    return numbers[best].astype(np.int64), sums[best]
