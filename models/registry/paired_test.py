"""Tests by how much a challenger is worse than the champion on the same rows, with confidence bounds.

- AUC by its structural components (DeLong, DeLong & Clarke-Pearson, Biometrics 1988) from midranks (Sun & Xu, IEEE
  Signal Processing Letters 2014). A user's rows are dependent, so components are summed by user (Obuchowski, Biometrics
  1997). If each row has a different user, this is DeLong's variance.
- Normalized entropy by the paired differences of the rows' losses.
- The calibration error by a paired bootstrap of users, within the bins of the whole test set.

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
    """Loss of the challenger.

    Attributes:
        worse: Loss of the challenger, negative if the challenger is better.
        error: Standard error of the loss.
    """

    worse: float
    error: float

    def bounds(self, alpha: float) -> tuple[float, float]:
        """Returns a lower and an upper confidence bound of the loss, each exceeded with probability α."""
        margin = float(scipy.stats.norm.isf(alpha)) * self.error
        return self.worse - margin, self.worse + margin


@dataclass(frozen=True)
class Drops:
    """Losses of the challenger on one slice.

    Attributes:
        auc: Loss of AUC.
        entropy: Rise of normalized entropy.
        calibration: Rise of the expected calibration error.
    """

    auc: Drop
    entropy: Drop
    calibration: Drop


def drops(labels: Floats, champion: Floats, challenger: Floats, users: NDArray[np.int64]) -> Drops | None:
    """Compares the probabilities of two bundles on the same rows.

    Args:
        labels: (N,) labels in {0, 1}.
        champion: (N,) probabilities of the champion.
        challenger: (N,) probabilities of the challenger.
        users: (N,) users of the rows, whose rows are dependent.

    Returns:
        The losses, or None if all labels are equal.
    """
    positives = float(labels.sum())
    if positives in (0.0, float(len(labels))):
        return None
    _, user = np.unique(users, return_inverse=True)
    return Drops(
        auc_drop(labels, champion, challenger, user),
        _entropy(labels, champion, challenger, user),
        _calibration(labels, champion, challenger, user),
    )


def mean_drop(champion: Floats, challenger: Floats) -> Drop | None:
    """Returns the champion's mean score minus the challenger's on the same queries; None for fewer than two queries.

    Args:
        champion: (n,) scores of the champion.
        challenger: (n,) scores of the challenger.
    """
    if len(champion) < 2:
        return None
    worse = champion.astype(np.float64) - challenger
    return Drop(float(worse.mean()), float(worse.std(ddof=1)) / math.sqrt(len(worse)))


def auc_drop(labels: Floats, champion: Floats, challenger: Floats, user: NDArray[np.int64]) -> Drop:
    """Returns the champion's AUC minus the challenger's.

    Args:
        labels: (N,) labels in {0, 1}.
        champion: (N,) probabilities of the champion.
        challenger: (N,) probabilities of the challenger.
        user: (N,) numbers of the rows' users, from 0.
    """
    auc_champion, influence_champion = _components(labels, champion)
    auc_challenger, influence_challenger = _components(labels, challenger)
    by_user = np.bincount(user, weights=influence_champion - influence_challenger).astype(np.float64)
    return Drop(auc_champion - auc_challenger, _clustered(by_user))


def _components(labels: Floats, scores: Floats) -> tuple[float, NDArray[np.float64]]:
    """Returns the AUC, and the influence of each row (N,) on the AUC."""
    positive = labels > 0
    m, n = int(positive.sum()), int((~positive).sum())
    ranks = scipy.stats.rankdata(scores)
    # Share of negatives below a positive, and share of positives above a negative. Ties count half.
    share = np.empty(len(scores))
    share[positive] = (ranks[positive] - scipy.stats.rankdata(scores[positive])) / n
    share[~positive] = 1 - (ranks[~positive] - scipy.stats.rankdata(scores[~positive])) / m
    auc = float(share[positive].mean())
    return auc, (share - auc) / np.where(positive, m, n)


def _clustered(by_user: NDArray[np.float64]) -> float:
    """Returns the standard error of the sum of users' influences."""
    count = len(by_user)
    return math.sqrt(float((by_user**2).sum()) * count / max(count - 1, 1))


def _entropy(labels: Floats, champion: Floats, challenger: Floats, user: NDArray[np.int64]) -> Drop:
    rate = float(labels.mean())
    base = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    before, after = (np.clip(scores.astype(np.float64), _CLIP, 1 - _CLIP) for scores in (champion, challenger))
    rows = np.where(labels > 0, np.log(before) - np.log(after), np.log1p(-before) - np.log1p(-after)) / base
    worse = float(rows.mean())
    return Drop(worse, _clustered(np.bincount(user, weights=rows - worse).astype(np.float64) / len(rows)))


def _calibration(labels: Floats, champion: Floats, challenger: Floats, user: NDArray[np.int64]) -> Drop:
    rng = np.random.default_rng(0)
    bins, gaps = zip(*(_gaps(labels, scores) for scores in (champion, challenger)), strict=True)
    users = int(user.max()) + 1

    def worse(weights: NDArray[np.float64]) -> float:
        before, after = (
            float(np.abs(np.bincount(number, weights=weights * gap)).sum())
            for number, gap in zip(bins, gaps, strict=True)
        )
        return (after - before) / max(float(weights.sum()), 1.0)

    drawn = [worse(rng.poisson(1.0, users)[user].astype(np.float64)) for _ in range(_DRAWS)]
    return Drop(worse(np.ones(len(labels))), float(np.std(drawn)))


def _gaps(labels: Floats, scores: Floats) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the bin of each row (N,), and its probability minus its label. All bins have about as many rows."""
    bins = np.empty(len(scores), dtype=np.int64)
    for number, rows in enumerate(np.array_split(np.argsort(scores, kind="stable"), _BINS)):
        bins[rows] = number
    return bins, scores.astype(np.float64) - labels
