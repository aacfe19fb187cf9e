"""Examples of what concepts say: the items of the greatest share, and why an item and its nearest item are alike.

Shape letters: N items, D dim.
"""

from typing import NamedTuple

import numpy as np

from models.encoder.meaning.concepts import ConceptHead, Floats
from models.encoder.measure import nearest

_MOST_ITEMS = 20_000


class Match(NamedTuple):
    """An item, its nearest item, and the concepts that both share most.

    Attributes:
        item, near: Rows of the two items.
        shared: Names of concepts, each with the probability that both items carry it, greatest first.
    """

    item: int
    near: int
    shared: list[tuple[str, float]]


def typical_items(head: ConceptHead, vectors: Floats, count: int = 3) -> dict[str, list[int]]:
    """Returns the rows of the items with the greatest share of each concept, greatest first.

    Args:
        head: Concepts.
        vectors: (N, D) vectors of the items; at most the first 20,000 are read.
        count: Items of a concept.
    """
    shares = head.weigh(vectors[:_MOST_ITEMS])
    order = np.argsort(-shares, axis=0, kind="stable")[:count]
    return {name: order[:, place].tolist() for place, name in enumerate(head.names)}


def matches(head: ConceptHead, vectors: Floats, count: int = 8, seed: int = 0) -> list[Match]:
    """Returns drawn items, each with its nearest other item and the concepts that explain the match.

    Args:
        head: Concepts.
        vectors: (N, D) unit vectors of the items; at most the first 20,000 are read.
        count: Number of matches.
        seed: Seed of the draw.
    """
    vectors = vectors[:_MOST_ITEMS]
    filled = np.any(vectors, axis=1)
    asked = np.sort(np.random.default_rng([seed, 37]).permutation(np.flatnonzero(filled))[:count])
    if filled.sum() < 2:
        return []
    found = nearest(vectors[asked], vectors, filled, 2)
    others = [
        next(row for row in rows if row != item) for item, rows in zip(asked.tolist(), found.tolist(), strict=True)
    ]
    return [
        Match(item, near, head.shared(vectors[item], vectors[near]))
        for item, near in zip(asked.tolist(), others, strict=True)
    ]
