"""Measures of concepts and aspects: shares among neighbours, others kept, values truly shared.

Shape letters: N items, D dim, Q queries, k found items.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.encoder.meaning.concepts import ConceptHead, Floats
from models.encoder.measure import nearest

Found = NDArray[np.int64]
Bools = NDArray[np.bool_]


def nearest_others(vectors: Floats, count: int) -> Found:
    """Returns the rows of the items nearest to each item, without the item itself: (N, count)."""
    found = nearest(vectors, vectors, np.ones(len(vectors), dtype=bool), count + 1)
    itself = found == np.arange(len(vectors))[:, None]
    # An item with equal neighbours may not be among its nearest; then the last one is left out.
    itself[~itself.any(axis=1), -1] = True
    others: Found = found[~itself].reshape(len(vectors), count)
    return others


def share(found: Found, carries: Bools) -> float:
    """Returns the share of found items (Q, k) that carry a concept (N,)."""
    return float(carries[found].mean()) if found.size else 0.0


def others_kept(before: Found, after: Found, carries: Bools) -> float:
    """Returns the share of items without the concept found before (Q, k) that are found after (Q, k) too."""
    wanted = ~carries[before]
    kept = (before[:, :, None] == after[:, None, :]).any(axis=2)
    return float(kept[wanted].mean()) if wanted.any() else 1.0


def sharing(found: Found, queries: NDArray[np.integer], values: Sequence[set[str]]) -> float:
    """Returns the share of found items (Q, k) that share a value with the item that asked.

    Queries without a value are left out.
    """
    asked = [(query, rows) for query, rows in zip(queries.tolist(), found.tolist(), strict=True) if values[query]]
    hits = [not values[query].isdisjoint(values[row]) for query, rows in asked for row in rows]
    return float(np.mean(hits)) if hits else 0.0


def top_shared(head: ConceptHead, queries: Floats, items: Floats) -> NDArray[np.int64]:
    """Returns the concept that each query (Q, D) shares most with its item (Q, D): (Q,) row in the head."""
    both = head.weigh(queries).astype(np.float64) * head.weigh(items)
    return np.asarray(both.argmax(axis=1), dtype=np.int64)


def search(queries: Floats, vectors: Floats, count: int, *, seen: Sequence[NDArray[np.integer]], out: Bools) -> Found:
    """Returns the nearest rows of each query (Q, D), (Q, count), without the query's own rows and those left out.

    Args:
        queries: (Q, D) unit vectors.
        vectors: (N, D) unit vectors.
        count: Number of rows.
        seen: Q arrays of rows that the query's user knows.
        out: (N,) True for a row that is left out of every answer.
    """
    scores = queries @ vectors.T
    scores[:, out] = -np.inf
    for row, known in enumerate(seen):
        scores[row, known] = -np.inf
    found: Found = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return found
