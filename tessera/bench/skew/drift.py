"""`drift`: how rarely the alarms of drift are false, and how early they come, beside fixed-sample tests at each look.

Each window has a training set of its own, thirty looks, and users who come again. All tests see the same windows:

- bets: `serving.skew.alarm`, with the default tolerances, and with none, where an alarm without drift is most likely.
- chi-square of users: Pearson's test of the users' mean shares, Bonferroni over measures, at each look. No tolerance.
- corrected chi-square of users: the same, divided by the design effect (Rao & Scott).
- chi-square, PSI > .25 of candidates: all candidates of all requests are draws, as in most monitors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray
from rich.console import Console

from models.profile.profile import ProfileMeasure
from serving.skew.alarm import DriftAlarms, DriftLimits
from serving.skew.evidence import psi
from tessera.bench.harness.data import progress_bar
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.skew.window import DRIFTS, Window, drawn_training, drawn_window

_ALPHA, _LARGE = 0.01, 0.25
_NONE, _TOLERATED = "none", "tolerated: number, PSI .05"
BETS, STRICT = "bets", "bets without tolerance"
CONTROLS = (
    "chi-square of users",
    "corrected chi-square of users",
    "chi-square of candidates",
    "PSI > .25 of candidates",
)
_TINY = 1e-6
_MOST_FALSE, _LEAST_POWER = 0.01, 0.8


@dataclass(frozen=True)
class DriftSizes:
    """Sizes of the measurement.

    Attributes:
        same: Windows without drift, over all seeds.
        drifted: Windows of each kind of drift, for each seed.
        requests: Requests of a window.
        candidates: Candidates of a request.
        looks: Looks at a window.
        training: Users of the training set of windows with drift. A false alarm is likelier with few, so windows
            without drift have a fifth of them.
    """

    same: int = 1_000
    drifted: int = 20
    requests: int = 6_000
    candidates: int = 20
    looks: int = 30
    training: int = 10_000


def drift(out: Path, *, seeds: int, console: Console, sizes: DriftSizes = DriftSizes()) -> BenchResult:
    """Measures each kind of drift in each seed, all tests on the same windows."""
    rows = measured_rows()
    with progress_bar(console) as progress:
        task = progress.add_task("drift", total=seeds * len(DRIFTS))
        for seed in range(seeds):
            for number, kind in enumerate(DRIFTS):
                rows.extend(_rows(kind, np.random.default_rng((seed, number)), seed, seeds, sizes))
                progress.advance(task)
    return BenchResult("drift", "simulated", seeds, rows, claims(rows))


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Returns the claims over all seeds: false alarms, and the share of windows in which each drift is found."""

    def share(kind: str, test: str) -> float:
        chosen = [row for row in rows if (row["drift"], row["test"]) == (kind, test)]
        return float(sum(row["alarmed"] for row in chosen) / max(sum(row["windows"] for row in chosen), 1))

    found = [
        at_most("windows without drift that alarm, no tolerance", share(_NONE, STRICT), _MOST_FALSE),
        at_most("windows without drift that alarm", share(_NONE, BETS), _MOST_FALSE),
        at_most("windows with a tolerated drift that alarm", share(_TOLERATED, BETS), _MOST_FALSE),
    ]
    kinds = [kind for kind in DRIFTS if kind not in (_NONE, _TOLERATED)]
    return found + [at_least(f"{kind}: windows that alarm", share(kind, BETS), _LEAST_POWER) for kind in kinds]


