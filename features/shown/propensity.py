"""Estimates how likely users examine each position, from impressions in which chance arranged some positions.

Which of the items takes which of the explored positions is drawn at random. So the mean relevance is the same at each
of them, and a click among them is at position k with probability

    P(k | click within R) = p_k / Σ_{j ∈ R} p_j        R: explored positions, p: examination

whatever the items are: Luce's choice model. A swap of neighbours (Radlinski & Joachims, "FairPairs", AAAI 2006) and a
shuffle of the whole list are both such sets. The propensities maximise the likelihood, by Newton's method. The
information matrix gives their intervals (after Hunter, "MM algorithms for generalized Bradley-Terry models", 2004).
Without exploration nothing is estimated: clicks by position alone mix examination with what older rankers put on top.

Shape letters: K positions that can be compared with the first one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.shown.join import ShownRow

_Z = 1.959964
_ROUNDS, _CLOSE = 100, 1e-10
# Added to the clicks of each position of a set, so that a position without a click has a finite estimate.
_PRIOR = 0.5


@dataclass(frozen=True)
class Propensity:
    """Examination of a position relative to the first one.

    Attributes:
        position: 0-based position.
        value: Propensity; 1 for the first position. None if no exploration joins the position with the first one.
        low, high: Confidence interval of 95 %.
        shown: Explored items at this position.
        clicks: Explored items at this position that have the outcome.
    """

    position: int
    value: float | None
    low: float | None
    high: float | None
    shown: int
    clicks: int


@dataclass
class Explored:
    """Explored impressions with one set of positions.

    Attributes:
        shown: Number of impressions.
        clicks: Outcomes by position.
    """

    shown: int
    clicks: Counter[int]


def explored_sets(rows: Iterable[ShownRow], *, kind: int = 0) -> dict[tuple[int, ...], Explored]:
    """Counts the rows of explored impressions, by the positions that chance arranged.

    Args:
        rows: Rows of the join.
        kind: Number of the outcome among those of the join.
    """
    found: dict[tuple[int, ...], Explored] = {}
    for row in rows:
        if row.position in row.explored:
            counted = found.setdefault(row.explored, Explored(0, Counter()))
            counted.shown += row.position == row.explored[0]
            counted.clicks[row.position] += row.labels[kind]
    return found


def propensities(sets: Mapping[tuple[int, ...], Explored]) -> list[Propensity]:
    """Returns the propensity of each explored position, in order; an empty list without exploration."""
    used = {positions: one for positions, one in sets.items() if sum(one.clicks.values())}
    joined = _joined(used)
    values, deviations = _fitted({p: one for p, one in used.items() if p[0] in joined}, sorted(joined - {0}))
    shown, clicks = Counter[int](), Counter[int]()
    for positions, one in sets.items():
        clicks.update(one.clicks)
        shown.update(dict.fromkeys(positions, one.shown))
    rows: list[Propensity] = []
    for position in sorted(shown):
        log, deviation = values.get(position), deviations.get(position, 0.0)
        if position == 0 and 0 in joined:
            log = 0.0
        bounds = (None, None, None) if log is None else tuple(np.exp([log, log - _Z * deviation, log + _Z * deviation]))
        value, low, high = (None if one is None else float(one) for one in bounds)
        rows.append(Propensity(position, value, low, high, shown[position], clicks[position]))
    return rows


def _joined(sets: Iterable[tuple[int, ...]]) -> set[int]:
    """Returns the positions that a chain of sets joins with position 0."""
    found: set[int] = {0}
    waiting = list(sets)
    while reached := [one for one in waiting if found & set(one)]:
        found.update(*reached)
        waiting = [one for one in waiting if one not in reached]
    return found if len(found) > 1 else set()


def _fitted(sets: Mapping[tuple[int, ...], Explored], free: list[int]) -> tuple[dict[int, float], dict[int, float]]:
    """Returns the logarithm of the propensity of each free position, and its standard deviation."""
    if not free:
        return {}, {}
    place = {position: number for number, position in enumerate(free)}
    logs = np.zeros(len(free))
    information: NDArray[np.float64] = np.eye(len(free))
    for _ in range(_ROUNDS):
        gradient, information = np.zeros(len(free)), np.zeros((len(free), len(free)))
        for positions, one in sets.items():
            clicks = np.array([one.clicks[position] + _PRIOR for position in positions])
            strength = np.exp([logs[place[position]] if position in place else 0.0 for position in positions])
            share = strength / strength.sum()
            own = np.flatnonzero([position in place for position in positions])
            at = [place[positions[number]] for number in own]
            gradient[at] += (clicks - clicks.sum() * share)[own]
            information[np.ix_(at, at)] += clicks.sum() * (np.diag(share) - np.outer(share, share))[np.ix_(own, own)]
        step = np.linalg.solve(information, gradient)
        logs += np.clip(step, -2, 2)
        if np.abs(step).max() < _CLOSE:
            break
    deviations = np.sqrt(np.diag(np.linalg.inv(information)))
    return dict(zip(free, logs.tolist(), strict=True)), dict(zip(free, deviations.tolist(), strict=True))
