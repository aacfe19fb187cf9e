"""Order of a batch's events: by key and arrival, with the moment at which each event counts.

Shape letters: M events with their keys, E events that enter.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.aggregate.key_map import NOT_THERE

Ints = NDArray[np.int64]
NEVER: Final = -(2**62)
"""Clock of a key without events."""
_MOST: Final = 2**62


class _Scale(NamedTuple):
    """Times as numbers from 0 on, so that a segment and a time fit into one whole number.

    Attributes:
        low: Earliest time, which has the number 1; `NEVER` has 0.
        times: None, or the distinct times in order, if the difference of the times is too large. A number is then a
            place in them.
        span: Larger than every number.
    """

    low: int
    times: Ints | None
    span: int

    def number(self, times: Ints) -> Ints:
        """Returns numbers (M,) of times (M,), in the same order."""
        if self.times is not None:
            return np.searchsorted(self.times, times, side="left")
        found: Ints = np.maximum(times - (self.low - 1), 0)
        return found

    def time(self, numbers: Ints) -> Ints:
        """Returns the times (M,) of numbers (M,)."""
        found: Ints = numbers + (self.low - 1) if self.times is None else self.times[numbers]
        return found


@dataclass(frozen=True)
class Order:
    """M events of a batch, sorted by key and arrival, with their places among the E that enter.

    Attributes:
        slot: (M,) number of the key, ascending.
        clock: (M,) newest time of the key before the batch.
        moment: (M,) time at which the event counts.
        segment: (M,) 0, 1, 2, … by key.
        entering: (E,) places of the events that enter.
        begin: (M,) number of entering events in earlier segments.
        settled: (M,) number of entering events in earlier segments and of those that the event sees.
        rank: (E,) number of segment and moment, ascending.
    """

    slot: Ints
    clock: Ints
    moment: Ints
    segment: Ints
    entering: Ints
    begin: Ints
    settled: Ints
    rank: Ints
    scale: _Scale

    def before(self, times: Ints) -> Ints:
        """Returns, of each event, the entering events of earlier segments and those of its key before `times` (M,)."""
        wanted = self.segment * self.scale.span + self.scale.number(times)
        found = np.searchsorted(self.rank, wanted, side="left")
        return np.minimum(np.maximum(found, self.begin), self.settled)


def asking(there: NDArray[np.bool_], clock: Ints, times: Ints) -> Order:
    """Returns the order of questions (M,), events of which none enters.

    Args:
        there: (M,) True for a key with events.
        clock: (M,) newest time of each key, or `NEVER`.
        times: (M,) time of each question.
    """
    zeros, none = np.zeros(len(times), dtype=np.int64), np.zeros(0, dtype=np.int64)
    slot = np.where(there, 0, NOT_THERE)
    return Order(slot, clock, np.maximum(times, clock), zeros, none, zeros, zeros, none, _Scale(0, None, 1))


def ordered(slot: Ints, clock: Ints, time: Ints, enters: NDArray[np.bool_]) -> Order:
    """Returns the order of events (M,) that are sorted by slot and arrival.

    Args:
        slot: (M,) number of each event's key, or `NOT_THERE`.
        clock: (M,) newest time of the key before the batch, or `NEVER`.
        time: (M,) time of each event.
        enters: (M,) False for an event that never counts.
    """
    size = len(slot)
    first = np.ones(size, dtype=np.bool_)
    first[1:] = slot[1:] != slot[:-1]
    segment = first.cumsum() - 1
    scale = _scale(time, clock, int(segment[-1]) + 1 if size else 0)
    base, of_time = segment * scale.span, scale.number(time)
    # The clock after each event; an event that does not enter leaves the clock alone.
    entered = of_time if enters.all() else np.where(enters, of_time, 0)
    clocks = np.maximum.accumulate(base + np.maximum(entered, scale.number(clock)))
    rank = np.maximum(clocks, base + of_time)
    entering = enters.nonzero()[0]
    arrived: Ints = enters.cumsum() - enters
    begin: Ints = arrived[first.nonzero()[0]][segment]
    settled = np.minimum(np.searchsorted(rank[entering], rank, side="left"), arrived)
    return Order(slot, clock, scale.time(rank - base), segment, entering, begin, settled, rank[entering], scale)


def _scale(time: Ints, clock: Ints, segments: int) -> _Scale:
    if not segments:
        return _Scale(0, None, 1)
    low = int(np.where(clock > NEVER, np.minimum(clock, time), time).min())
    span = max(int(time.max()), int(clock.max())) - low + 2
    if segments * span < _MOST:
        return _Scale(low, None, span)
    distinct = np.unique(np.concatenate([time, clock]))
    return _Scale(low, distinct, len(distinct) + 1)
