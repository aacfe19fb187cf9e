"""Two codings of the same items, side by side: what a retraining kept.

Normalised mutual information is reported because others do, and read with care: with many small clusters it is near .9
where nothing was kept. The adjusted Rand index is 0 by chance.

Shape letters: N items, Q levels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from features.errors import DatasetError


@dataclass(frozen=True)
class Comparison:
    """What two codings share.

    Attributes:
        items: N.
        unchanged: by depth, the share of items whose prefix is the same.
        pairs_kept: of the pairs of items with one first code, the share that still have one.
        rand: by depth, the adjusted Rand index of the items' prefixes as clusters (Hubert & Arabie, 1985); it does not
            depend on names.
        mutual_information: by depth, normalised.
    """

    items: int
    unchanged: tuple[float, ...]
    pairs_kept: float
    rand: tuple[float, ...]
    mutual_information: tuple[float, ...]


def compare(before: NDArray[np.uint16], after: NDArray[np.uint16]) -> Comparison:
    """Compares codes (N, Q) of the same items.

    Raises:
        DatasetError: the shapes differ, or there are no items.
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
    """Of the pairs that share a cluster before, (N,), the share that share one after; 1 where there is no such pair."""
    together = _pairs(np.unique(before, return_counts=True)[1])
    still = _pairs(np.unique(np.stack([before, after], axis=1), axis=0, return_counts=True)[1])
    return still / together if together else 1.0


def _pairs(sizes: NDArray[np.int64]) -> int:
    return int((sizes * (sizes - 1) // 2).sum())


def _prefixes(codes: NDArray[np.uint16], depth: int) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.unique(codes[:, :depth], axis=0, return_inverse=True)[1].ravel()
    return found
