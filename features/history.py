"""A user's history as of an event's time: the frame twin for batch, the online step for the stream.

One rule for both: an event at time t sees the last L positive events of its user with time strictly before t, oldest
first; among equal times the order of arrival decides. Events at the same time never see each other, so a frame built
in any order of ties leaks nothing. `tests/property/test_history.py` holds the two equal.

Shape letters: E events, L history length.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DEFAULT_LENGTH = 20


class Jagged(NamedTuple):
    """Lists of different lengths: list e is `values[offsets[e]:offsets[e + 1]]`."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def take(self, index: NDArray[np.int64]) -> "Jagged":
        """The lists at `index`, in that order."""
        starts, lengths = self.offsets[index], self.offsets[index + 1] - self.offsets[index]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Jagged(self.values[positions], offsets)


@dataclass(frozen=True)
class EventColumns:
    """Events as aligned columns (E,), in order of arrival.

    Attributes:
        user: int64 user number.
        item: int64 item number.
        time: int64, any unit that orders.
        positive: bool, whether the event enters its user's history.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    time: NDArray[np.int64]
    positive: NDArray[np.bool_]


def history_frame(events: EventColumns, *, length: int) -> Jagged:
    """Returns every event's history as item numbers, all at once: the twin of `History.read` before each event."""
    _, clock = np.unique(events.time, return_inverse=True)
    span = int(clock.max(initial=0)) + 1
    moment = events.user * span + clock
    arrived = np.flatnonzero(events.positive)
    # Stable, so equal moments stay in order of arrival.
    ordered = arrived[np.argsort(moment[arrived], kind="stable")]
    moments = moment[ordered]
    stop = np.searchsorted(moments, moment, side="left")
    start = np.maximum(np.searchsorted(moments, events.user * span, side="left"), stop - length)
    lengths = stop - start
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.repeat(start - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Jagged(events.item[ordered[positions]], offsets)


class _Visit(NamedTuple):
    time: int
    arrival: int
    item: int


class History:
    """The online twin: one user's events arrive one by one.

    Keeps per user the last L visits before the newest time, and the last L at that time: what is needed to answer
    `read` exactly for every time from the newest one on. An event that arrives late, before the newest time, is
    answered from what is kept and takes its place in time order.

    Args:
        length: L, ≥ 1.
    """

    def __init__(self, length: int) -> None:
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        self.length = length
        self._visits: dict[int, list[_Visit]] = {}
        self._arrivals = 0

    def read(self, user: int, time: int) -> list[int]:
        """The last L items with time strictly before `time`, oldest first."""
        visits = self._visits.get(user, [])
        stop = bisect_left(visits, time, key=lambda visit: visit.time)
        return [visit.item for visit in visits[max(0, stop - self.length) : stop]]

    def latest(self, user: int) -> list[int]:
        """The last L items up to and including the newest: what a request made now sees."""
        return [visit.item for visit in self._visits.get(user, [])[-self.length :]]

    def append(self, user: int, item: int, time: int) -> None:
        """Records a positive event; the next `read` at a later time sees it."""
        visits = self._visits.setdefault(user, [])
        self._arrivals += 1
        insort(visits, _Visit(time, self._arrivals, item))
        newest = bisect_left(visits, visits[-1].time, key=lambda visit: visit.time)
        keep_before, keep_newest = max(0, newest - self.length), max(newest, len(visits) - self.length)
        self._visits[user] = visits[keep_before:newest] + visits[keep_newest:]

    def visits(self, user: int) -> list[tuple[int, int]]:
        """All that is kept of a user, as (item, time), oldest first; `append` of each restores it."""
        return [(visit.item, visit.time) for visit in self._visits.get(user, [])]

    def users(self) -> Iterable[int]:
        """Users with at least one visit."""
        return self._visits.keys()
