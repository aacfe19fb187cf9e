"""Statistics of a running experiment, valid however often one looks.

- The difference of two arms' rates has a confidence sequence: an interval at every look such that all of them hold the
  truth at once with probability 1 - α (asymptotically; Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, Annals of
  Statistics 2024, Theorem 2.2: a normal mixture over the standardised sum). Stopping at the first interval beside
  zero is then no false alarm in more than α of all experiments.
- The split of users between arms is tested by spending α over a planned number of users (Lan & DeMets, Biometrika 1983,
  with the spending function of O'Brien & Fleming's kind): each look may use what the function has released since the
  look before, so that the sum over all looks is α at most.

A rate is outcomes over impressions, and a user's impressions go together: the variance is that of users' residuals (the
delta method; Deng et al., WWW 2018), which takes a user with a hundred impressions as one user.

Shape letters: A arms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import chi2, norm

from features.error import TesseraError


@dataclass(frozen=True)
class Arm:
    """Sums over one arm's users.

    Attributes:
        users: how many were shown something.
        impressions, outcomes: Σ i_u and Σ c_u over users u.
        ii, cc, ic: Σ i_u², Σ c_u² and Σ i_u c_u.
    """

    users: int = 0
    impressions: int = 0
    outcomes: int = 0
    ii: float = 0.0
    cc: float = 0.0
    ic: float = 0.0

    @property
    def rate(self) -> float:
        """Outcomes an impression; 0 without impressions."""
        return self.outcomes / self.impressions if self.impressions else 0.0

    @property
    def variance(self) -> float:
        """Of the rate: Σ (c_u - r i_u)² / (Σ i_u)²."""
        if not self.impressions:
            return math.inf
        rate = self.rate
        residuals = self.cc - 2 * rate * self.ic + rate * rate * self.ii
        return max(residuals, 0.0) / self.impressions**2

    def __add__(self, other: "Arm") -> "Arm":
        return Arm(
            self.users + other.users,
            self.impressions + other.impressions,
            self.outcomes + other.outcomes,
            self.ii + other.ii,
            self.cc + other.cc,
            self.ic + other.ic,
        )


@dataclass(frozen=True)
class Interval:
    """A difference and the bounds that hold it, at this look and at all others."""

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
    if users < 2 or not math.isfinite(variance):
        return Interval(estimate, -1.0, 1.0)
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


class SplitTest:
    """The sample-ratio test over many looks: rejects a right split in no more than α of all experiments.

    Args:
        shares: (A,) what the arms were given.
        alpha: spent over all looks.
        planned: users until all of α is spent; looks beyond spend what looks at `planned` would.
    """

    def __init__(self, shares: Sequence[float], *, alpha: float, planned: int) -> None:
        self.shares = tuple(shares)
        self._alpha = alpha
        self._planned = planned
        self._spent = 0.0
        self.mismatched = False

    def look(self, counts: Sequence[int]) -> float:
        """Looks at the users of each arm (A,); returns the p-value, and notes a mismatch for good."""
        p = split_p(counts, self.shares)
        released = spent(min(1.0, sum(counts) / self._planned), self._alpha)
        if p <= released - self._spent:
            self.mismatched = True
        self._spent = max(self._spent, released)
        return p


def spent(share: float, alpha: float) -> float:
    """What of α may be spent when a share of the planned users has come: 2 - 2 Φ(z / √share)."""
    if share <= 0:
        return 0.0
    return float(2 * norm.sf(norm.isf(alpha / 2) / math.sqrt(share)))
