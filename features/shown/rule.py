"""Rule of the join: the outcomes that count for a shown item. Judge, training frame and stream all use it.

The rule looks at one impression and one outcome. It never looks at other messages or at a clock, so the result does not
depend on the order in which the two topics are read.
"""

from dataclasses import dataclass

SKEW_MS = 60_000
"""Largest difference between the clocks of two machines, milliseconds."""
NOT_SHOWN, BEFORE, TOO_LATE = "item was not shown", "before its impression", "too late"


def refusal(shown_ms: int, outcome_ms: int, *, window_ms: int, was_shown: bool) -> str | None:
    """Returns the reason why an outcome does not count for an impression. None: the outcome counts.

    Args:
        shown_ms: Time of the impression, milliseconds since 1970.
        outcome_ms: Time of the outcome, milliseconds since 1970.
        window_ms: Time after the impression in which outcomes count, milliseconds.
        was_shown: True if the impression has the outcome's item.
    """
    if not was_shown:
        return NOT_SHOWN
    if outcome_ms < shown_ms - SKEW_MS:
        return BEFORE
    return TOO_LATE if outcome_ms > shown_ms + window_ms else None


@dataclass(frozen=True)
class JoinRule:
    """Choices of the join that makes training rows.

    Attributes:
        outcomes: Kinds of outcomes. Each is a column of labels.
        window_ms: Time after an impression in which its outcomes count, milliseconds, at least 1.
        grace_ms: Time that a message may take to reach the log, milliseconds. An impression closes when window and
            grace have passed since its append.
    """

    outcomes: tuple[str, ...]
    window_ms: int
    grace_ms: int = 600_000

    def __post_init__(self) -> None:
        if self.window_ms < 1:
            raise ValueError(f"window_ms: expected at least 1, got {self.window_ms}; give a longer window")
        if not self.outcomes:
            raise ValueError('outcomes: expected one kind or more, got none; name a kind, e.g. "click"')

    @property
    def horizon_ms(self) -> int:
        """Time from the append of an impression to its close, milliseconds."""
        return self.window_ms + self.grace_ms

    def is_in_time(self, shown_at_ms: int, outcome_at_ms: int) -> bool:
        """Returns whether an outcome reached the log in time, by the append times of both messages."""
        return shown_at_ms - self.grace_ms <= outcome_at_ms <= shown_at_ms + self.horizon_ms
