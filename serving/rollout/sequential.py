"""Statistics of a running experiment, valid at any number of looks and independent of earlier looks.

- The difference of two arms' ratios has a confidence sequence: an interval at every look such that all of them hold the
  truth at once with probability 1 - α (asymptotically; Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, Annals of
  Statistics 2024, Theorem 2.2: a normal mixture over the standardised sum). Its clock is information, 1 / variance,
  because users who come again add data and no users (Jennison & Turnbull, JASA 1997, on information time).
- The split of users between arms is tested against a boundary of O'Brien & Fleming's shape (Biometrics 1979) for looks
  at any time up to a planned number of users: the standardised count is a Brownian motion B on [0, 1], and
  P(max |B| ≥ c) ≤ 4 (1 - Φ(c)) by the reflection principle. Beyond the plan a beta mixture of likelihood ratios takes
  over (Ville's inequality; Lindon & Malek, NeurIPS 2022).
- A chance is above another by more than a margin, with confidence, if two beta mixtures agree (`surely_above`).
- One group's numbers are larger at the top than another's, with confidence, if a mixture over odds of Fisher's
  noncentral hypergeometric distribution says so (`Slower`).

No test remembers a look: a judge that restarts gets the same answer.

A ratio is outcomes over exposure, such as clicks over impressions. A user's impressions go together: the variance is
of users' residuals (the delta method; Deng et al., WWW 2018), which counts a user with a hundred impressions once.

Shape letters: A arms, U users.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from features.errors import TesseraError

# Share of the split's α for looks up to the plan; the rest is for looks beyond.
_PLANNED_PART = 0.8
# Number of users that the mixture's prior belief in the right split is worth.
_CONCENTRATION = 1_000.0


@dataclass(frozen=True)
class Arm:
    """Sums over one arm's users.

    Attributes:
        users: Number of users.
        exposure, outcomes: Σ e_u and Σ c_u over users u.
        ee, cc, ec: Σ e_u², Σ c_u² and Σ e_u c_u.
    """

    users: int = 0
    exposure: float = 0.0
    outcomes: float = 0.0
    ee: float = 0.0
    cc: float = 0.0
    ec: float = 0.0

    @staticmethod
    def of(exposure: ArrayLike, outcomes: ArrayLike) -> "Arm":
        """Returns the sums of users with so much exposure (U,) and so many outcomes (U,)."""
        e, c = np.asarray(exposure, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
        return Arm(len(e), float(e.sum()), float(c.sum()), float(e @ e), float(c @ c), float(e @ c))

    @property
    def rate(self) -> float:
        """Outcomes by exposure; 0 without exposure."""
        return self.outcomes / self.exposure if self.exposure else 0.0

    @property
    def variance(self) -> float:
        """Variance of the rate: Σ (c_u - r e_u)² / (Σ e_u)²."""
        if not self.exposure:
            return math.inf
        rate = self.rate
        residuals = self.cc - 2 * rate * self.ec + rate * rate * self.ee
        return max(residuals, 0.0) / self.exposure**2

    def times(self, factor: float) -> "Arm":
        """Returns the same users with this many times the outcomes.

        A margin is tested as a part of the data, not as a bound.
        """
        return Arm(self.users, self.exposure, factor * self.outcomes, self.ee, factor**2 * self.cc, factor * self.ec)

    def __add__(self, other: "Arm") -> "Arm":
        return Arm(
            self.users + other.users,
            self.exposure + other.exposure,
            self.outcomes + other.outcomes,
            self.ee + other.ee,
            self.cc + other.cc,
            self.ec + other.ec,
        )


@dataclass(frozen=True)
class Interval:
    """Difference and its bounds, which hold at this look and at all others; infinite without data."""

    estimate: float
    low: float
    high: float


def difference(control: Arm, challenger: Arm, *, alpha: float, planned: float) -> Interval:
    """Returns the challenger's rate less the control's, with its confidence sequence.

    With v the variance of the estimate and n the effective exposure, the half-width is

        sqrt(v (n ρ² + 1) / (n ρ²) · ln((n ρ² + 1) / α²))

    Effective exposure is information in a unit that does not change while data come: n = E v₀ / v, with E the exposure
    of both arms and v₀ what v would be were each unit of exposure a trial of its own (Kish's design effect is v / v₀).

    Args:
        alpha: Chance that any of all looks' intervals misses the truth.
        planned: Effective exposure at which the sequence is tightest; it is valid at any.

    Raises:
        TesseraError: alpha is not in (0, 1), or planned is not positive.
    """
    if not 0 < alpha < 1 or planned <= 0:
        raise TesseraError(f"alpha {alpha}, planned {planned}: expected 0 < alpha < 1 and planned above 0")
    estimate = challenger.rate - control.rate
    both = control + challenger
    variance = control.variance + challenger.variance
    # Users who are all alike, such as those without a click yet, do not show how different the next may be.
    if both.users < 2 or not 0 < variance < math.inf or not both.rate > 0:
        return Interval(estimate, -math.inf, math.inf)
    alone = both.rate * (1 / control.exposure + 1 / challenger.exposure)
    scaled = both.exposure * alone / variance * tightest(planned, alpha) + 1
    bound = math.sqrt(variance * scaled / (scaled - 1) * math.log(scaled / alpha**2))
    return Interval(estimate, estimate - bound, estimate + bound)


def tightest(planned: float, alpha: float) -> float:
    """Returns ρ² of the normal mixture that is tightest at `planned`: (-W₋₁(-α² / e) - 1) / planned.

    Howard, Ramdas, McAuliffe & Sekhon, Annals of Statistics 2021, Proposition 3.
    """
    return float(-scipy.special.lambertw(-(alpha**2) / math.e, -1).real - 1) / planned


def split_p(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Returns the chi-square test's p-value of a split of users (A,), if arms were given `shares` (A,).

    Raises:
        TesseraError: The two have different lengths, or a share is not positive.
    """
    if len(counts) != len(shares) or not all(share > 0 for share in shares):
        raise TesseraError(f"counts {list(counts)} and shares {list(shares)}: expected as many, and positive shares")
    total = sum(counts)
    if not total:
        return 1.0
    whole = sum(shares)
    expected = [total * share / whole for share in shares]
    statistic = sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))
    return float(scipy.special.chdtrc(len(counts) - 1, statistic))


