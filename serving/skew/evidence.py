"""Evidence that a served distribution is farther from training's than allowed, valid at any number of looks.

A user's first request of a window is one observation: the shares x (C,) of the request's candidates in the cells of a
measure. Later requests of the user are not counted, because they resemble the first. Let θ be the mean of x.

- The evidence for one θ is the product over users of Σ_j x_j q_j / θ_j, a bet on the cells with odds q. Its mean is at
  most 1 under θ (Waudby-Smith & Ramdas, JRSS B 2024, section 4, for bounded means), so it exceeds 1 / α at any look
  with a chance of at most α (Ville's inequality). By Jensen's inequality the product is at least exp(Σ_j c_j ln(q_j /
  θ_j)), with c (C,) the sums of x. This bound is used: it needs the sums alone, so no test remembers a look.
- q is a mixture, as `sequential.py` mixes over betas: one half Dirichlet distributions around training's shares, one
  half tilts of them, q_j ∝ p_j exp(λ s_j): a shift or a widening of the order, or one cell alone. A tilt has one
  unknown and not C, so a drift of its kind is found earlier.
- The null is a set: every θ that is near training's shares. The evidence is the smallest over the set (universal
  inference; Wasserman, Ramdas & Balakrishnan, PNAS 2020, equation 7): the mixture over the largest likelihood in it.
- Near is a ball: 8 H²(θ, p) ≤ ψ, with H² = 1 - Σ √(θ_j p_j), Hellinger's distance squared. PSI = Σ (θ_j - p_j) ln(θ_j /
  p_j) is at least 8 H², because (a - b) ln(a / b) ≥ 4 (√a - √b)². So an alarm says that PSI is above ψ, too.
- Training is a sample as well: p̂ of m effective observations stands for p. √p̂ - √p is about normal with variance
  1 / (4 m) in C - 1 directions (Freeman & Tukey, Annals of Mathematical Statistics 1950), so 8 m H²(θ, p̂) follows a
  noncentral chi-square distribution with noncentrality at most ψ m. The ball is widened to the quantile of that
  distribution. Shares of two cells, such as missing values, have an interval instead, from the bounds of Clopper &
  Pearson (Biometrika 1934).

Half of α is for the widened set, half for the evidence, and both are divided by the number of measures (Bonferroni).

Shape letters: M measures, C cells.
"""

import numpy as np
import scipy
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Numbers of observations that the mixture's beliefs in training's shares are worth.
_CONCENTRATIONS = (4.0, 32.0, 256.0, 2_048.0)
# Part of the belief that is spread over all cells alike, so that a cell that training did not have is possible.
_SPREAD = 0.02
_STEPS = 60
_LEAST_SHARE = 1e-4
_SIZES = (*(number / 8 for number in range(1, 9)), 1.25, 1.5, 2.0, 3.0, 4.0)
_TILTS = np.array([sign * size for size in _SIZES for sign in (-1, 1)])


def psi(served: Floats, trained: Floats) -> Floats:
    """Returns the population stability index of shares (..., C): Σ (a - b) ln(a / b), a share being at least 0.0001."""
    a, b = np.maximum(served, _LEAST_SHARE), np.maximum(trained, _LEAST_SHARE)
    found: Floats = ((a - b) * np.log(a / b)).sum(axis=-1)
    return found


def ball_of(tolerance: float, cells: int, units: float, alpha: float) -> float:
    """Returns the largest 8 H² of a distribution to the sampled shares, if its PSI to the true shares is tolerated.

    Args:
        tolerance: Tolerated PSI.
        cells: C, the number of cells.
        units: Effective number of observations of the shares.
        alpha: Chance that a tolerated distribution is outside.
    """
    if units <= 0:
        return np.inf
    quantile = float(scipy.stats.ncx2.ppf(1 - alpha, max(cells - 1, 1), tolerance * units))
    return max(quantile / units, tolerance)


def interval_of(tolerance: float, share: float, units: float, alpha: float) -> tuple[float, float]:
    """Returns the interval of the tolerated shares around a sampled share.

    Args:
        tolerance: Tolerated difference of the shares.
        share: Share in the sample.
        units: Effective number of observations of the share.
        alpha: Chance that a tolerated share is outside.
    """
    if units <= 0:
        return 0.0, 1.0
    count = share * units
    low = scipy.stats.beta.ppf(alpha / 2, count, units - count + 1) if count > 0 else 0.0
    high = scipy.stats.beta.ppf(1 - alpha / 2, count + 1, units - count) if count < units else 1.0
    return max(float(low) - tolerance, 0.0), min(float(high) + tolerance, 1.0)


