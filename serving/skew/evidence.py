"""Evidence that a served distribution is farther from training's than allowed, valid at any number of looks.

A user's first request of a window is one observation: the shares x (C,) of the request's candidates in the cells of a
measure. Later requests of the user are not counted, because they resemble the first. Let θ be the mean of x.

- The null is a set: every θ that is near training's shares. It is convex, so a distribution outside it is beyond a
  plane: a score s (C,) has a larger mean s · θ there than m, the largest mean of the set.
- A bet on the score pays 1 + κ (s · x - m) / (m - min s) for a user, with a stake κ below 1. It pays at least 0, and at
  most 1 on average under every distribution of the set. So the product over users, the capital of the bet, ever exceeds
  1 / α with a chance of at most α (Ville's inequality; Waudby-Smith & Ramdas, JRSS B 2024, section 4).
- The score is learned from the users before (a predictable plug-in): s = (q̂ - p) / ((q̂ + p) / 2), with q̂ their mean
  shares and p training's. This is the most powerful score of a small change from p to q̂. It is learned again whenever
  the number of users has doubled.
- The best stake is about the mean of s · x - m over its variance. A user's candidates are averaged, so the variance is
  smaller than that of a single candidate, by an amount that is unknown before. The evidence is the mean capital of
  eight stakes (section 5.6 there, a grid of bets): the stake that fits the users' variance soon has nearly all of it.
- Users count in the order of their requests, scores change at fixed numbers of users, and the largest capital after any
  user is the evidence. So looks change nothing, and a watch that reads the requests again gets the same evidence.
- Near is a ball: 8 H²(θ, p) ≤ ψ, with H² = 1 - Σ √(θ_j p_j), Hellinger's distance squared. PSI = Σ (θ_j - p_j) ln(θ_j /
  p_j) is at least 8 H², because (a - b) ln(a / b) ≥ 4 (√a - √b)². So an alarm says that PSI is above ψ, too.
- Training is a sample as well: p̂ of m effective observations stands for p. √p̂ - √p is about normal with variance
  1 / (4 m) in C - 1 directions (Freeman & Tukey, Annals of Mathematical Statistics 1950), so 8 m H²(θ, p̂) follows a
  noncentral chi-square distribution with noncentrality at most ψ m. The ball is widened to the quantile of that
  distribution. Shares of two cells, such as missing values, have an interval instead, from the bounds of Clopper &
  Pearson (Biometrika 1934).

Half of α is for the widened set, half for the evidence, and both are divided by the number of measures (Bonferroni).

Shape letters: C cells, K stakes, U users.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Below 1, so that no capital is ever 0. Neighbours differ by a factor of 2: a stake off by √2 keeps 83 % of the growth.
_STAKES = np.array([*(2.0**-power for power in range(7, 0, -1)), 0.9])
# Users before the first bet, and the factor of their number at which the score is learned again.
_FIRST, _GROWTH = 16, 2
# Part of the mean shares that is spread over all cells, so that no score divides by 0.
_SPREAD = 0.02
# Ends of the search for a multiplier, and its precision, in logarithms.
_FAR, _PRECISION = 50.0, 1e-7
_LEAST_SHARE = 1e-4


class Tolerated(Protocol):
    """Set of tolerated distributions of a measure."""

    def largest_mean(self, score: Floats) -> float:
        """Returns the largest mean of a score (C,) over the set."""


@dataclass(frozen=True)
class ToleratedShares:
    """Distributions of two cells whose second share is in an interval."""

    low: float
    high: float

    def largest_mean(self, score: Floats) -> float:
        """Returns the largest mean of a score (2,) over the interval."""
        return max(float(score[0] * (1 - share) + score[1] * share) for share in (self.low, self.high))


@dataclass(frozen=True)
class ToleratedBall:
    """Distributions θ with 8 H²(θ, p) of at most a size.

    Attributes:
        shares: (C,) p, training's shares.
        size: Largest 8 H².
    """

    shares: Floats
    size: float

    def largest_mean(self, score: Floats) -> float:
        """Returns the largest mean of a score (C,) over the ball.

        With u = √θ and w = √p the mean Σ s u² is largest at u ∝ w / (μ - s) for a multiplier μ above the largest score,
        and u · w grows with μ. The multiplier at the ball's edge is a root of one unknown.
        """
        w = np.sqrt(np.maximum(self.shares, 1e-18))
        w /= np.linalg.norm(w)
        gaps = score.max() - score
        scale, edge = max(float(gaps.max()), 1e-12), max(1 - self.size / 8, 0.0)

        def at(log_gap: float) -> Floats:
            u = w / (scale * np.exp(log_gap) + gaps)
            found: Floats = u / np.linalg.norm(u)
            return found

        if at(-_FAR) @ w >= edge:
            return float(at(-_FAR) ** 2 @ score)
        found = scipy.optimize.brentq(lambda log_gap: at(log_gap) @ w - edge, -_FAR, _FAR, xtol=_PRECISION)
        # A multiplier just outside the ball, so that the mean is not too small.
        return float(at(found - 2 * _PRECISION) ** 2 @ score)


class Capital:
    """Capital of the bets against a set of tolerated distributions.

    Attributes:
        evidence: Natural logarithm of the largest capital after any user. Before the first user the capital is 1.

    Args:
        tolerated: The set.
        trained: (C,) training's shares.
    """

    def __init__(self, tolerated: Tolerated, trained: Floats) -> None:
        self.evidence = 0.0
        self._tolerated, self._trained = tolerated, trained
        self._users, self._total, self._until = 0, np.zeros(len(trained)), _FIRST
        self._logs = np.full(len(_STAKES), -np.log(len(_STAKES)))
        self._payoffs = np.ones((len(_STAKES), len(trained)))

    def add(self, shares: Floats) -> None:
        """Bets on users in the order of their requests, given as their shares (U, C)."""
        while len(shares):
            now, shares = np.split(shares, [self._until - self._users])
            logs = self._logs + np.log(now @ self._payoffs.T).cumsum(axis=0)
            self.evidence = max(self.evidence, float(np.logaddexp.reduce(logs, axis=1).max()))
            self._logs = logs[-1]
            self._users, self._total = self._users + len(now), self._total + now.sum(axis=0)
            if self._users == self._until:
                self._payoffs = payoffs(self._total / self._users, self._trained, self._tolerated)
                self._until *= _GROWTH


def payoffs(seen: Floats, trained: Floats, tolerated: Tolerated) -> Floats:
    """Returns what each stake pays (K, C) for a user whose candidates are all in a cell.

    Other users get the mean over their shares. The mean of a payoff is at most 1 under each tolerated distribution.

    Args:
        seen: (C,) mean shares of earlier users.
        trained: (C,) training's shares.
        tolerated: Tolerated distributions.
    """
    around = (1 - _SPREAD) * (seen + trained) / 2 + _SPREAD / len(trained)
    score = (seen - trained) / around
    most = tolerated.largest_mean(score)
    gains = (score - most) / max(most - float(score.min()), 1e-12)
    found: Floats = 1 + _STAKES[:, None] * gains
    return found


def psi(served: Floats, trained: Floats) -> Floats:
    """Returns the population stability index of shares (..., C): Σ (a - b) ln(a / b), a share being at least 0.0001."""
    a, b = np.maximum(served, _LEAST_SHARE), np.maximum(trained, _LEAST_SHARE)
    found: Floats = ((a - b) * np.log(a / b)).sum(axis=-1)
    return found


def ball_of(tolerance: float, shares: Floats, units: float, alpha: float) -> ToleratedBall:
    """Returns the ball around sampled shares (C,) that holds a distribution whose PSI to the true shares is tolerated.

    Args:
        tolerance: Tolerated PSI.
        shares: (C,) shares of the sample.
        units: Effective number of observations of the shares.
        alpha: Chance that a tolerated distribution is outside.
    """
    if units <= 0:
        return ToleratedBall(shares, np.inf)
    quantile = float(scipy.stats.ncx2.ppf(1 - alpha, max(len(shares) - 1, 1), tolerance * units))
    return ToleratedBall(shares, max(quantile / units, tolerance))


def interval_of(tolerance: float, share: float, units: float, alpha: float) -> ToleratedShares:
    """Returns the interval of the tolerated shares around a sampled share.

    Args:
        tolerance: Tolerated difference of the shares.
        share: Share in the sample.
        units: Effective number of observations of the share.
        alpha: Chance that a tolerated share is outside.
    """
    if units <= 0:
        return ToleratedShares(0.0, 1.0)
    count = share * units
    low = scipy.stats.beta.ppf(alpha / 2, count, units - count + 1) if count > 0 else 0.0
    high = scipy.stats.beta.ppf(1 - alpha / 2, count + 1, units - count) if count < units else 1.0
    return ToleratedShares(max(float(low) - tolerance, 0.0), min(float(high) + tolerance, 1.0))
