"""Simulates windows of sampled requests: users with tastes of their own, and a training set that is drawn each time.

Shape letters: R requests, U users, C cells, n candidates.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.profile.profile import ProfileMeasure, effective
from serving.skew.evidence import psi

Floats = NDArray[np.float64]
_ALIKE = 3.0
"""Concentration of users' tastes: a user's candidates resemble each other as 1 / (1 + 3) of the variance."""
_ROWS, _MOST_ROWS, _SKEW = 0.1, 200, 1.3
_TENTHS = list(map(float, range(9)))
MEASURES = (
    *(ProfileMeasure(f"number{n}", "values", [0.1] * 10, 0.0, edges=_TENTHS) for n in range(3)),
    *(ProfileMeasure(f"word{n}", "values", [0.5, 0.3, 0.1, 0.1], 0.0, rows=[7, 8, 9]) for n in range(3)),
    *(ProfileMeasure(f"word{n}", "missing", [0.9, 0.1], 0.0) for n in range(3)),
    *(ProfileMeasure(f"word{n}", "unseen", [0.98, 0.02], 0.0) for n in range(3)),
    ProfileMeasure("score", "values", [0.1] * 10, 0.0, edges=_TENTHS),
)
"""Measures of a simulated profile, with the true shares of training."""


def tilted(shares: list[float], scores: Floats, target: float) -> Floats:
    """Returns shares (C,) p exp(λ s) with a population stability index to p.

    Args:
        shares: (C,) p.
        scores: (C,) s.
        target: The index.
    """
    p = np.array(shares)
    low, high = 0.0, 9.0
    for _ in range(60):
        middle = (low + high) / 2
        found = p * np.exp(middle * scores)
        found /= found.sum()
        low, high = (middle, high) if psi(found, p) < target else (low, middle)
    return found


_LINE, _ZIGZAG = np.linspace(-1, 1, 10), np.tile([-0.5, 0.5], 5)
_WORD_LINE = np.linspace(-1, 1, 4)
DRIFTS: Mapping[str, Mapping[int, Floats]] = {
    "none": {},
    "number, PSI .25": {0: tilted(MEASURES[0].shares, _LINE, 0.25)},
    "number in a zigzag, PSI .25": {0: tilted(MEASURES[0].shares, _ZIGZAG, 0.25)},
    "category, PSI .25": {3: tilted(MEASURES[3].shares, _WORD_LINE, 0.25)},
    "score, PSI .25": {12: tilted(MEASURES[12].shares, np.abs(_LINE), 0.25)},
    "missing, 10 to 15 %": {6: np.array([0.85, 0.15])},
    "unseen, 2 to 7 %": {9: np.array([0.93, 0.07])},
    "tolerated: number, PSI .05": {0: tilted(MEASURES[0].shares, _LINE, 0.05)},
}
"""Kinds of drift: shares (C,) of the measures that drift, by their number."""


@dataclass(frozen=True)
class Window:
    """Requests of a window in order.

    Attributes:
        shares: For each measure the shares (R, C) of the requests' candidates.
        first: (R,) True for a user's first request.
    """

    shares: list[Floats]
    first: NDArray[np.bool_]


def drawn_training(rng: np.random.Generator, users: int) -> list[ProfileMeasure]:
    """Returns the measures with the shares of a sample of users, of whom some have many rows."""
    found = []
    for one in MEASURES:
        rows = np.minimum(rng.geometric(_ROWS, users), _MOST_ROWS)
        shares = _drawn(rng, _tastes(rng, one.shares, users), rows)
        mean, variance = shares.mean(axis=0), shares.var(axis=0)
        units = effective(users, mean, variance, most=float(rows.sum()))
        found.append(msgspec.structs.replace(one, shares=mean.tolist(), units=units))
    return found


def drawn_window(rng: np.random.Generator, requests: int, *, candidates: int, drift: Mapping[int, Floats]) -> Window:
    """Returns the requests of users, whose frequencies follow Zipf's law.

    Args:
        rng: Source of chance.
        requests: R, the number of requests.
        candidates: n, the number of candidates of a request.
        drift: Shares (C,) of the measures that drift, by their number.
    """
    users = np.minimum(rng.zipf(_SKEW, requests), 20_000)
    distinct, earliest, place = np.unique(users, return_index=True, return_inverse=True)
    first = np.zeros(requests, dtype=np.bool_)
    first[earliest] = True
    shares = []
    for number, one in enumerate(MEASURES):
        tastes = _tastes(rng, drift.get(number, one.shares), len(distinct))
        shares.append(_drawn(rng, tastes[place], np.full(requests, candidates)))
    return Window(shares, first)


def _tastes(rng: np.random.Generator, shares: list[float] | Floats, users: int) -> Floats:
    return rng.dirichlet(_ALIKE * np.asarray(shares) + 1e-9, size=users)


def _drawn(rng: np.random.Generator, tastes: Floats, examples: NDArray[np.int64]) -> Floats:
    found: Floats = rng.multinomial(examples, tastes) / examples[:, None]
    return found