def ball_evidence(counts: Floats, shares: Floats, balls: Floats) -> Floats:
    """Returns the log evidence (M,) against every distribution of a ball.

    Args:
        counts: (M, C) sums of the users' shares.
        shares: (M, C) training's shares.
        balls: (M,) largest 8 H² to training's shares.
    """
    return _mixture(counts, shares) - _likelihood(counts, _nearest(counts, shares, balls))


def interval_evidence(counts: Floats, shares: Floats, low: Floats, high: Floats) -> Floats:
    """Returns the log evidence (M,) against every share of an interval.

    Args:
        counts: (M, 2) sums of the users' shares.
        shares: (M, 2) training's shares.
        low, high: (M,) interval of the second cell's share.
    """
    total = counts.sum(axis=1)
    share = np.clip(counts[:, 1] / np.maximum(total, 1e-12), low, high)
    return _mixture(counts, shares) - _likelihood(counts, np.stack([1 - share, share], axis=1))


def _likelihood(counts: Floats, chances: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(counts > 0, counts * np.log(chances), 0.0)
    found: Floats = terms.sum(axis=1)
    return found


def _mixture(counts: Floats, shares: Floats) -> Floats:
    """Returns the log of the mean likelihood over the mixture of distributions, (M,)."""
    around = (1 - _SPREAD) * shares + _SPREAD / shares.shape[1]
    log_gamma, total = scipy.special.gammaln, counts.sum(axis=1)
    dirichlet = [
        log_gamma(worth)
        - log_gamma(worth + total)
        + (log_gamma(worth * around + counts) - log_gamma(worth * around)).sum(axis=1)
        for worth in _CONCENTRATIONS
    ]
    mixed = scipy.special.logsumexp(np.stack(dirichlet), axis=0) - np.log(len(dirichlet))
    tilted = _tilted(around)
    tilts = scipy.special.logsumexp(np.einsum("mc,mtc->mt", counts, tilted), axis=1) - np.log(tilted.shape[1])
    found: Floats = np.logaddexp(mixed, tilts) - np.log(2)
    return found


def _tilted(shares: Floats) -> Floats:
    """Returns the logs of tilted shares, (M, T, C)."""
    cells = shares.shape[1]
    order = np.linspace(-1, 1, cells)
    directions = np.concatenate([[order, 2 * np.abs(order) - 1], np.eye(cells)])
    scores = (_TILTS[:, None, None] * directions).reshape(-1, cells)
    logs = np.log(shares)[:, None, :] + scores
    found: Floats = logs - scipy.special.logsumexp(logs, axis=2, keepdims=True)
    return found


def _nearest(counts: Floats, shares: Floats, balls: Floats) -> Floats:
    """Returns the distributions (M, C) of the balls with the largest likelihood.

    With u = √θ, w = √p and x the observed shares, Lagrange's conditions at the ball's edge u · w = b are quadratic:
    2 (1 + t b / 2) u² - t w u - 2 x = 0. The multiplier t is found by bisection.
    """
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)
    seen, w = counts / total, np.sqrt(shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-12))
    edge = np.clip(1 - balls / 8, 0.0, 1.0)[:, None]

    def at(t: Floats) -> Floats:
        scale = 1 + t * edge / 2
        found: Floats = (t * w + np.sqrt((t * w) ** 2 + 16 * scale * seen)) / (4 * scale)
        return found

    low, high = np.full_like(total, -20.0), np.full_like(total, 25.0)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        outside = (at(np.exp(middle)) * w).sum(axis=1, keepdims=True) < edge
        low, high = np.where(outside, middle, low), np.where(outside, high, middle)
    # The lower end lies just outside the ball, so that its likelihood is not too small.
    inside = (np.sqrt(seen) * w).sum(axis=1, keepdims=True) >= edge
    chances = at(np.exp(low)) ** 2
    found: Floats = np.where(inside, seen, chances / np.maximum(chances.sum(axis=1, keepdims=True), 1e-300))
    return found
