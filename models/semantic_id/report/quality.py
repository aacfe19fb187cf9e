"""Measures a coding of a catalogue: its branching, its shared codes, the purity of its nodes.

Shape letters: N items, Q levels, D dim of a content vector.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.errors import DatasetError

_QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Depth:
    """Nodes of one depth; a node is the items that share a prefix.

    Attributes:
        depth: Codes in the prefix, from 1.
        used: Codes of this level that some item has.
        perplexity: exp of the entropy of this level's codes.
        branching: exp H(code | the prefix above): the number of codes over which a node's items spread, as if evenly.
        nodes: Prefixes that some item has.
        sizes: Quartiles of the items under a prefix, weighted by item.
        shared: Share of items whose prefix another item has.
        purity: Mean cosine of the pairs of items that share the prefix (Singh et al., RecSys 2024, table 1); None if no
            two do.
    """

    depth: int
    used: int
    perplexity: float
    branching: float
    nodes: int
    sizes: tuple[float, float, float]
    shared: float
    purity: float | None


@dataclass(frozen=True)
class IdQuality:
    """Quality of a coding of N items.

    Attributes:
        unique: Distinct Semantic IDs over items.
        sharing: Items whose whole Semantic ID another item has.
        largest_group: Items that share the most crowded Semantic ID.
        cosine: Mean over all pairs of items; purity should exceed it.
    """

    items: int
    unique: float
    sharing: int
    largest_group: int
    cosine: float
    depths: tuple[Depth, ...]


def id_quality(codes: NDArray[np.integer], vectors: NDArray[np.float32]) -> IdQuality:
    """Measures codes (N, Q) over the content vectors (N, D) of the same items.

    Raises:
        DatasetError: There are no items, or the numbers of codes and vectors differ.
    """
    if not len(codes) or len(codes) != len(vectors):
        raise DatasetError(f"codes: expected those of the {len(vectors)} items with vectors, got {len(codes)}")
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    above = np.zeros(len(codes), dtype=np.int64)
    depths = []
    for level in range(codes.shape[1]):
        node = np.unique(np.stack([above, codes[:, level]], axis=1), axis=0, return_inverse=True)[1].ravel()
        sizes = np.bincount(node)
        own = sizes[node]
        first, middle, last = (float(size) for size in np.quantile(own, _QUARTILES))
        depths.append(
            Depth(
                depth=level + 1,
                used=len(np.unique(codes[:, level])),
                perplexity=float(np.exp(_entropy(np.unique(codes[:, level], return_counts=True)[1]))),
                branching=float(np.exp(_entropy(sizes) - _entropy(np.bincount(above)))),
                nodes=len(sizes),
                sizes=(first, middle, last),
                shared=float((own > 1).mean()),
                purity=_mean_cosine(unit, node),
            )
        )
        above = node
    return IdQuality(
        items=len(codes),
        unique=len(sizes) / len(codes),
        sharing=int((own > 1).sum()),
        largest_group=int(sizes.max()),
        cosine=_mean_cosine(unit, np.zeros(len(codes), dtype=np.int64)) or 0.0,
        depths=tuple(depths),
    )


def _entropy(counts: NDArray[np.int64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _mean_cosine(unit: NDArray[np.float32], node: NDArray[np.int64]) -> float | None:
    """Averages over all pairs within nodes: for n unit vectors of sum s, all pairs' cosines sum to (|s|² - n) / 2."""
    order = np.argsort(node, kind="stable")
    sizes = np.bincount(node)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    sums = np.add.reduceat(unit[order].astype(np.float64), starts, axis=0)
    pairs = int((sizes * (sizes - 1) // 2).sum())
    norms = (unit.astype(np.float64) ** 2).sum()
    return float(((sums**2).sum() - norms) / 2 / pairs) if pairs else None
