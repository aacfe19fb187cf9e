"""Compares two codings of the same items: it measures how much a retraining kept.

Normalised mutual information is reported because other work reports it. Read it with care: with many small clusters it
is near .9 even if nothing was kept. The adjusted Rand index is 0 by chance.

Shape letters: N items, Q levels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from features.errors import DatasetError


@dataclass(frozen=True)
class Comparison:
    """Agreement of two codings.

    Attributes:
        items: N.
        unchanged: By depth, the share of items whose prefix is the same.
        pairs_kept: Share of the pairs of items with one first code that still have one.
        rand: By depth, the adjusted Rand index of the items' prefixes as clusters (Hubert & Arabie, 1985); it does not
            depend on names.
        mutual_information: By depth, normalised.
    """

    items: int
    unchanged: tuple[float, ...]
    pairs_kept: float
    rand: tuple[float, ...]
    mutual_information: tuple[float, ...]


def compare(before: NDArray[np.uint16], after: NDArray[np.uint16]) -> Comparison:
    """Compares codes (N, Q) of the same items.

    Raises:
        DatasetError: The shapes differ, or there are no items.
    """
    if before.shape != after.shape or not len(before):
        raise DatasetError(
            f"codes: expected the same items coded twice with as many levels, got {before.shape} and {after.shape}"
        )
    same = np.logical_and.accumulate(before == after, axis=1)
    clusters = [(_prefixes(before, depth), _prefixes(after, depth)) for depth in range(1, before.shape[1] + 1)]
    return Comparison(
        items=len(before),
        unchanged=tuple(float(share) for share in same.mean(axis=0)),
        pairs_kept=pairs_kept(before[:, 0], after[:, 0]),
        rand=tuple(float(adjusted_rand_score(*pair)) for pair in clusters),
        mutual_information=tuple(float(normalized_mutual_info_score(*pair)) for pair in clusters),
    )


def pairs_kept(before: NDArray[np.integer], after: NDArray[np.integer]) -> float:
    """Returns the share of pairs in one cluster before, (N,), that are in one cluster after; 1 without such pairs."""
    together = _pairs(np.unique(before, return_counts=True)[1])
    still = _pairs(np.unique(np.stack([before, after], axis=1), axis=0, return_counts=True)[1])
    return still / together if together else 1.0


def _pairs(sizes: NDArray[np.int64]) -> int:
    return int((sizes * (sizes - 1) // 2).sum())


def _prefixes(codes: NDArray[np.uint16], depth: int) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.unique(codes[:, :depth], axis=0, return_inverse=True)[1].ravel()
    return found