def _rows(kind: str, rng: np.random.Generator, seed: int, seeds: int, sizes: DriftSizes) -> Iterator[dict[str, Any]]:
    """Yields a row for each test: the windows that it alarmed in, and the users that had come by then."""
    same = kind == _NONE
    windows = -(-sizes.same // seeds) if same else sizes.drifted
    alarms: dict[str, list[int]] = {test: [] for test in (BETS, STRICT, *CONTROLS)}
    users = []
    for _ in range(windows):
        measures = drawn_training(rng, sizes.training // 5 if same else sizes.training)
        window = drawn_window(rng, sizes.requests, candidates=sizes.candidates, drift=DRIFTS[kind])
        counted = np.cumsum(window.first)
        users.append(int(counted[-1]))
        for test, request in first_alarms(measures, window, sizes).items():
            if request:
                alarms[test].append(int(counted[request - 1]))
    for test, found in alarms.items():
        row = {"drift": kind, "seed": seed, "test": test, "windows": windows, "alarmed": len(found)}
        yield row | {"users": float(np.median(found)) if found else None, "users of a window": float(np.median(users))}


def first_alarms(measures: Sequence[ProfileMeasure], window: Window, sizes: DriftSizes) -> dict[str, int]:
    """Returns the number of requests at the first look at which each test alarms. 0: at none."""
    requests = len(window.first)
    ends = np.unique(np.geomspace(min(50, requests), requests, sizes.looks).astype(int))
    found = {BETS: _bets(measures, window, ends, DriftLimits(_ALPHA))}
    found[STRICT] = _bets(measures, window, ends, DriftLimits(_ALPHA, _TINY, _TINY))
    each = np.ones(requests, dtype=np.bool_)
    candidates = [_sums(shares, each, ends) for shares in window.shares]
    users = [_sums(shares, window.first, ends) for shares in window.shares]
    trained = [np.maximum(np.array(one.shares), _TINY) for one in measures]
    counted = np.cumsum(window.first)[ends - 1]
    squares = [_sums(shares**2, window.first, ends) for shares in window.shares]
    corrected = [sums * _independent(sums, own, counted)[:, None] for sums, own in zip(users, squares, strict=True)]
    alarms = (
        np.any([_chi_square(*pair, len(measures)) for pair in zip(users, trained, strict=True)], axis=0),
        np.any([_chi_square(*pair, len(measures)) for pair in zip(corrected, trained, strict=True)], axis=0),
        np.any(
            [
                _chi_square(sizes.candidates * sums, p, len(measures))
                for sums, p in zip(candidates, trained, strict=True)
            ],
            axis=0,
        ),
        np.any([psi(sums / ends[:, None], p) > _LARGE for sums, p in zip(candidates, trained, strict=True)], axis=0),
    )
    return found | {
        test: int(ends[hit.argmax()]) if hit.any() else 0 for test, hit in zip(CONTROLS, alarms, strict=True)
    }


def _bets(measures: Sequence[ProfileMeasure], window: Window, ends: NDArray[np.int64], limits: DriftLimits) -> int:
    alarms = DriftAlarms(measures, limits)
    start = 0
    for end in map(int, ends):
        chosen = np.flatnonzero(window.first[start:end]) + start
        for number, shares in enumerate(window.shares):
            alarms.add(number, shares[chosen])
        if (alarms.evidence() >= alarms.enough).any():
            return end
        start = end
    return 0


def _sums(shares: NDArray[np.float64], chosen: NDArray[np.bool_], ends: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the sums (L, C) of the chosen requests' shares (R, C) up to each end (L,)."""
    found: NDArray[np.float64] = np.cumsum(shares * chosen[:, None], axis=0)[ends - 1]
    return found


def _independent(
    sums: NDArray[np.float64], squares: NDArray[np.float64], users: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Returns the independent draws (L,) that a user is worth, of the sums (L, C) of shares and of their squares."""
    mean = sums / users[:, None]
    variance = (squares / users[:, None] - mean**2).sum(axis=1)
    # Users who are all alike do not tell how they vary.
    told = variance > _TINY
    return np.where(told, (mean * (1 - mean)).sum(axis=1) / np.where(told, variance, 1.0), 1.0)


def _chi_square(sums: NDArray[np.float64], trained: NDArray[np.float64], measures: int) -> NDArray[np.bool_]:
    """Returns for sums (L, C) whether Pearson's test rejects the shares (C,) at a level over some measures."""
    expected = trained * sums.sum(axis=1, keepdims=True)
    statistic = ((sums - expected) ** 2 / expected).sum(axis=1)
    found: NDArray[np.bool_] = scipy.stats.chi2.sf(statistic, len(trained) - 1) < _ALPHA / measures
    return found
