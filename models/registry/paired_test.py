"""Tests how much worse one ranker is than another on the same rows, and with what confidence.

- AUC by its structural components (DeLong, DeLong & Clarke-Pearson, Biometrics 1988) from midranks (Sun & Xu, IEEE
  Signal Processing Letters 2014). A user's rows go together: components are summed by user (Obuchowski, Biometrics
  1997), which is DeLong's variance where each row has a user of its own.
- Normalized entropy by the paired differences of the rows' losses.
- The calibration error by a paired bootstrap of users, within the bins of the whole.

Shape letter: N rows.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

Floats = NDArray[np.floating]
_CLIP, _BINS, _DRAWS = 1e-7, 15, 200


@dataclass(frozen=True)
class Drop:
    """Loss of the challenger and its standard error; negative if the challenger is better."""

    worse: float
    error: float

    def bounds(self, alpha: float) -> tuple[float, float]:
        """Below the first, or above the second, the truth lies with a chance of α each."""
        margin = float(scipy.stats.norm.isf(alpha)) * self.error
        return self.worse - margin, self.worse + margin


@dataclass(frozen=True)
class Drops:
    """The drops of one slice; None where it has one label alone."""

    auc: Drop
    entropy: Drop
    calibration: Drop


def drops(labels: Floats, champion: Floats, challenger: Floats, users: NDArray[np.int64]) -> Drops | None:
    """Compares two bundles' probabilities (N,) for labels (N,) in {0, 1}; rows of a user (N,) go together."""
    positives = float(labels.sum())
    if positives in (0.0, float(len(labels))):
        return None
    _, user = np.unique(users, return_inverse=True)
    return Drops(
        auc_drop(labels, champion, challenger, user),
        _entropy(labels, champion, challenger, user),
        _calibration(labels, champion, challenger, user),
    )


def auc_drop(labels: Floats, champion: Floats, challenger: Floats, user: NDArray[np.int64]) -> Drop:
    """The champion's AUC less the challenger's; `user` (N,) counts from 0."""
    (one, of_one), (two, of_two) = (_components(labels, found) for found in (champion, challenger))
    by_user = np.bincount(user, weights=of_one - of_two).astype(np.float64)
    return Drop(one - two, _clustered(by_user))


def _components(labels: Floats, found: Floats) -> tuple[float, NDArray[np.float64]]:
    """AUC, and each row's (N,) influence on it."""
    positive = labels > 0
    m, n = int(positive.sum()), int((~positive).sum())
    ranks = scipy.stats.rankdata(found)
    # Of a positive the share of negatives below it; of a negative the share of positives above it; ties count half.
    share = np.empty(len(found))
    share[positive] = (ranks[positive] - scipy.stats.rankdata(found[positive])) / n
    share[~positive] = 1 - (ranks[~positive] - scipy.stats.rankdata(found[~positive])) / m
    auc = float(share[positive].mean())
    return auc, (share - auc) / np.where(positive, m, n)


def _clustered(by_user: NDArray[np.float64]) -> float:
    """Standard error of a sum of users' influences."""
    count = len(by_user)
    return math.sqrt(float((by_user**2).sum()) * count / max(count - 1, 1))


def _entropy(labels: Floats, champion: Floats, challenger: Floats, user: NDArray[np.int64]) -> Drop:
    rate = float(labels.mean())
    base = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    before, after = (np.clip(found.astype(np.float64), _CLIP, 1 - _CLIP) for found in (champion, challenger))
    rows = np.where(labels > 0, np.log(before) - np.log(after), np.log1p(-before) - np.log1p(-after)) / base
    worse = float(rows.mean())
    return Drop(worse, _clustered(np.bincount(user, weights=rows - worse).astype(np.float64) / len(rows)))


def _calibration(labels: Floats, champion: Floats, challenger: Floats, user: NDArray[np.int64]) -> Drop:
    rng = np.random.default_rng(0)
    bins, gaps = zip(*(_gaps(labels, found) for found in (champion, challenger)), strict=True)
    users = int(user.max()) + 1

    def worse(weights: NDArray[np.float64]) -> float:
        before, after = (
            float(np.abs(np.bincount(place, weights=weights * gap)).sum())
            for place, gap in zip(bins, gaps, strict=True)
        )
        return (after - before) / max(float(weights.sum()), 1.0)

    drawn = [worse(rng.poisson(1.0, users)[user].astype(np.float64)) for _ in range(_DRAWS)]
    return Drop(worse(np.ones(len(labels))), float(np.std(drawn)))


def _gaps(labels: Floats, found: Floats) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Each row's (N,) bin of equally many rows, and its probability less its label."""
    place = np.empty(len(found), dtype=np.int64)
    for number, rows in enumerate(np.array_split(np.argsort(found, kind="stable"), _BINS)):
        place[rows] = number
    return place, found.astype(np.float64) - labels
