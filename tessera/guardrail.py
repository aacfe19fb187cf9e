"""The rule that ends an experiment: what is looked at, how sure one must be, and what breached.

The chance of a false alarm is shared out: the arms' difference, the split and the operational guardrails each have a
part of it, and none depends on how often one looks.
"""

import math
from dataclasses import dataclass

from models.sequential import Arm, Interval, SplitTest, difference
from tessera.experiment import Tally

_LEAST_FAULTS = 5


@dataclass(frozen=True)
class Rule:
    """When an experiment ends by itself.

    Attributes:
        planned: users of both arms at which the statistics are at their sharpest.
        alpha: of the difference of rates, over all looks.
        split_alpha: of the split, over all looks.
        harm: how much lower the challenger's rate may be, as a share of the control's: below it for sure is a breach.
        most_failed, most_empty: how much more often than the control it may fail, or answer without an item.
        slower, least_ms: its p99 may be so many times the control's, and in any case so much above.
        least_requests: of each arm before its p99 is judged.
    """

    planned: int = 200_000
    alpha: float = 0.025
    split_alpha: float = 0.03
    harm: float = 0.0
    most_failed: float = 0.01
    most_empty: float = 0.02
    slower: float = 1.5
    least_ms: float = 5.0
    least_requests: int = 500

    def operational(self, control: Tally, challenger: Tally) -> list[str]:
        """What is wrong with the challenger's answers themselves, beside the control's."""
        enough = min(control.requests, challenger.requests) >= self.least_requests
        found: list[str] = []
        for name, mine, theirs, most in (
            ("requests failed", challenger.failed, control.failed, self.most_failed),
            ("answers without an item", challenger.empty, control.empty, self.most_empty),
        ):
            # By the rule of three, a share that is surely above: three standard errors of a rare event away.
            share, other = mine / max(challenger.requests, 1), theirs / max(control.requests, 1)
            if mine >= _LEAST_FAULTS and share - 3 * math.sqrt(mine) / challenger.requests > other + most:
                found.append(f"{name}: {share:.2%} of the challenger's, {other:.2%} of the control's")
        slow = max(self.slower * control.p99_ms, control.p99_ms + self.least_ms)
        if enough and challenger.p99_ms > slow:
            found.append(f"p99: {challenger.p99_ms:.1f} ms against {control.p99_ms:.1f}")
        return found


@dataclass(frozen=True)
class Look:
    """What one look found.

    Attributes:
        interval: the challenger's rate less the control's.
        split_p: how surprising the split of users is.
        breaches: what ends the experiment, in words; empty where it goes on.
    """

    interval: Interval
    split_p: float
    breaches: tuple[str, ...]


class Watch:
    """Looks at one experiment, again and again.

    Args:
        shares: what control and challenger were given.
    """

    def __init__(self, rule: Rule, *, shares: tuple[float, float]) -> None:
        self._rule = rule
        self.split = SplitTest(shares, alpha=rule.split_alpha, planned=rule.planned)

    def look(self, control: Arm, challenger: Arm, users: tuple[int, int] | None = None) -> Look:
        """Judges the arms as they stand now.

        Args:
            users: of each arm, those whose split is tested; by default all.
        """
        rule = self._rule
        found = difference(control, challenger, alpha=rule.alpha, planned=rule.planned)
        seen = users or (control.users, challenger.users)
        p = self.split.look(seen)
        breaches: list[str] = []
        if self.split.mismatched:
            breaches.append(
                f"sample ratio: {seen[0]:,} and {seen[1]:,} users where {self._wanted()} was asked for, p {p:.2g}"
            )
        if found.high < -rule.harm * control.rate:
            breaches.append(
                f"rate: {challenger.rate:.4f} against {control.rate:.4f}, a difference of at most {found.high:+.4f}"
            )
        return Look(found, p, tuple(breaches))

    def _wanted(self) -> str:
        control, challenger = self.split.shares
        return f"{control:.3f} to {challenger:.3f}"
