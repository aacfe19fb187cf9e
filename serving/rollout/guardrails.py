"""The guardrails that end an experiment: measures, confidence, and breaches.

The probability of a false alarm is divided among the arms' difference, the split and the operational guardrails. No
test depends on the number of looks or on an earlier look.
"""

import math
from dataclasses import dataclass, field

from features.shown.message import CLICK
from serving.rollout.sequential import Arm, Interval, Slower, difference, mismatched, split_p, surely_above


@dataclass(frozen=True)
class Sums:
    """Sums over the users of one arm, as the guardrails use them.

    Attributes:
        rate: Outcomes by answers.
        calibration: Outcomes by the predicted outcomes of the shown items.
        novelty: Shown items that training hardly knew, by all shown items.
        users: Number of users with a request.
        failed: Number of users with a request without an answer.
        empty: Number of users with an answer without an item.
        slow: Number of users among the slowest of a time slice, see `serving.rollout.time_slices`.
        requests: Number of timed requests.
        p99_ms: p99 of the requests' times, milliseconds, 0 without requests.
    """

    rate: Arm = field(default_factory=Arm)
    calibration: Arm = field(default_factory=Arm)
    novelty: Arm = field(default_factory=Arm)
    users: int = 0
    failed: int = 0
    empty: int = 0
    slow: int = 0
    requests: int = 0
    p99_ms: float = 0.0


@dataclass(frozen=True)
class Look:
    """Result of one look.

    Attributes:
        interval: Challenger's rate minus the control's, with its always-valid interval.
        split_p: p-value of the split of users.
        breaches: Sentences about breaches that end the experiment. Empty if the experiment continues.
    """

    interval: Interval
    split_p: float
    breaches: tuple[str, ...]


@dataclass(frozen=True)
class Guardrails:
    """Guardrails: limits whose breach ends an experiment.

    Attributes:
        outcome: Kind of the outcomes that count. Other outcomes are shown and have no effect.
        planned: Number of users of both arms at which the intervals are narrowest, if each user is answered once and
            outcomes are independent.
        alpha: Probability of a false alarm by the difference of rates, over all looks.
        split_alpha: Probability of a false alarm by the split, over all looks.
        fault_alpha: Probability of a false alarm by each operational guardrail, over all looks.
        harm: Allowed loss of the challenger's rate, as a share of the control's rate. A breach is a loss that is larger
            with confidence.
        most_failed: Largest excess share of the challenger's users with a failure.
        most_empty: Largest excess share of the challenger's users with an empty answer.
        slower: Largest factor between the slowest answers of challenger and control in the same minutes.
        least_ms: Excess of the challenger's slowest answers that is always allowed, milliseconds.
        miscalibrated: Largest factor between the calibrations of challenger and control, if the control's is nearer
            to 1.
        most_novel: Largest difference of the shares of shown items that training hardly knew.
        least_users: Smallest number of users of each arm before ratios are judged.
        least_requests: Smallest number of requests of each arm before p99 is judged.
        least_slow: Smallest number of the challenger's users with a slow answer before p99 is judged, since a single
            user is no evidence.
    """

    outcome: str = CLICK
    planned: int = 200_000
    alpha: float = 0.025
    split_alpha: float = 0.03
    fault_alpha: float = 0.001
    harm: float = 0.0
    most_failed: float = 0.01
    most_empty: float = 0.02
    slower: float = 1.5
    least_ms: float = 5.0
    miscalibrated: float = 1.5
    most_novel: float = 0.2
    least_users: int = 100
    least_requests: int = 500
    least_slow: int = 10

    def look(
        self,
        control: Sums,
        challenger: Sums,
        *,
        shares: tuple[float, float],
        part: float = 1.0,
        slower: Slower = Slower(),  # noqa: B008 - frozen
    ) -> Look:
        """Judges two arms by their present sums.

        Args:
            control: Sums of the control.
            challenger: Sums of the challenger.
            shares: Shares of the layer that control and challenger have.
            part: Share of the α's that this epoch of the experiment may use.
            slower: Evidence that the challenger's answers take longer.
        """
        interval = difference(control.rate, challenger.rate, alpha=part * self.alpha, planned=self.planned)
        users = (control.users, challenger.users)
        p = split_p(users, shares)
        breaches: list[str] = []
        if mismatched(users, shares, alpha=part * self.split_alpha, planned=self.planned):
            expected = f"{shares[0] / sum(shares):.1%} to {shares[1] / sum(shares):.1%}"
            breaches.append(f"sample ratio: {users[0]:,} and {users[1]:,} users, expected {expected}, p {p:.2g}")
        harmed = difference(
            control.rate.times(1 - self.harm), challenger.rate, alpha=part * self.alpha, planned=self.planned
        )
        if self._enough(control, challenger) and harmed.high < 0:
            rates = f"{challenger.rate.rate:.4f} against {control.rate.rate:.4f}"
            breaches.append(f"rate: {rates}, a difference of at most {interval.high:+.4f}")
        breaches += self._faults(control, challenger, part * self.fault_alpha)
        enough = min(control.requests, challenger.requests) >= self.least_requests
        if enough and challenger.slow >= self.least_slow and slower.surely(part * self.fault_alpha):
            breaches.append(f"p99: {challenger.p99_ms:.1f} ms against {control.p99_ms:.1f}")
        breaches += self._drifts(control, challenger, part * self.fault_alpha)
        return Look(interval, p, tuple(breaches))

    def _enough(self, control: Sums, challenger: Sums) -> bool:
        return min(control.rate.users, challenger.rate.users) >= self.least_users

    def _faults(self, control: Sums, challenger: Sums, alpha: float) -> list[str]:
        """Returns breaches by failures and empty answers of the challenger, compared with the control."""
        breaches: list[str] = []
        for name, mine, theirs, most in (
            ("requests failed", challenger.failed, control.failed, self.most_failed),
            ("answers without an item", challenger.empty, control.empty, self.most_empty),
        ):
            users = (control.users, challenger.users)
            if surely_above((theirs, mine), users, margin=most, alpha=alpha):
                shares = f"{mine / users[1]:.1%} of the challenger's users met it, {theirs / users[0]:.1%}"
                breaches.append(f"{name}: {shares} of the control's")
        return breaches

    def _drifts(self, control: Sums, challenger: Sums, alpha: float) -> list[str]:
        """Returns breaches by drifts of scores and items, which do not depend on the rates."""
        if not self._enough(control, challenger):
            return []
        breaches: list[str] = []
        # Faults show early, so their sequences are sharpest after a hundredth of the plan.
        planned = max(self.planned // 100, 1)
        mine, theirs = challenger.calibration.rate, control.calibration.rate
        above, below = (
            difference(control.calibration.times(most), challenger.calibration, alpha=alpha, planned=planned)
            for most in (self.miscalibrated, 1 / self.miscalibrated)
        )
        differs = above.low > 0 or below.high < 0
        # A challenger that is nearer to the truth than the control improves it.
        if differs and (not mine or not theirs or abs(math.log(mine)) > abs(math.log(theirs))):
            breaches.append(f"calibration: {mine:.3f} outcomes for each predicted, {theirs:.3f} with the control")
        mine, theirs = challenger.novelty.rate, control.novelty.rate
        off = difference(control.novelty, challenger.novelty, alpha=alpha, planned=planned)
        if off.low > self.most_novel or off.high < -self.most_novel:
            breaches.append(
                f"novelty: {mine:.1%} of the items shown were hardly known to training, {theirs:.1%} with the control"
            )
        return breaches
