"""Counts collisions of hashed values in the table and compares them with their closed form.

Shape letters: R rows, N values, c chunks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Collisions:
    """Pairs of hashed values on one row, with the number that R rows and a uniform hash predict.

    The indicator of each pair has the mean p = 1/R, and any two are independent, so that over n pairs

        expected = n p,   deviation = √(n p (1 − p)),   z = (pairs − expected) / deviation.

    n is C(N, 2) for a lookup with itself and N_s · N_t for two lookups; `fully` has p = R⁻ᶜ.

    Attributes:
        of: `salt#chunk` of one lookup, `salt` for `fully`, `salt × salt` over all pairs of their different lookups.
        kind: `within` a lookup, `between` lookups, or `fully`: the same rows in all chunks of one feature.
    """

    of: str
    kind: str
    pairs: int
    expected: float
    deviation: float
    z: float


def collisions(rows: Mapping[str, NDArray[np.int64]], table_rows: int) -> tuple[Collisions, ...]:
    """Counts the colliding pairs of the values of some salts, within and between lookups.

    rows: By salt, the rows (N, c) in [0, R) of its distinct values.
    table_rows: R.
    """
    found: list[Collisions] = []
    for salt, own in rows.items():
        trials = len(own) * (len(own) - 1) // 2
        for chunk, column in enumerate(own.T):
            pairs = _pairs(column[:, None])
            found += [_judged(f"{salt}#{chunk}", "within", pairs, trials, table_rows)]
        found.append(_judged(salt, "fully", _pairs(own), trials, table_rows ** own.shape[1]))
    counts = {salt: [np.bincount(chunk, minlength=table_rows) for chunk in own.T] for salt, own in rows.items()}
    for one, two in combinations_with_replacement(rows, 2):
        together = combinations(counts[one], 2) if one == two else ((a, b) for a in counts[one] for b in counts[two])
        shared = [int(a @ b) for a, b in together]
        if shared:
            of = len(shared) * len(rows[one]) * len(rows[two])
            found.append(_judged(f"{one} × {two}", "between", sum(shared), of, table_rows))
    return tuple(found)


def _judged(of: str, kind: str, pairs: int, trials: int, cells: int) -> Collisions:
    expected, deviation = trials / cells, (trials / cells * (1 - 1 / cells)) ** 0.5
    return Collisions(of, kind, pairs, expected, deviation, (pairs - expected) / deviation if deviation else 0.0)


def _pairs(rows: NDArray[np.int64]) -> int:
    """Counts pairs of equal rows of (N, c)."""
    count = np.unique(rows, axis=0, return_counts=True)[1]
    return int((count * (count - 1) // 2).sum())


def total(found: Sequence[Collisions], kind: str) -> Collisions:
    """Returns all counts of a kind together."""
    own = [one for one in found if one.kind == kind]
    pairs, expected = sum(one.pairs for one in own), sum(one.expected for one in own)
    deviation = sum(one.deviation**2 for one in own) ** 0.5
    return Collisions("all", kind, pairs, expected, deviation, (pairs - expected) / deviation if deviation else 0.0)
