"""The rule that ends an experiment: what is looked at, how sure one must be, and what breached.

The chance of a false alarm is shared out: the arms' difference, the split and the operational guardrails each have a
part of it, and none depends on how often one looks.
"""

from dataclasses import dataclass

from models.sequential import Arm, Interval, SplitTest, difference


@dataclass(frozen=True)
class Rule:
    """When an experiment ends by itself.

    Attributes:
        planned: users of both arms at which the statistics are at their sharpest.
        alpha: of the difference of rates, over all looks.
        split_alpha: of the split, over all looks.
        harm: how much lower the challenger's rate may be, as a share of the control's: below it for sure is a breach.
    """

    planned: int = 200_000
    alpha: float = 0.025
    split_alpha: float = 0.03
    harm: float = 0.0


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

    def look(self, control: Arm, challenger: Arm) -> Look:
        """Judges the arms as they stand now."""
        rule = self._rule
        found = difference(control, challenger, alpha=rule.alpha, planned=rule.planned)
        p = self.split.look([control.users, challenger.users])
        breaches: list[str] = []
        if self.split.mismatched:
            breaches.append(
                f"sample ratio: {control.users:,} and {challenger.users:,} users where {self._wanted()} was asked for, "
                f"p {p:.2g}"
            )
        if found.high < -rule.harm * control.rate:
            breaches.append(
                f"rate: {challenger.rate:.4f} against {control.rate:.4f}, a difference of at most {found.high:+.4f}"
            )
        return Look(found, p, tuple(breaches))

    def _wanted(self) -> str:
        control, challenger = self.split.shares
        return f"{control:.3f} to {challenger:.3f}"
