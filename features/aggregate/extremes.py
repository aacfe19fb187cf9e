"""Least, largest and last numbers of keys: running over events of a batch that are sorted by key and arrival.

Shape letter: E events.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
MISSING: Final = -(2**62)
"""Stands for a number that is not there."""


def running(kind: str, segment: Ints, values: Ints, before: Ints) -> Ints:
    """Returns the extreme (E,) of a key's numbers up to each event, `MISSING` as long as there is none.

    Args:
        kind: `min`, `max` or `last`.
        segment: (E,) number of each event's key, ascending.
        values: (E,) number of each event, or `MISSING`.
        before: (E,) extreme of the event's key before the batch, or `MISSING`.
    """
    # The number with the highest priority wins. What is missing has priority 0.
    if kind == "last":
        priority = np.where(values == MISSING, 0, np.arange(2, len(values) + 2))
        old = (before != MISSING).astype(np.int64)
    else:
        distinct, ranks = np.unique(np.concatenate([values, before]), return_inverse=True)
        ranks = ranks if kind == "max" else len(distinct) - ranks
        both = np.where(np.concatenate([values, before]) == MISSING, 0, ranks + 1)
        priority, old = both[: len(values)], both[len(values) :]
    found: Ints
    span = int(max(priority.max(initial=0), old.max(initial=0))) + 1
    best = np.maximum.accumulate(segment * span + np.maximum(priority, old)) - segment * span
    by_priority = np.full(span, MISSING, dtype=np.int64)
    if kind == "last":
        by_priority[priority] = np.where(priority > 0, values, MISSING)
        found = np.where(best == 1, before, by_priority[best])
    else:
        by_priority[priority], by_priority[old] = values, before
        by_priority[0] = MISSING
        found = by_priority[best]
    return found
