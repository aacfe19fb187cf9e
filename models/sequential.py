"""Statistics of a running experiment, valid however often one looks, and whoever looked before.

- The difference of two arms' ratios has a confidence sequence: an interval at every look such that all of them hold the
  truth at once with probability 1 - α (asymptotically; Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, Annals of
  Statistics 2024, Theorem 2.2: a normal mixture over the standardised sum). Stopping at the first interval beside
  zero is then no false alarm in more than α of all experiments.
- The split of users between arms is tested against a boundary of O'Brien & Fleming's shape (Biometrics 1979) for looks
  at any time up to a planned number of users: the standardised count is a Brownian motion B on [0, 1], and
  P(max |B| ≥ c) ≤ 4 (1 - Φ(c)) by the reflection principle. Beyond the plan a mixture takes over.
- A share of requests is surely above another where a beta mixture of likelihood ratios says so (Ville's inequality;
  Robbins, Annals of Mathematical Statistics 1970; for splits Lindon & Malek, NeurIPS 2022): valid at any number.

No test remembers a look: a judge that starts again comes to the same answer.

A ratio is outcomes over exposure, such as clicks over impressions. A user's impressions go together: the variance is
that of users' residuals (the delta method; Deng et al., WWW 2018), which takes one with a hundred impressions as one.

Shape letters: A arms, U users.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaln
from scipy.stats import chi2, norm

from features.error import TesseraError

# Of the split's α, what is for looks up to the plan; the rest is for those beyond.
_PLANNED_PART = 0.8
# How many users' worth of belief in the right split the mixture starts with.
_CONCENTRATION = 1_000.0


@dataclass(frozen=True)
class Arm:
    """Sums over one arm's users.

    Attributes:
        users: how many there are.
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
        """The sums of users with so much exposure (U,) and so many outcomes (U,)."""
        e, c = np.asarray(exposure, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
        return Arm(len(e), float(e.sum()), float(c.sum()), float(e @ e), float(c @ c), float(e @ c))

    @property
    def rate(self) -> float:
        """Outcomes by exposure; 0 without any."""
        return self.outcomes / self.exposure if self.exposure else 0.0

    @property
    def variance(self) -> float:
        """Of the rate: Σ (c_u - r e_u)² / (Σ e_u)²."""
        if not self.exposure:
            return math.inf
        rate = self.rate
        residuals = self.cc - 2 * rate * self.ec + rate * rate * self.ee
        return max(residuals, 0.0) / self.exposure**2

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
    """A difference and the bounds that hold it, at this look and at all others; infinite where nothing is known."""

    estimate: float
    low: float
    high: float


def difference(control: Arm, challenger: Arm, *, alpha: float, planned: int) -> Interval:
    """The challenger's rate less the control's, with its confidence sequence.

    Args:
        alpha: chance that any of all looks' intervals misses the truth.
        planned: users at which the sequence is at its tightest; it is valid at any number.

    Raises:
        TesseraError: alpha is not in (0, 1), or planned is not positive.
    """
    if not 0 < alpha < 1 or planned < 1:
        raise TesseraError(f"alpha {alpha}, planned {planned}: expected 0 < alpha < 1 and planned of at least 1")
    estimate = challenger.rate - control.rate
    users = control.users + challenger.users
    variance = control.variance + challenger.variance
    # Users who are all alike, such as none that clicked yet, do not tell how far the next may be off.
    if users < 2 or not 0 < variance < math.inf:
        return Interval(estimate, -math.inf, math.inf)
    # ρ² that makes the bound tightest at `planned` (their equation 2.9, up to a constant).
    rho2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / planned
    scaled = users * rho2 + 1
    # σ̂² / n is the variance of the estimate, with n the users of both arms.
    bound = math.sqrt(variance * users * 2 * scaled / (users**2 * rho2) * math.log(math.sqrt(scaled) / alpha))
    return Interval(estimate, estimate - bound, estimate + bound)


def split_p(counts: Sequence[int], shares: Sequence[float]) -> float:
    """How surprising a split of users (A,) is where arms were given `shares` (A,): the chi-square test's p-value.

    Raises:
        TesseraError: the two are not equally long, or a share is not positive.
    """
    if len(counts) != len(shares) or not all(share > 0 for share in shares):
        raise TesseraError(f"counts {list(counts)} and shares {list(shares)}: expected as many, and positive shares")
    total = sum(counts)
    if not total:
        return 1.0
    whole = sum(shares)
    expected = [total * share / whole for share in shares]
    statistic = sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))
    return float(chi2.sf(statistic, len(counts) - 1))


def mismatched(counts: Sequence[int], shares: Sequence[float], *, alpha: float, planned: int) -> bool:
    """Whether two arms' users are split otherwise than asked for, at a chance of α over all looks to be wrong.

    Args:
        counts: (2,) users of each arm.
        shares: (2,) what the arms were given.
        planned: users of both at which the test is at its sharpest.
    """
    p = split_p(counts, shares)
    total = sum(counts)
    z = float(norm.isf(p / 2)) if p > 0 else math.inf
    if total <= planned and z * math.sqrt(total / planned) >= norm.isf(_PLANNED_PART * alpha / 4):
        return True
    share = shares[1] / sum(shares)
    a, b = _CONCENTRATION * share, _CONCENTRATION * (1 - share)
    return _mixture(counts[1], total, share, a, b) >= -math.log((1 - _PLANNED_PART) * alpha)


def surely_above(count: int, total: int, share: float, *, alpha: float) -> bool:
    """Whether what happened `count` times in `total` has a chance above `share`, in (0, 1).

    False however often one looks, but for a chance of α, where the true chance is `share` or less: all chances up to
    `share` are then outside the confidence sequence of the mixture.
    """
    if not total or count <= share * total:
        return False
    return _mixture(count, total, share, 1.0, 1.0 / share - 1.0) >= -math.log(alpha)


def _mixture(count: int, total: int, share: float, a: float, b: float) -> float:
    """Log of the likelihood ratio of a beta mixture against one chance."""
    alone = count * math.log(share) + (total - count) * math.log1p(-share)
    return float(betaln(a + count, b + total - count) - betaln(a, b)) - alone