def mismatched(counts: Sequence[int], shares: Sequence[float], *, alpha: float, planned: int) -> bool:
    """Returns whether two arms' users deviate from the requested split, with a chance of α to be wrong over all looks.

    Args:
        counts: (2,) users of each arm.
        shares: (2,) shares that the arms were given.
        planned: Users of both arms at which the test is sharpest.
    """
    p = split_p(counts, shares)
    total = sum(counts)
    z = float(-scipy.special.ndtri(p / 2)) if p > 0 else math.inf
    if total <= planned and z * math.sqrt(total / planned) >= -scipy.special.ndtri(_PLANNED_PART * alpha / 4):
        return True
    share = shares[1] / sum(shares)
    a, b = _CONCENTRATION * share, _CONCENTRATION * (1 - share)
    return _mixture(counts[1], total, share, a, b) >= -math.log((1 - _PLANNED_PART) * alpha)


def surely_above(counts: Sequence[int], totals: Sequence[int], *, margin: float, alpha: float) -> bool:
    """Returns whether the second of two chances is above the first by more than a margin.

    If it is not, the answer is wrong in at most α of all cases over all looks. For any pair of chances (p, q), the
    product of the two arms' mixtures of likelihood ratios against p and q is a martingale. By Ville's inequality the
    true pair's product stays below 1 / α with probability 1 - α. The answer is yes if the product is above 1 / α for
    every pair with q ≤ p + margin.

    Args:
        counts: (2,) occurrences in control and challenger; totals: (2,) trials of each.
        margin: in [0, 1).
    """
    if not min(totals) or counts[1] / totals[1] <= counts[0] / totals[0] + margin:
        return False

    def evidence(p: float) -> float:
        return _against(counts[0], totals[0], p) + _against(counts[1], totals[1], p + margin)

    # Convex in p. If p is higher than that, the challenger's own share is among its chances.
    least = scipy.optimize.minimize_scalar(evidence, bounds=(0.0, counts[1] / totals[1] - margin), method="bounded")
    return min(float(least.fun), evidence(0.0)) >= -math.log(alpha)


_ODDS = np.log([1.5, 2.0, 4.0, 8.0, 32.0])


@dataclass(frozen=True)
class Slower:
    """Evidence that one group's numbers are larger at the top than another's, gathered per slice of time.

    Within a slice, all numbers of both groups are sorted and the top is counted. If the groups were alike, each set of
    ranks would be equally likely the group's, whatever conditions both shared in the slice: the count is
    hypergeometric. The evidence mixes over odds of the alternative, so it is a martingale over slices (Ville's
    inequality).

    Attributes:
        logs: (5,) log likelihood ratio of each odds, over all slices.
    """

    logs: tuple[float, ...] = (0.0,) * len(_ODDS)

    def with_slice(self, mine: int, top: int, size: int, others: int) -> "Slower":
        """Returns the evidence after another slice: `mine` of its `top` largest numbers are the group's.

        Args:
            size: Numbers of the group in the slice; others: numbers of the other group.
        """
        x = np.arange(max(0, top - others), min(top, size) + 1)
        # Log chances of the hypergeometric distribution, less a constant.
        log_factorial = scipy.special.gammaln
        log_pmf = -(log_factorial(x + 1) + log_factorial(size - x + 1))
        log_pmf -= log_factorial(top - x + 1) + log_factorial(others - top + x + 1)
        log_pmf -= scipy.special.logsumexp(log_pmf)
        expected = scipy.special.logsumexp(log_pmf[:, None] + x[:, None] * _ODDS, axis=0)
        return Slower(tuple((np.array(self.logs) + mine * _ODDS - expected).tolist()))

    def surely(self, alpha: float) -> bool:
        """Returns whether the group's numbers are larger, with a chance of α to be wrong over all looks."""
        return float(scipy.special.logsumexp(self.logs)) - math.log(len(_ODDS)) >= -math.log(alpha)


def _mixture(count: int, total: int, share: float, a: float, b: float) -> float:
    """Returns the log likelihood ratio of a beta mixture against one chance."""
    alone = count * math.log(share) + (total - count) * math.log1p(-share)
    return float(scipy.special.betaln(a + count, b + total - count) - scipy.special.betaln(a, b)) - alone


def _against(count: int, total: int, share: float) -> float:
    """Returns the log likelihood ratio of Jeffreys' mixture against one chance in [0, 1]; infinite if impossible."""
    if (count and share <= 0) or (count < total and share >= 1):
        return math.inf
    if share <= 0 or share >= 1:
        return float(scipy.special.betaln(0.5 + count, 0.5 + total - count) - scipy.special.betaln(0.5, 0.5))
    return _mixture(count, total, share, 0.5, 0.5)
